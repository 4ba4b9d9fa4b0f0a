"""``pruna-opt``: parse, dispatch, and turn errors into one screen and an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from pruna_ir.cli.arguments import make_parser
from pruna_ir.cli.console import Console, console
from pruna_ir.cli.exit_codes import BUG, INTERRUPTED
from pruna_ir.errors import PrunaError

_MODULES = {
    "list": "listing",
    "explain-groups": "explain_groups",
    "explain-quantization": "explain_quantization",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (``pruna-opt --help`` documents them)."""
    args = make_parser().parse_args(argv)
    with console(as_json=args.json) as out:
        try:
            return _execute(args, out)
        except BrokenPipeError:
            # Whoever read the data has seen enough; Python must not complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0


def _execute(args: argparse.Namespace, out: Console) -> int:
    with warnings.catch_warnings():
        if not args.debug:
            _quiet()
        return _guarded(args, out)


def _guarded(args: argparse.Namespace, out: Console) -> int:
    try:
        name = _MODULES.get(args.command, args.command)
        command = importlib.import_module(f"pruna_ir.cli.{name}")
        code: int = command.execute(args, out)
    except KeyboardInterrupt:
        out.log("interrupted; nothing half-written is left")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except PrunaError as error:
        return _failed(args, out, error)
    except Exception as error:
        return _bug(args, out, error)
    return code


def _failed(args: argparse.Namespace, out: Console, error: PrunaError) -> int:
    out.log(f"error: {error}")
    if args.debug:
        out.log(_traceback(error))
    if args.json:
        kind = type(error).__name__
        out.json({"error": {"type": kind, "message": str(error), "exit_code": error.exit_code}})
    return error.exit_code


def _bug(args: argparse.Namespace, out: Console, error: Exception) -> int:
    lines = str(error).strip().splitlines() or [""]
    out.log(
        f"error: {type(error).__name__}: {lines[0]}\n"
        "This is a bug in pruna-opt, or in a package that it uses. Run the command again with "
        "--debug and report the traceback together with the output of pruna-opt doctor."
    )
    if args.debug:
        out.log(_traceback(error))
    if args.json:
        kind = type(error).__name__
        out.json({"error": {"type": kind, "message": lines[0], "exit_code": BUG}})
    return BUG


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _quiet() -> None:
    """Keep the chatter of libraries off stderr; ``--debug`` lets it through."""
    warnings.simplefilter("ignore")
    # Says in red what the error that follows says in words.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    for name in ("torch", "torch.utils._pytree", "torch.onnx", "transformers", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    sys.exit(main())

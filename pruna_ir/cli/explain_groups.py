"""``pruna-opt explain-groups``: which channels go together, as a table, JSON or a drawing."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from pruna_ir.cli.console import Console
from pruna_ir.cli.inputs import request
from pruna_ir.coupling import couple
from pruna_ir.coupling.kinds import KINDS
from pruna_ir.coupling_drawing import drawing
from pruna_ir.coupling_map import CouplingMap, coupling_map, table
from pruna_ir.errors import UsageError
from pruna_ir.pipeline import Pipeline
from pruna_ir.registry import unknown
from pruna_ir.report import aligned, rich_tables
from pruna_ir.serialize import whole_file
from pruna_ir.sources import load_source

_BY_ENDING = {".html": "html", ".htm": "html", ".json": "json"}


def execute(args: argparse.Namespace, out: Console) -> int:
    """Analyse a model and show its groups."""
    chosen = _format(args)
    pipeline = Pipeline.parse(args.pipeline)
    for kind in args.kind:
        if kind not in KINDS:
            raise UsageError(unknown("kind", kind, KINDS))
    _check_out(args.out)
    out.log(f"capturing {args.model}")
    program = load_source(args.model, request(args))
    program = pipeline.run(program, check_each=False).program
    found = coupling_map(program, couple(program), args.model).only(args.filter, args.kind)
    if args.out is None:
        out.data(_text(found, chosen, out))
        return 0
    with whole_file(args.out) as file:
        file.write(_text(found, chosen, None).encode())
    out.log(f"{found.summary()}\nwritten to {args.out}")
    return 0


def _format(args: argparse.Namespace) -> str:
    """What is asked for: by name, by ``--json``, or by the ending of the file."""
    if args.json and args.format not in (None, "json"):
        raise UsageError(f"--json and --format {args.format} contradict each other; give one")
    ending = _BY_ENDING.get(args.out.suffix.lower()) if args.out is not None else None
    return "json" if args.json else args.format or ending or "table"


def _check_out(path: Path | None) -> None:
    """Refuse, before any work, to write over something that this command cannot have written."""
    if path is not None and path.is_dir():
        raise UsageError(f"{path} is a folder; give a file")


def _text(found: CouplingMap, chosen: str, terminal: Console | None) -> str:
    """The map in a format; tables have colours and wrap where they go to a terminal."""
    if chosen == "json":
        return json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n"
    if chosen == "html":
        return drawing(found)
    if terminal is not None and terminal.terminal:
        width = max(shutil.get_terminal_size().columns, 80)
        return rich_tables([table(found)], width, [found.summary()])
    return f"{aligned(table(found))}\n\n{found.summary()}\n"

"""``pruna-opt replay``: a recorded failure once more."""

from __future__ import annotations

import argparse

from pruna_ir.cli.console import Console
from pruna_ir.reproducer import replay


def execute(args: argparse.Namespace, out: Console) -> int:
    """Replay a reproducer; the exit code is that of the failure, or 0 where it is gone."""
    outcome = replay(args.folder)
    code = 0 if outcome.error is None else outcome.error.exit_code
    if outcome.error is None:
        verdict = "does not fail any more"
    elif outcome.repeated:
        verdict = f"failed again with {outcome.record.error}"
    else:
        verdict = f"failed with {type(outcome.error).__name__}, not {outcome.record.error}"
    if out.as_json:
        out.json(
            {
                "pipeline": outcome.record.pipeline,
                "recorded": outcome.record.message,
                "repeated": outcome.repeated,
                "error": None if outcome.error is None else str(outcome.error),
                "exit_code": code,
            }
        )
        return code
    out.data(f"{outcome.record.pipeline}: {verdict}")
    if outcome.error is not None:
        out.data(str(outcome.error))
    return code

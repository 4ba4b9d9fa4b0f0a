"""``pruna-opt explain-quantization``: what rounding costs at each layer of a saved program."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pruna_ir.build import open_artifact
from pruna_ir.cli.console import Console
from pruna_ir.cli.inputs import read_data
from pruna_ir.errors import UsageError
from pruna_ir.lowering import KernelRow
from pruna_ir.program import Program
from pruna_ir.quant_page import page
from pruna_ir.quant_report import QuantReport, float_table, has_report, quant_report, table
from pruna_ir.report import aligned, rich_tables
from pruna_ir.serialize import load_program, whole_file

_BY_ENDING = {".html": "html", ".htm": "html", ".json": "json"}


def execute(args: argparse.Namespace, out: Console) -> int:
    """Run the program on the data and show its noise."""
    chosen = _format(args)
    if args.out is not None and args.out.is_dir():
        raise UsageError(f"{args.out} is a folder; give a file")
    program = load_program(args.program)
    if not has_report(program):
        raise UsageError(
            f"{args.program} holds no fake-quants; give a program that insert-fake-quant or "
            "quantize-weights made, such as program.pt2 of pruna-opt run --preset int8"
        )
    reference = load_program(args.reference) if args.reference is not None else None
    data = read_data(args.data, program, args.batch_size)
    assert data is not None
    found = quant_report(
        program,
        data,
        reference=reference,
        samples=args.samples,
        audit=_audit(program, args, out),
        progress=out.progress,
    )
    out.hide_progress()
    if args.out is None:
        out.data(_text(found, chosen, args, out))
        return 0
    with whole_file(args.out) as file:
        file.write(_text(found, chosen, args, None).encode())
    out.log(f"{found.summary()}\nwritten to {args.out}")
    return 0


def _format(args: argparse.Namespace) -> str:
    """What is asked for: by name, by ``--json``, or by the ending of the file."""
    if args.json and args.format not in (None, "json"):
        raise UsageError(f"--json and --format {args.format} contradict each other; give one")
    ending = _BY_ENDING.get(args.out.suffix.lower()) if args.out is not None else None
    return "json" if args.json else args.format or ending or "table"


def _audit(program: Program, args: argparse.Namespace, out: Console) -> Sequence[KernelRow]:
    """What the artifact's certificate says that its runtime runs; nothing without an artifact."""
    if args.artifact is None:
        return ()
    artifact = open_artifact(args.artifact)
    if artifact.manifest.program_hash != program.hash():
        raise UsageError(
            f"{args.artifact} was built from program {artifact.manifest.program_hash}, not from "
            f"{args.program} ({program.hash()}); give the program that it was built from"
        )
    if not artifact.certificate.audit:
        out.warn(f"{args.artifact} was never run where it was built, so it has no kernel audit")
    return artifact.certificate.audit


def _text(
    found: QuantReport, chosen: str, args: argparse.Namespace, terminal: Console | None
) -> str:
    """The report in a format; tables have colours and wrap where they go to a terminal."""
    if chosen == "json":
        return json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n"
    if chosen == "html":
        return page(found, Path(args.program).name)
    tables = [table(found, shown=None)]
    tables += [float_table(found)] if found.floats else []
    if terminal is not None and terminal.terminal:
        width = max(shutil.get_terminal_size().columns, 80)
        return rich_tables(tables, width, [found.summary()])
    return "\n\n".join([*map(aligned, tables), f"{found.summary()}\n"])

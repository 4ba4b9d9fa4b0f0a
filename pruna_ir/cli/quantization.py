"""The quantisation reports of a run: one for each quantised program, with its artifact's audit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pruna_ir.certify import Certificate
from pruna_ir.cli.console import Console
from pruna_ir.cli.passes import Compiled
from pruna_ir.data import TensorData
from pruna_ir.lowering import KernelRow
from pruna_ir.quant_page import page
from pruna_ir.quant_report import QuantReport, has_report, quant_report
from pruna_ir.report import ArtifactRow
from pruna_ir.serialize import whole_file

STEM = "quantization"


def quantization(
    compiled: Compiled,
    artifacts: Sequence[ArtifactRow],
    data: TensorData | None,
    args: argparse.Namespace,
    out: Console,
) -> tuple[QuantReport, ...]:
    """Measure every quantised program on the data; pages stand beside ``report.json``.

    None is made without data, which weight-only quantisation does not need.
    """
    if data is None:
        return ()
    folders = {row.target: row.folder for row in artifacts}
    found = []
    for target, program in compiled.programs.items():
        if not has_report(program):
            continue
        out.log(f"{f'{target}: ' if target else ''}measuring what quantisation costs")
        report = quant_report(
            program,
            data,
            audit=_audit(folders.get(target, "")),
            remarks=compiled.remarks.get(target, ()),
            progress=out.progress,
        )
        out.hide_progress()
        found.append(report)
        if args.out is not None:
            name = f"{STEM}-{target}.html" if target else f"{STEM}.html"
            with whole_file(args.out / name) as file:
                file.write(page(report, args.model).encode())
    return tuple(found)


def _audit(folder: str) -> Sequence[KernelRow]:
    """The audit in an artifact's certificate; nothing where there is no artifact."""
    return Certificate.read(Path(folder)).audit if folder else ()

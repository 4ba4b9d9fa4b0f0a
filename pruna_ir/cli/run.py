"""``pruna-opt run``: passes over a model, artifacts for targets, and the report of it all."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pruna_ir.build import check_destination
from pruna_ir.certify import versions
from pruna_ir.cli.accuracy import program_accuracy
from pruna_ir.cli.artifacts import Workshop
from pruna_ir.cli.console import Console
from pruna_ir.cli.inputs import calibration, chosen_pipeline, needs_data, read_data, request
from pruna_ir.cli.passes import Compiled, compile_for, marked, same_program, size_of
from pruna_ir.cli.quantization import STEM, quantization
from pruna_ir.data import TensorData
from pruna_ir.errors import CaptureError, LoweringError, ToolchainError, UsageError
from pruna_ir.instruments import DumpIR
from pruna_ir.lowering import MANIFEST
from pruna_ir.options import make_backend
from pruna_ir.pipeline import Pipeline
from pruna_ir.processes import processes
from pruna_ir.program import Program
from pruna_ir.report import Report, plain_text, rich_text
from pruna_ir.serialize import save_program, whole_file
from pruna_ir.sources import load_source
from pruna_ir.sparsity import sparsity

REPORT = "report.json"
SYNTHETIC = (
    "no calibration data was given (--data): the int8 ranges come from random inputs, which says "
    "nothing about accuracy; use such artifacts for measuring speed only"
)


def execute(args: argparse.Namespace, out: Console) -> int:
    """Run; the exit code is the first error's among the artifacts, or 0."""
    pipeline = chosen_pipeline(args)
    _check_targets(args)
    _check_out(args)
    if args.dump_ir:
        DumpIR(Path(args.dump_ir[1]), args.dump_ir[0])
    out.log(f"capturing {args.model}")
    original = load_source(args.model, request(args))
    inputs = _inputs(args, pipeline, original, out)
    program = marked(original, {"calibration": "synthetic"} if inputs.synthetic else {})
    compiled = compile_for(pipeline, program, args, inputs.data, inputs.eval_data, out)
    team = processes()
    team.wait()
    if not team.first:
        return 0  # Under torchrun all train; one writes, measures and reports.
    if args.out is not None:
        _save(args, original, compiled)
    untouched = program.hash() == original.hash() and not any(s.changed for s in compiled.steps)
    workshop = Workshop(
        args, None if untouched else original, inputs.data, inputs.eval_data, out
    )
    artifacts = tuple(workshop.make(t, p) for t, p in compiled.programs.items() if t)
    report = Report(
        model=args.model,
        pipeline=str(pipeline),
        original=size_of(original),
        accuracy=(
            program_accuracy(original, inputs.eval_data) if inputs.eval_data is not None else None
        ),
        steps=compiled.steps,
        artifacts=artifacts,
        notes=_notes(args, inputs),
        versions=versions(),
        seed=args.seed,
        latency_batch=args.latency_batch,
        sparsity=sparsity(compiled.programs),
        quantization=quantization(compiled, artifacts, inputs.data, args, out),
    )
    _show(report, args, out)
    return next((row.exit_code for row in report.artifacts if row.exit_code), 0)


# -- before any long work -----------------------------------------------------------------------


def _check_targets(args: argparse.Namespace) -> None:
    """Make the backends: ``args.target`` holds their names then, ``args.backends`` themselves."""
    backends = [make_backend(text) for text in args.target]
    args.target = [backend.name for backend in backends]
    args.backends = dict(zip(args.target, backends, strict=True))
    if len(args.backends) != len(args.target):
        raise UsageError(f"a target is given twice: {', '.join(args.target)}")
    if args.target and args.out is None:
        raise UsageError("artifacts need a place: give -o FOLDER")
    for target in args.target:
        missing = args.backends[target].availability().build
        if missing:
            raise ToolchainError(f"backend '{target}' cannot build here: {missing}")


def _check_out(args: argparse.Namespace) -> None:
    """Refuse a folder that cannot be written, or that holds something of the user's own.

    Raises:
        LoweringError: it is read-only.
        UsageError: writing would damage what is there.
    """
    folder: Path | None = args.out
    if folder is None:
        return
    _check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    foreign = [p.name for p in folder.iterdir() if not _ours(p)] if folder.exists() else []
    if foreign:
        raise UsageError(
            f"{folder} holds files that pruna-opt did not write ({', '.join(sorted(foreign)[:3])})"
            "; give another folder"
        )
    if Path(args.model).resolve().is_relative_to(folder.resolve()) and Path(args.model).exists():
        raise UsageError(f"{args.model} lies in {folder}, which would be written over")
    for target in args.target:
        check_destination(folder / target)


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if existing.is_dir() or existing != folder:
            Path(tempfile.mkdtemp(dir=existing, prefix=".pruna-")).rmdir()
    except OSError as error:
        raise LoweringError(
            f"{folder}: cannot be written: {error.strerror}; give a folder that is writable"
        ) from error


def _ours(path: Path) -> bool:
    """Whether a file or folder is one that an earlier run left."""
    if path.is_dir():
        left = path.name.startswith(".") and path.name.endswith((".partial", ".old"))
        return left or (path / MANIFEST).is_file() or path.name.startswith("reproducer")
    return path.name == REPORT or (
        path.suffix == ".pt2" and path.name.startswith(("program", "original"))
    ) or (path.suffix == ".html" and path.name.startswith(STEM)) or path.name.endswith(".partial")


# -- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    data: TensorData | None
    eval_data: TensorData | None
    synthetic: bool


def _inputs(
    args: argparse.Namespace, pipeline: Pipeline, program: Program, out: Console
) -> _Data:
    data = read_data(args.data, program, args.batch_size)
    eval_data = read_data(args.eval_data, program, args.batch_size)
    if eval_data is not None and eval_data.labels is None:
        raise CaptureError(f"{args.eval_data}: has no array named 'labels'")
    synthetic = data is None and needs_data(pipeline)
    if synthetic:
        out.warn(SYNTHETIC)
        data = calibration(program, args.seed)
    return _Data(data, eval_data, synthetic)


def _notes(args: argparse.Namespace, inputs: _Data) -> tuple[str, ...]:
    notes = []
    if inputs.synthetic:
        notes.append(SYNTHETIC)
    if args.no_check:
        notes.append("what the passes promise was not checked (--no-check)")
    if args.stop_after is not None:
        notes.append(f"the pipeline was stopped after {args.stop_after} passes (--stop-after)")
    return tuple(notes)


# -- results ------------------------------------------------------------------------------------


def _save(args: argparse.Namespace, original: Program, compiled: Compiled) -> None:
    """``program.pt2``, or ``program-TARGET.pt2`` where targets got programs of their own."""
    programs = list(compiled.programs.values())
    if same_program(programs):
        save_program(programs[0], args.out / "program.pt2")
    else:
        for target, program in compiled.programs.items():
            save_program(program, args.out / f"program-{target}.pt2")
    if args.keep_program:
        save_program(original, args.out / "original.pt2")


def _show(report: Report, args: argparse.Namespace, out: Console) -> None:
    plain = report.to_json()
    if args.out is not None:
        with whole_file(args.out / REPORT) as file:
            file.write((json.dumps(plain, indent=2, allow_nan=False) + "\n").encode())
    out.hide_progress()
    if out.as_json:
        out.json(plain)
    elif out.terminal:
        out.data(rich_text(report, max(shutil.get_terminal_size().columns, 80)))
    else:
        out.data(plain_text(report))

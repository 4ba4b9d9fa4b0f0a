"""Running a pipeline for several targets, each pass becoming a row of the report."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pruna_ir.bisect import Explain
from pruna_ir.cli.accuracy import program_accuracy
from pruna_ir.cli.console import Console
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.instruments import DumpIR, Statistics, StopAfter, Timing, Watch
from pruna_ir.pipeline import Instrument, Pipeline, Scope, Step
from pruna_ir.program import Program
from pruna_ir.report import Size, StepRow
from pruna_ir.reproducer import WriteReproducer
from pruna_ir.transform import Context, Pass, Remark


@dataclass(frozen=True)
class Compiled:
    """What the pipeline made for each target, and every pass that ran."""

    programs: dict[str, Program]
    """By target; under the empty name where there is no target."""
    steps: tuple[StepRow, ...]
    remarks: dict[str, tuple[Remark, ...]]
    """What the passes said, by target; those of passes that ran for all stand under each."""


def compile_for(
    pipeline: Pipeline,
    program: Program,
    args: argparse.Namespace,
    data: TensorData | None,
    eval_data: TensorData | None,
    out: Console,
) -> Compiled:
    """Run the pipeline: what does not depend on the target once, the rest for each target."""
    shared, rest = split(pipeline) if args.target else (pipeline, Pipeline(()))
    run = _Runs(args, data, eval_data, out)
    common = run.run(shared, program, "")
    if not args.target:
        return Compiled({"": common}, tuple(run.rows), {"": tuple(run.remarks)})
    done, said = run.passes, run.remarks
    programs, remarks = {}, {}
    for target in args.target:
        run.passes, run.remarks = done, list(said)
        programs[target] = run.run(rest, common, target)
        remarks[target] = tuple(run.remarks)
    return Compiled(programs, tuple(run.rows), remarks)


def split(pipeline: Pipeline) -> tuple[Pipeline, Pipeline]:
    """The passes before the first that depends on the target, and the others."""
    for position, item in enumerate(pipeline.items):
        if _depends(item):
            return Pipeline(pipeline.items[:position]), Pipeline(pipeline.items[position:])
    return pipeline, Pipeline(())


def _depends(item: Pass | Scope) -> bool:
    """Whether an item takes the target from its context: it has that option, and left it open."""
    if isinstance(item, Scope):
        return any(map(_depends, item.items))
    return item.depends_on_target


class _Runs:
    """The runs of one command, which share their rows and their count of passes."""

    def __init__(
        self,
        args: argparse.Namespace,
        data: TensorData | None,
        eval_data: TensorData | None,
        out: Console,
    ) -> None:
        self.rows: list[StepRow] = []
        self.remarks: list[Remark] = []
        self.passes = 0
        self._args = args
        self._data = data
        self._eval_data = eval_data
        self._out = out

    def run(self, pipeline: Pipeline, program: Program, target: str) -> Program:
        """Run a part of the pipeline for one target (none: for all)."""
        limit = self._args.stop_after
        if not pipeline.items or (limit is not None and self.passes >= limit):
            return program
        context = Context(
            data=self._data, target=target, progress=self._out.progress, seed=self._args.seed
        )
        rows = Rows(target, self._eval_data, size_of(program))
        # Stopping comes last: the other instruments must have seen the pass.
        stop = [] if limit is None else [StopAfter(limit - self.passes)]
        result = pipeline.run(
            program,
            context,
            instruments=[*self._instruments(target), rows, *stop],
            check_each=not self._args.no_check,
        )
        self._out.hide_progress()
        self.rows += rows.rows
        self.remarks += result.remarks
        self.passes += len(result.steps)
        if self._args.remarks:
            for remark in result.remarks:
                self._out.log(str(remark))
        return result.program

    def _instruments(self, target: str) -> Iterator[Instrument]:
        args = self._args
        yield Explain()
        yield WriteReproducer(_free(Path(args.out or ".") / "reproducer"))
        if args.timing:
            yield Timing(self._out.log)
        if args.statistics:
            yield Statistics(self._out.log)
        if args.dump_ir:
            when, folder = args.dump_ir
            yield DumpIR(Path(folder) / target if target else Path(folder), when)


def _free(folder: Path) -> Path:
    """The folder, or the first numbered one beside it that does not exist."""
    candidates = (folder.with_name(f"{folder.name}-{n}") for n in range(2, 10_000))
    return folder if not folder.exists() else next(c for c in candidates if not c.exists())


class Rows(Watch):
    """Makes a row of the report of every pass."""

    def __init__(self, target: str, eval_data: TensorData | None, size: Size) -> None:
        self.rows: list[StepRow] = []
        self._target = target
        self._eval_data = eval_data
        self._size = size

    def after(self, step: Step, before: Program, program: Program) -> None:  # noqa: ARG002
        """Measure the program that the pass made."""
        accuracy = None
        if step.modified:
            self._size = size_of(program)
            if self._eval_data is not None:
                accuracy = program_accuracy(program, self._eval_data)
        verdict = "not checked" if step.modified else "unchanged"
        if step.check is not None:
            verdict = f"{step.check.effect.value} {'holds' if step.check.passed else 'broken'}"
        self.rows.append(
            StepRow(
                target=self._target,
                text=step.text,
                changed=step.modified,
                nodes=sum(1 for _ in program.calls()),
                size=self._size,
                verdict=verdict,
                check=str(step.check) if step.check is not None else "",
                measured=step.check.measured if step.check is not None else None,
                limit=step.check.limit if step.check is not None else None,
                seconds=step.seconds,
                accuracy=accuracy,
            )
        )


def size_of(program: Program) -> Size:
    """FLOPs, parameters and bytes of a program."""
    found = cost(program)
    return Size(found.flops, found.parameters, found.bytes)


def marked(program: Program, facts: dict[str, str]) -> Program:
    """The program with further attributes, which end up in every manifest."""
    return replace(program, attributes={**program.attributes, **facts}) if facts else program


def same_program(programs: Sequence[Program]) -> bool:
    """Whether all programs are equal."""
    return len({program.hash() for program in programs}) == 1

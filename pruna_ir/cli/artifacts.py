"""Building artifacts and measuring them beside the unoptimised original on the same backend."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pruna_ir.build import Artifact, build
from pruna_ir.cli.accuracy import runner_accuracy
from pruna_ir.cli.console import Console
from pruna_ir.cli.exit_codes import NOT_VERIFIED
from pruna_ir.cli.passes import size_of
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.errors import PrunaError, ToolchainError, VerificationError
from pruna_ir.latency import Latency, measure
from pruna_ir.layer_latency import compare_layers, profile
from pruna_ir.lowering import LoadOptions, ProfiledRunner, Runner, Verdict
from pruna_ir.program import Program
from pruna_ir.reexport import resized
from pruna_ir.report import ArtifactRow, LatencyRow, LayerRow
from pruna_ir.transform import Context

BUDGET = 10.0  # seconds of measuring per artifact


@dataclass(frozen=True)
class Workshop:
    """What all artifacts of a run have in common.

    Attributes:
        args: the command's arguments.
        original: the program as captured, or None where nothing was done to it.
        data: calibration data.
        eval_data: labelled data for accuracy.
        out: the console.
    """

    args: argparse.Namespace
    original: Program | None
    data: TensorData | None
    eval_data: TensorData | None
    out: Console

    def make(self, target: str, program: Program) -> ArtifactRow:
        """Build, verify and measure one artifact; an error becomes a row, not the run's end."""
        context = Context(
            data=self.data, target=target, progress=self.out.progress, seed=self.args.seed
        )
        self.out.log(f"{target}: building and verifying")
        try:
            artifact = build(
                program, self.args.backends[target], self.args.out / target, context,
                options=LoadOptions(threads=self.args.threads),
            )  # fmt: skip
        except PrunaError as error:
            self.out.log(f"{target}: error: {error}")
            verdict = "FAILED" if isinstance(error, VerificationError) else "ERROR"
            first = str(error).splitlines()[0]
            return ArtifactRow(target, verdict, first, error.exit_code, note=str(error))
        finally:
            self.out.hide_progress()
        return self._measured(_row(artifact, program, self.args), artifact, program)

    def _measured(self, row: ArtifactRow, artifact: Artifact, program: Program) -> ArtifactRow:
        try:
            runner = artifact.load(LoadOptions(threads=self.args.threads))
        except ToolchainError as error:
            return replace(row, note=f"not executed: {error}")
        if self.eval_data is not None:
            fixed = _fixed_batch(artifact)
            row = replace(row, accuracy=runner_accuracy(runner, self.eval_data, fixed))
        if self.args.repeats < 1:
            return row
        self.out.log(f"{artifact.manifest.backend}: measuring latency")
        return self._timed(row, artifact, runner, program)

    def _timed(
        self, row: ArtifactRow, artifact: Artifact, runner: Runner, program: Program
    ) -> ArtifactRow:
        target = artifact.manifest.backend
        own = _call(runner, self._inputs(artifact, program))
        if self.original is None:
            found = self._measure({"optimised": own})
            return replace(row, latency=_latency(found["optimised"], None))
        with self._baseline(target) as (baseline, why):
            if baseline is None:
                found = self._measure({"optimised": own})
                return replace(row, latency=_latency(found["optimised"], None), note=why)
            loaded = baseline.load(LoadOptions(threads=self.args.threads))
            before = _call(loaded, self._inputs(baseline, self.original))
            found = self._measure({"original": before, "optimised": own})
            return replace(
                row,
                original_bytes=baseline.size(),
                latency=_latency(found["optimised"], found["original"]),
                layers=self._layers((baseline, artifact), (self.original, program)),
            )

    def _layers(
        self, artifacts: tuple[Artifact, Artifact], programs: tuple[Program, Program]
    ) -> tuple[LayerRow, ...]:
        """Every layer's FLOPs and time before and after, where the program computes less."""
        before, after = programs
        if cost(after).flops >= cost(before).flops:
            return ()
        options = LoadOptions(threads=self.args.threads, profile=True)
        runners = [artifact.load(options) for artifact in artifacts]
        profiled = [runner for runner in runners if isinstance(runner, ProfiledRunner)]
        if len(profiled) < len(runners):
            return ()
        inputs = [self._inputs(a, p) for a, p in zip(artifacts, programs, strict=True)]
        return tuple(compare_layers(before, after, *profile(profiled, inputs)))

    @contextmanager
    def _baseline(self, target: str) -> Iterator[tuple[Artifact | None, str]]:
        """The unoptimised program on the same backend, in a folder that is gone afterwards."""
        assert self.original is not None
        with TemporaryDirectory(prefix="pruna-original-") as folder:
            try:
                made = build(
                    self.original,
                    self.args.backends[target],
                    Path(folder) / target,
                    Context(target=target, seed=self.args.seed),
                    verify=False,
                )
            except PrunaError as error:
                yield None, f"no speed-up: the original cannot be built: {_first(error)}"
                return
            yield made, ""

    def _measure(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        return measure(calls, repeats=self.args.repeats, budget_s=BUDGET)

    def _inputs(self, artifact: Artifact, program: Program) -> list[Any]:
        """The program's examples, or real data, at the sizes that the artifact takes."""
        sizes = {"batch": self.args.latency_batch}
        for spec, described in zip(program.inputs, artifact.manifest.inputs, strict=True):
            for name, taken in zip(spec.shape, described["shape"], strict=True):
                if isinstance(name, str) and isinstance(taken, int):
                    sizes[name] = taken
        values = program.examples if self.data is None else next(iter(self.data)).inputs
        return [
            resized(value, spec, sizes).numpy()
            for value, spec in zip(values, program.inputs, strict=True)
        ]


def _call(runner: Runner, inputs: list[Any]) -> Callable[[], object]:
    return lambda: runner.run(inputs)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _fixed_batch(artifact: Artifact) -> int:
    """The batch size of an artifact that takes no other; 0 where it is open."""
    shape = artifact.manifest.inputs[0]["shape"]
    return shape[0] if shape and isinstance(shape[0], int) else 0


def _row(artifact: Artifact, program: Program, args: argparse.Namespace) -> ArtifactRow:
    certificate = artifact.certificate
    worst = certificate.worst()
    missing = certificate.verdict is Verdict.NOT_RUN and args.require_verified
    return ArtifactRow(
        target=artifact.manifest.backend,
        verdict=certificate.verdict.value,
        verification=certificate.summary(),
        exit_code=NOT_VERIFIED if missing else 0,
        folder=str(artifact.folder),
        bytes=artifact.size(),
        size=size_of(program),
        metric=worst.metric if worst is not None else "",
        measured=worst.measured if worst is not None else None,
        limit=worst.limit if worst is not None else None,
        audit=certificate.audit_summary(),
        warnings=tuple(artifact.manifest.warnings),
    )


def _latency(own: Latency, original: Latency | None) -> LatencyRow:
    return LatencyRow(
        own.p50,
        own.p90,
        own.p99,
        own.rounds,
        original.p50 if original is not None else None,
        own.speedup if original is not None else None,
    )

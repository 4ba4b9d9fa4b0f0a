"""Which models can be pruned: captured, planned, pruned, checked against the oracle, run in ONNX.

    python tests/benchmarks/coverage.py                              # everything: an hour or two
    python tests/benchmarks/coverage.py --only 'timm:res*' --jobs 2  # some
    python tests/benchmarks/coverage.py --steps plan                 # without oracle and ONNX
    python tests/benchmarks/coverage.py --timm 'convnextv2_atto' 'rdnet_tiny'   # others

A row a model: seconds to capture and to plan (analysis, scores, plan, rewrite), parameters before
and after, the error against the masked oracle in float64, the verdict of ONNX Runtime's artifact,
peak memory, and the reason where something stopped. Each model runs in a process of its own under
a time and memory limit. ``--out FILE`` keeps the rows as JSON lines and skips models that are in
it already. The last lines sum up; the exit code is 1 where a captured model failed a step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import model_zoo  # noqa: E402

STEPS = ("capture", "plan", "oracle", "onnx")


@dataclass(frozen=True)
class Row:
    """What happened to one model; ``failed`` names the step that stopped, with its reason."""

    model: str
    capture_s: float = 0.0
    nodes: int = 0
    plan_s: float = 0.0
    before: int = 0
    after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    oracle_error: float | None = None
    check_s: float = 0.0
    onnx: str = ""
    onnx_s: float = 0.0
    memory_mb: int = 0
    failed: str = ""
    reason: str = ""

    @property
    def less(self) -> float:
        """The share of parameters that is gone."""
        return 1 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        error = "" if self.oracle_error is None else f"oracle {self.oracle_error:.0e}"
        tail = f"{self.failed}: {self.reason}" if self.failed else ""
        return (
            f"{self.model:<44} {self.nodes:>5} nodes  capture {self.capture_s:5.1f} s  plan "
            f"{self.plan_s:5.1f} s  {self.before / 1e6:7.2f} M -> {self.after / 1e6:7.2f} M "
            f"({self.less:4.0%})  {error:<12} {self.check_s:4.0f} s  {self.onnx:<8} "
            f"{self.onnx_s:4.0f} s  {self.memory_mb:>5} MB  {tail}"
        )


# -- one model -----------------------------------------------------------------------------


def examine(name: str, ratio: float, steps: tuple[str, ...]) -> Row:
    """Take one model through the steps."""
    row = Row(name)
    step = "build"
    try:
        kind, _, model = name.partition(":")
        built = model_zoo.build(kind, model)
        step = "capture"
        for step, reached in _stages(row, built, ratio, steps):  # noqa: B007
            row = reached
    except Exception as error:
        if os.environ.get("COVERAGE_DEBUG"):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        row = replace(row, failed=step, reason=f"{type(error).__name__}: {' '.join(lines)[:400]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return replace(row, memory_mb=peak)


def _stages(
    row: Row, built: model_zoo.Model, ratio: float, steps: tuple[str, ...]
) -> Iterator[tuple[str, Row]]:
    """The row after each step, with the name of the next."""
    from pruna_ir.build import build
    from pruna_ir.capture import capture
    from pruna_ir.checks import check
    from pruna_ir.cost import cost
    from pruna_ir.passes.canonicalize import Canonicalize
    from pruna_ir.passes.prune_channels import PruneChannels
    from pruna_ir.transform import apply

    start = time.perf_counter()
    program = capture(*built)
    row = replace(row, capture_s=time.perf_counter() - start, nodes=len(program.graph.nodes))
    yield "canonicalize", row
    program = apply(Canonicalize(), program).program
    yield "cost", row
    full = cost(program)
    row = replace(row, before=full.parameters, flops_before=full.flops)
    if "plan" not in steps:
        return
    yield "plan", row
    prune = PruneChannels(ratio=ratio)
    start = time.perf_counter()
    result = apply(prune, program)
    row = replace(row, plan_s=time.perf_counter() - start)
    small = cost(result.program)
    row = replace(row, after=small.parameters, flops_after=small.flops)
    if [spec.shape for spec in program.outputs] != [s.shape for s in result.program.outputs]:
        raise AssertionError("the outputs changed their shapes")
    if "oracle" in steps:
        yield "oracle", row
        start = time.perf_counter()
        report = check(prune, program, result.program, result.oracle)
        row = replace(row, oracle_error=report.measured, check_s=time.perf_counter() - start)
        if not report.passed:
            raise AssertionError(str(report))
    if "onnx" in steps:
        yield "onnx", row
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            certificate = build(result.program, "onnx", Path(folder) / "onnx").certificate
        row = replace(row, onnx=certificate.verdict.name, onnx_s=time.perf_counter() - start)
        if row.onnx != "PASSED":
            raise AssertionError(certificate.summary())
    if row.after >= row.before:
        yield "pruning", row
        raise AssertionError("nothing went: " + "; ".join(_reasons(result.remarks))[:400])
    yield "done", row


def _reasons(remarks: object) -> list[str]:
    assert isinstance(remarks, tuple)
    return [f"{r.node}: {r.message}" for r in remarks if r.kind == "missed"][:4] or ["no group"]


# -- all models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Of one model's process."""

    seconds: float
    memory_mb: int


def run_all(
    names: list[str], ratio: float, steps: tuple[str, ...], jobs: int, limits: Limits
) -> Iterator[Row]:
    """The rows of all models, as they are finished; ``jobs`` at a time."""
    running: dict[int, tuple[str, float, Path]] = {}
    waiting = list(reversed(names))
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                path = Path(folder) / f"{len(waiting)}.json"
                running[_start(name, ratio, steps, path)] = (name, time.monotonic(), path)
            time.sleep(0.1)
            for process, (name, started, path) in list(running.items()):
                row = _finished(process, name, started, path, limits)
                if row is not None:
                    del running[process]
                    yield row


def _start(name: str, ratio: float, steps: tuple[str, ...], path: Path) -> int:
    """A forked child that writes its row; libraries are imported once, in the parent."""
    process = os.fork()
    if process:
        return process
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        if not os.environ.get("COVERAGE_DEBUG"):
            os.dup2(nowhere.fileno(), 2)
    row = examine(name, ratio, steps)
    path.write_text(json.dumps(asdict(row)))
    os._exit(0)


def _finished(
    process: int, name: str, started: float, path: Path, limits: Limits
) -> Row | None:
    done, status = os.waitpid(process, os.WNOHANG)
    if done:
        if path.exists():
            return Row(**json.loads(path.read_text()))
        return Row(name, failed="process", reason=f"ended with status {status}")
    why = ""
    if time.monotonic() - started > limits.seconds:
        why = f"still running after {limits.seconds:.0f} s"
    elif (used := _memory_mb(process)) > limits.memory_mb:
        why = f"uses {used} MB"
    if not why:
        return None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return Row(name, failed="limit", reason=why)


def _memory_mb(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE") // 2**20


def model_names(timm_names: Sequence[str]) -> list[str]:
    """All models: torchvision but for detection and int8 ones, timm families, transformers."""
    import torchvision

    detection = torchvision.models.list_models(torchvision.models.detection)
    left_out = {*detection, *(n for n in torchvision.models.list_models() if "quantized_" in n)}
    vision = [n for n in torchvision.models.list_models() if n not in left_out]
    return [
        *(f"hf:{name}" for name in model_zoo.TRANSFORMERS),
        *(f"torchvision:{name}" for name in vision),
        *(f"timm:{name}" for name in timm_names),
    ]


def summary(rows: list[Row]) -> str:
    """The shares that the benchmark is about."""
    captured = [row for row in rows if row.before]
    fine = [row for row in captured if not row.failed]
    count = max(len(captured), 1)
    plans = sorted(row.plan_s for row in captured if row.plan_s)
    lines = [
        f"{len(rows)} models, {len(captured)} captured",
        f"no step failed:                {len(fine):4} ({len(fine) / count:.1%} of captured)",
        *(
            f"over {share:.0%} fewer parameters:   {n:4} ({n / count:.1%})"
            for share, n in (
                (0.1, sum(row.less > 0.1 for row in fine)),
                (0.5, sum(row.less >= 0.5 for row in fine)),
            )
        ),
    ]
    if plans:
        lines.append(f"plan: median {plans[len(plans) // 2]:.2f} s, longest {plans[-1]:.1f} s")
    errors = [row.oracle_error for row in fine if row.oracle_error is not None]
    if errors:
        lines.append(f"largest oracle error: {max(errors):.1e} over {len(errors)} models")
    return "\n".join(lines)


def main() -> None:
    """Print a row a model and a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="globs of KIND:NAME")
    parser.add_argument("--timm", nargs="*", default=None, help="other timm models, by name")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="limit of one model")
    parser.add_argument("--memory-mb", type=int, default=16_000, help="limit of one model")
    parser.add_argument("--out", type=Path, help="JSON lines to append to, and to resume from")
    given = parser.parse_args()
    known = _known(given.out)
    timm_names = model_zoo.TIMM if given.timm is None else given.timm
    names = [
        name
        for name in model_names(timm_names)
        if any(fnmatch(name, glob) for glob in given.only) and name not in known
    ]
    _preload()
    rows = list(known.values())
    limits = Limits(given.seconds, given.memory_mb)
    for row in run_all(names, given.ratio, tuple(given.steps), given.jobs, limits):
        rows.append(row)
        print(row, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    print(summary(rows))
    sys.exit(1 if any(row.failed and row.before for row in rows) else 0)


def _known(path: Path | None) -> dict[str, Row]:
    if path is None or not path.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    return {row.model: row for row in rows}


def _preload() -> None:
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    import pruna_ir.onnx_export
    import pruna_ir.passes.prune_channels  # noqa: F401

    # A forked child must not inherit threads.
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

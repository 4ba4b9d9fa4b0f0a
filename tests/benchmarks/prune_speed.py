"""Real speed-up of pruning: a model with half of its channels against itself, on real runtimes.

    python tests/benchmarks/prune_speed.py                        # ResNet-50, batch 1, 224 x 224
    python tests/benchmarks/prune_speed.py --threads 1 --repeats 200 --model resnet18

The dense and the pruned program (random weights, seeded; both with batch norms folded, so that
pruning alone makes the difference) are lowered to OpenVINO in float32 and to ONNX; each pair runs
in turns, and the speed-up is the median over rounds. Then every layer is timed in both artifacts
by the runtime's own profiler: FLOPs against time, and which layers did not speed up. Exits 1 where
a speed-up is below ``--least``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.cost import cost
from pruna_ir.latency import measure
from pruna_ir.layer_latency import compare_layers, profile
from pruna_ir.lowering import LoadOptions, ProfiledRunner
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.report import aligned, layer_table, quantity

TARGETS = ("openvino", "onnx")


def programs(name: str, size: int, ratio: float) -> tuple[Program, Program]:
    """The dense and the pruned program."""
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    captured = capture(module, (torch.randn(2, 3, size, size),))
    prune = f"prune-channels{{ratio={ratio}}}"
    dense, pruned = (
        Pipeline.parse(text).run(captured, check_each=False).program
        for text in ("canonicalize,fold-batch-norm", f"canonicalize,{prune},fold-batch-norm")
    )
    return dense, pruned


def call(artifact: Artifact, inputs: list[np.ndarray], threads: int) -> Callable[[], object]:
    """A loaded artifact on these inputs."""
    runner = artifact.load(LoadOptions(threads=threads))
    return lambda: runner.run(inputs)


def profiles(
    artifacts: tuple[Artifact, Artifact], inputs: list[np.ndarray], threads: int
) -> list[dict[str, float]]:
    """Milliseconds a layer of each artifact, in turns."""
    runners = [a.load(LoadOptions(threads=threads, profile=True)) for a in artifacts]
    profiled = [runner for runner in runners if isinstance(runner, ProfiledRunner)]
    return profile(profiled, [inputs] * 2, budget_s=30.0)


def compare(target: str, pair: tuple[Program, Program], arguments: argparse.Namespace) -> bool:
    """Measure one runtime; whether the speed-up is as large as is asked for."""
    inputs = [np.random.default_rng(0).normal(size=(1, 3, arguments.size, arguments.size))]
    inputs = [value.astype(np.float32) for value in inputs]
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = (
            build(program, target, Path(folder) / f"{target}-{i}")
            for i, program in enumerate(pair)
        )
        found = measure(
            {"dense": call(dense, inputs, arguments.threads),
             "pruned": call(pruned, inputs, arguments.threads)},
            repeats=arguments.repeats, budget_s=arguments.budget, warmup=5,
        )  # fmt: skip
        rows = compare_layers(*pair, *profiles((dense, pruned), inputs, arguments.threads))
    fine = found["pruned"].speedup >= arguments.least
    print(f"{target}: dense {found['dense']}\n{target}: pruned {found['pruned']}"
          f"{'' if fine else f'  below {arguments.least}x'}")  # fmt: skip
    print(aligned(layer_table(target, rows)))
    slow = [row.layer for row in rows if row.slow]
    print(f"{target}: layers that did not speed up: {', '.join(slow) or 'none'}\n", flush=True)
    return fine


def main() -> None:
    """Print both runtimes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a runtime")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to the runtimes")
    parser.add_argument("--least", type=float, default=1.7, help="the speed-up to reach")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    arguments = parser.parse_args()
    pair = programs(arguments.model, arguments.size, arguments.ratio)
    before, after = map(cost, pair)
    print(f"{arguments.model}: FLOPs {quantity(before.flops)} -> {quantity(after.flops)} "
          f"({before.flops / after.flops:.1f}x less), parameters "
          f"{quantity(before.parameters)} -> {quantity(after.parameters)}\n")  # fmt: skip
    fine = [compare(target, pair, arguments) for target in arguments.targets]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()

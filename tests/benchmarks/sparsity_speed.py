"""What zeros in weights buy on each backend: latency of dense and masked programs, side by side.

    python tests/benchmarks/sparsity_speed.py                       # ResNet-18, MLP; all backends
    python tests/benchmarks/sparsity_speed.py --model mlp --backend openvino --threads 1

Per model and backend, one run with interleaved rounds of: the dense program, masks (unstructured
at 50% and 90%, 2:4, 16x16 blocks at 50%), all folded to zeros, and, as a control that must get
faster, half of the channels removed. Columns: median milliseconds, speed-up over dense in the same
round, size of the artifact, and of its files under zlib, as a download would be.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.build import Artifact, build
from pruna_ir.latency import measure
from pruna_ir.lowering import LoadOptions
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.reexport import resized

CASES = {
    "dense": "",
    "50%": "mask-weights,fold-constants",
    "90%": "mask-weights{sparsity=0.9},fold-constants",
    "2:4": "mask-weights{pattern=2:4},fold-constants",
    "16x16 50%": "mask-weights{pattern=16x16},fold-constants",
    "channels 50%": "prune-channels{ratio=0.5}",
}


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """Four layers of 1024, batch 16."""
    layers = [m for _ in range(3) for m in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 16)), torch.randn(16, 1024)


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    """torchvision's, one image of 112 x 112 pixels."""
    import torchvision

    return torchvision.models.resnet18(), torch.randn(2, 3, 112, 112)


MODELS = {"mlp": (mlp, 16), "resnet18": (resnet18, 1)}


def programs(name: str) -> dict[str, Program]:
    """The program of each case, batch norms folded."""
    torch.manual_seed(0)
    module, example = MODELS[name][0]()
    start = Pipeline.parse("canonicalize,fold-batch-norm").run(
        capture(module.eval(), (example,)), check_each=False
    )
    return {
        case: Pipeline.parse(text).run(start.program, check_each=False).program
        for case, text in CASES.items()
    }


def compressed(artifact: Artifact) -> int:
    """The bytes of an artifact's files under zlib."""
    files = (artifact.folder / name for name in artifact.manifest.files)
    return sum(len(zlib.compress(file.read_bytes(), 1)) for file in files)


def run(name: str, backend: str, threads: int, repeats: int) -> None:
    """Build, measure and print one model on one backend."""
    made = programs(name)
    batch = MODELS[name][1]
    with tempfile.TemporaryDirectory() as folder:
        artifacts, calls = {}, {}
        for number, (case, program) in enumerate(made.items()):
            artifacts[case] = build(program, backend, Path(folder) / str(number), verify=False)
            runner = artifacts[case].load(LoadOptions(threads=threads))
            spec, example = program.inputs[0], program.examples[0]
            value = resized(example, spec, {"batch": batch}).numpy()
            calls[case] = _call(runner, value)
        found = measure(calls, repeats=repeats, budget_s=60.0)
        print(f"\n{name} on {backend}, batch {batch}, {threads} thread(s), "
              f"{next(iter(found.values())).rounds} rounds")  # fmt: skip
        print(f"  {'weights':<14}{'p50 ms':>9}{'speed-up':>10}{'MB':>8}{'MB zlib':>9}")
        for case, latency in found.items():
            size, small = artifacts[case].size() / 1e6, compressed(artifacts[case]) / 1e6
            print(f"  {case:<14}{latency.p50:>9.3g}{latency.speedup:>9.2f}x{size:>8.1f}"
                  f"{small:>9.1f}")  # fmt: skip


def _call(runner: Any, value: np.ndarray[Any, Any]) -> Any:
    return lambda: runner.run([value])


def main() -> None:
    """Read the arguments and run every case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--backend", nargs="+", default=["onnx", "openvino", "tvm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    for name in args.model:
        for backend in args.backend:
            run(name, backend, args.threads, args.repeats)


if __name__ == "__main__":
    main()

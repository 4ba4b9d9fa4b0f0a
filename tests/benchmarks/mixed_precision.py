"""Accuracy of a trained CIFAR-10 ResNet whose layers have bits of their own, beside one for all.

    python tests/benchmarks/mixed_precision.py --data FOLDER                     # by bytes
    python tests/benchmarks/mixed_precision.py --data FOLDER --of operations
    python tests/benchmarks/mixed_precision.py --data FOLDER --images 1000 --points 4

FOLDER holds a ``load.py`` with ``cifar10(part)``, ``normalise(images)`` and
``cifar_resnet(depth)``. choose-bits searches on ``--samples`` images of ``train_1``, drawn by the
seed; insert-fake-quant then quantises with the widths of each point of its front, and with each
single width, from the same images. Weights' scales are those of least squared error. Top-1 is that
of the fake-quantised program on the test part. Nothing is trained or mended.

Ends with whether, at the cost of each single width between the cheapest and the dearest, a point
of the front that costs no more is at least as accurate; exits 1 where one is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import torch

from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.pareto import BitSearch, FrontPoint, bits_option
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.choose_bits import ChooseBits
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply

WIDTHS = {
    "size": ("w8a8", "w6a8", "w4a8", "w3a8", "w2a8"),
    "operations": ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3"),
    "latency": ("w8a8", "float"),
}


@dataclass(frozen=True)
class Row:
    """A program that was looked at."""

    name: str
    point: FrontPoint
    top1: float


def loader(folder: Path) -> ModuleType:
    """The folder's ``load.py``."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(program: Program, load: ModuleType, images: int) -> float:
    """Top-1 on the test part, in percent."""
    x, labels = (part[:images] for part in load.cifar10("test"))
    right = 0
    with torch.no_grad():
        for start in range(0, len(x), 250):
            scores = program(load.normalise(x[start : start + 250]))[0]
            right += int((scores.argmax(1).numpy() == labels[start : start + 250]).sum())
    return 100.0 * right / len(x)


def calibration(load: ModuleType, samples: int, seed: int) -> TensorData:
    """Images of ``train_1`` with their labels."""
    images, labels = load.cifar10("train_1")
    chosen = np.random.default_rng(seed).permutation(len(images))[:samples]
    x = load.normalise(images[chosen])
    return TensorData((x,), torch.from_numpy(np.asarray(labels[chosen])).long(), 64)


def searched(
    arguments: argparse.Namespace, program: Program, context: Context
) -> tuple[BitSearch, float]:
    """What choose-bits found, and the seconds that it took."""
    with TemporaryDirectory() as folder:
        file = Path(arguments.save or Path(folder) / "bits.json")
        search = ChooseBits(
            limit=1e9, of=arguments.of, measure=arguments.measure, points=arguments.points,
            widths=tuple(arguments.widths or WIDTHS[arguments.of]), samples=arguments.samples,
            weights="mse", save=str(file),
        )  # fmt: skip
        start = time.perf_counter()
        apply(search, program, context)
        return BitSearch.from_json(file.read_text()), time.perf_counter() - start


def rows(
    arguments: argparse.Namespace, found: BitSearch, program: Program, context: Context,
    load: ModuleType,
) -> list[Row]:
    """A row for each point of the front and each single width, printed as it is measured."""
    result = []
    for point in (*found.uniform, *found.front):
        bits = bits_option(point.widths)
        pass_ = InsertFakeQuant(bits=bits, weights="mse", samples=arguments.samples)
        floats = set(point.widths.values()) == {"float"}
        mixed = program if floats else apply(pass_, program, context).program
        top1 = accuracy(mixed, load, arguments.images)
        result.append(Row(point.label or "front", point, top1))
        share = point.cost / found.reference
        print(
            f"{result[-1].name:<6} {point.cost:12.6g} {found.unit} {share:6.1%}  predicted "
            f"{point.predicted:9.3g}  measured {point.measured:9.3g}  top-1 {top1:.2f} %",
            flush=True,
        )
    return result


def verdict(found: list[Row], tolerance: float) -> bool:
    """Print, for each single width, the best point of the front that costs no more."""
    good = True
    front = [row for row in found if row.name == "front"]
    for row in found:
        within = [f for f in front if f.point.cost <= row.point.cost * (1 + 1e-9)]
        if row.name == "front" or not within:
            continue
        best = max(within, key=lambda f: f.top1)
        good = good and best.top1 >= row.top1 - tolerance
        print(
            f"at the cost of {row.name}: {best.top1:.2f} % mixed beside {row.top1:.2f} % "
            f"({best.point.cost / row.point.cost:.1%} of its cost)"
        )
    return good


def main() -> None:
    """Search, look at every point, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with load.py")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--of", default="size", choices=sorted(WIDTHS))
    parser.add_argument("--measure", default="noise", choices=["noise", "loss", "divergence"])
    parser.add_argument("--widths", nargs="*", help="such as w8a8 w4a8")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--tolerance", type=float, default=0.2, help="points of top-1")
    parser.add_argument("--save", default="", help="keep the search as JSON and SVG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = loader(arguments.data)
    program = capture(load.cifar_resnet(arguments.depth), (torch.randn(2, 3, 32, 32),))
    program = apply(FoldBatchNorm(), apply(Canonicalize(), program).program).program
    data = calibration(load, arguments.samples, arguments.seed)
    context = Context(data=data, target=arguments.target, seed=arguments.seed)
    print(f"float  top-1 {accuracy(program, load, arguments.images):.2f} %", flush=True)
    found, seconds = searched(arguments, program, context)
    print(f"search over {len(found.layers)} layers: {seconds:.0f} s", flush=True)
    everything = rows(arguments, found, program, context, load)
    sys.exit(0 if verdict(everything, arguments.tolerance) else 1)


if __name__ == "__main__":
    main()

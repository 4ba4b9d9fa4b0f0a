"""Accuracy of a trained CIFAR-10 ResNet at few bits, before and after quantisation-aware training.

    python tests/benchmarks/qat_accuracy.py --data FOLDER                       # W4A4, hours
    python tests/benchmarks/qat_accuracy.py --data FOLDER --epochs 1 --images 2000
    python tests/benchmarks/qat_accuracy.py --data FOLDER --checkpoint run.pt   # may be killed

FOLDER holds a ``load.py`` with ``cifar10(part)``, ``normalise(images)`` and
``cifar_resnet(depth)``. Calibration: 512 images of ``train_1``. Training: all five training parts,
with the usual augmentation (crops of the image padded by 4 on each side, flips), towards the float
network's scores. The first and the last layer, weights and inputs, have 8 bits, as in the paper
(Esser et al., ICLR 2020, section 2.3); every other layer ``--bits``.

Prints top-1 on the test part for the float network, for the quantised one, and after each epoch,
with seconds. Exits 1 where more than ``--budget`` points are lost in the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from pruna_ir.capture import capture
from pruna_ir.data import Batch, TensorData
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.train_quantized import TrainQuantized, train
from pruna_ir.program import Program
from pruna_ir.training import with_state
from pruna_ir.transform import Context, apply

CALIBRATION = 512
PADDING = 4


@dataclass(frozen=True)
class Augmented:
    """Images that are cropped and flipped anew in each epoch when they are trained on.

    Attributes:
        images: float32[n, 3, 32, 32], normalised.
        border: the value of a black pixel, [3, 1, 1], with which crops are padded.
        labels: int64[n].
        seed: of crops and flips.
    """

    images: torch.Tensor
    border: torch.Tensor
    labels: torch.Tensor
    seed: int = 0
    batch_size: int = 128

    @property
    def count(self) -> int:
        return len(self.images)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The images as they are."""
        yield from TensorData((self.images,), self.labels, self.batch_size)

    def gather(self, indices: torch.Tensor, epoch: int) -> Batch:
        """Cropped and flipped by numbers that are drawn once per epoch for all images."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        drawn = torch.randint(0, 2 * (2 * PADDING + 1) ** 2, (self.count,), generator=generator)
        chosen = drawn[indices]
        rows, columns = chosen // 2 // (2 * PADDING + 1), chosen // 2 % (2 * PADDING + 1)
        size = self.images.shape[-1]
        span = torch.arange(size)
        columns = torch.where(
            (chosen % 2 == 1)[:, None], size - 1 - span, span
        ) + columns[:, None]  # fmt: skip
        rows = rows[:, None] + span
        padded = self.border.expand(len(indices), -1, size + 2 * PADDING, -1)
        padded = padded.expand(-1, -1, -1, size + 2 * PADDING).clone()
        inner = slice(PADDING, PADDING + size)
        padded[:, :, inner, inner] = self.images[indices]
        each = torch.arange(len(indices))[:, None, None]
        cropped = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
        return Batch((cropped.permute(0, 3, 1, 2).contiguous(),), self.labels[indices])


def loader(folder: Path) -> ModuleType:
    """The folder's ``load.py``."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training_data(load: ModuleType, parts: int, seed: int) -> Augmented:
    """The training parts, normalised."""
    found = [load.cifar10(f"train_{number + 1}") for number in range(parts)]
    images = np.concatenate([images for images, _ in found])
    labels = np.concatenate([labels for _, labels in found])
    border = load.normalise(np.zeros((1, 1, 1, 3), np.uint8))[0]
    return Augmented(load.normalise(images), border, torch.from_numpy(labels).long(), seed)


def accuracy(program: Program, load: ModuleType, images: int) -> float:
    """Top-1 on the test part, in percent."""
    x, labels = (part[:images] for part in load.cifar10("test"))
    right = 0
    with torch.no_grad():
        for start in range(0, len(x), 250):
            scores = program(load.normalise(x[start : start + 250]))[0]
            right += int((scores.argmax(1).numpy() == labels[start : start + 250]).sum())
    return 100.0 * right / len(x)


def float_program(load: ModuleType, depth: int) -> Program:
    """The trained network, batch norms folded."""
    program = capture(load.cifar_resnet(depth), (torch.randn(2, 3, 32, 32),))
    return apply(FoldBatchNorm(), apply(Canonicalize(), program).program).program


def quantised(
    program: Program, load: ModuleType, target: str, bits: tuple[int, int], seed: int
) -> Program:
    """The network at these bits of weights and activations, 8 in its first and last layer."""
    images, labels = load.cifar10("train_1")
    chosen = np.random.default_rng(seed).permutation(len(images))[:CALIBRATION]
    data = TensorData(
        (load.normalise(images[chosen]),), torch.from_numpy(labels[chosen]).long(), 128
    )
    pass_ = InsertFakeQuant(
        target=target, weights="mse", samples=CALIBRATION, bits=(f"w{bits[0]}a{bits[1]}",),
        ends="w8a8",
    )  # fmt: skip
    return apply(pass_, program, Context(data=data, seed=seed)).program


def main() -> None:
    """Print a line an epoch, and the verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with load.py")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--bits", type=int, nargs=2, default=[4, 4], help="weights, activations")
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--scales", default="lsq", choices=["lsq", "lsq+", "pact", "fixed"])
    parser.add_argument("--labels", type=float, default=0.0, help="weight of the cross entropy")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--parts", type=int, default=5, help="how many training parts to use")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--budget", type=float, default=1.0, help="points that may be lost")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = loader(arguments.data)
    program = float_program(load, arguments.depth)
    reference = accuracy(program, load, arguments.images)
    print(f"float            top-1 {reference:.2f} %", flush=True)
    w, a = arguments.bits
    start = quantised(program, load, arguments.target, (w, a), arguments.seed)
    before = accuracy(start, load, arguments.images)
    print(f"W{w}A{a}             top-1 {before:.2f} %", flush=True)
    sys.exit(0 if run(arguments, start, load, reference) else 1)


def run(
    arguments: argparse.Namespace, start: Program, load: ModuleType, reference: float
) -> bool:
    """Train, print a line an epoch, and say whether the budget was kept."""
    options = TrainQuantized(
        epochs=arguments.epochs, lr=arguments.lr, batch_size=128,
        scales=arguments.scales, labels=arguments.labels, temperature=arguments.temperature,
        checkpoint=arguments.checkpoint, checkpoint_every=50 if arguments.checkpoint else 0,
        warmup=100,
    )  # fmt: skip
    clock = time.perf_counter()

    def report(epoch: int, loss: float, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal clock
        seconds = time.perf_counter() - clock
        top1 = accuracy(with_state(start, tensors), load, arguments.images)
        print(
            f"epoch {epoch:>3}        top-1 {top1:.2f} %   loss {loss:.4f}   {seconds:.0f} s",
            flush=True,
        )
        clock = time.perf_counter()

    data = training_data(load, arguments.parts, arguments.seed)
    found = train(start, data, options, seed=arguments.seed, after_epoch=report)
    top1 = accuracy(with_state(start, found), load, arguments.images)
    lost = reference - top1
    print(f"trained          top-1 {top1:.2f} %, {lost:.2f} points below float")
    return lost <= arguments.budget


if __name__ == "__main__":
    main()

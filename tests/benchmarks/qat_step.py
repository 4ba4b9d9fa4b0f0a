"""The time of a quantisation-aware training step over that of a float one, both eager.

    python tests/benchmarks/qat_step.py
    python tests/benchmarks/qat_step.py --models resnet20 --rounds 31 --threads 2

Both train the same program, batch norms folded, on the same batch towards the same labels with the
same optimiser; the quantised one has learned scales (LSQ) on every weight and activation that the
target quantises. Steps alternate; the figure is the ratio of the medians, in process time (CPU
seconds), which other work on the machine disturbs least. Both run as `fit` runs its steps, with
freed memory kept. Exits 1 where a ratio is above 1.6.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.data import Batch, TensorData
from pruna_ir.fit import decay_groups, freed_memory_kept
from pruna_ir.losses import LossOptions, Objective
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.learned_grids import LearnedGrids, Method
from pruna_ir.program import Program
from pruna_ir.training import trainable
from pruna_ir.transform import Context, apply

LIMIT = 1.6


class Block(nn.Module):
    """Two 3x3 convolutions and an identity, subsampled and zero-padded where sizes change."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.stride, self.more = (1 if before == channels else 2), channels - before
        self.conv1 = nn.Conv2d(before, channels, 3, self.stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
        return torch.relu(x + y)


def resnet20() -> nn.Module:
    """ResNet-20 for 32x32 images (He et al., 2016, section 4.2)."""
    sizes = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def resnet18() -> nn.Module:
    """torchvision's, with random weights."""
    from torchvision.models import resnet18 as make

    return make(num_classes=10)


def mobilenet_v2() -> nn.Module:
    """torchvision's, with random weights: depthwise convolutions, and little work a value."""
    from torchvision.models import mobilenet_v2 as make

    return make(num_classes=10, dropout=0.0)


@dataclass(frozen=True)
class Model:
    """A network and the batch that it is trained on."""

    make: Callable[[], nn.Module]
    batch: int
    size: int


MODELS = {
    "resnet20": Model(resnet20, 128, 32),
    "resnet18": Model(resnet18, 8, 112),
    "mobilenet_v2": Model(mobilenet_v2, 16, 96),
}


def stepper(program: Program, data: Batch, scales: Method | None) -> Callable[[], None]:
    """One step of training: forward, backward, optimiser."""
    module = trainable(program, train=False)
    groups = decay_groups([p for p in module.parameters() if p.requires_grad])
    parameters = [p for group in groups for p in group.parameters]
    grids = None if scales is None else LearnedGrids(program, module, scales)
    if grids is not None:
        parameters += grids.parameters
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
    objective = Objective(LossOptions(labels=1.0, logits=0.0), module)

    def step() -> None:
        optimizer.zero_grad()
        objective(data).mean().backward()
        optimizer.step()
        if grids is not None:
            grids.project()

    return step


def ratio(model: Model, target: str, scales: Method, rounds: int) -> tuple[float, float]:
    """Median CPU seconds of a float step and of a quantised one, interleaved."""
    torch.manual_seed(0)
    x = torch.randn(model.batch, 3, model.size, model.size)
    batch = Batch((x,), torch.arange(model.batch) % 10)
    program = capture(model.make().eval(), (x[:2],))
    program = apply(FoldBatchNorm(), apply(Canonicalize(), program).program).program
    context = Context(data=TensorData((x[:8],)))
    pass_ = InsertFakeQuant(target=target, ranges="minmax")
    quantised = apply(pass_, program, context).program
    steps = (stepper(program, batch, None), stepper(quantised, batch, scales))
    times: tuple[list[float], list[float]] = ([], [])
    with freed_memory_kept():
        for number in range(rounds + 2):
            for step, taken in zip(steps, times, strict=True):
                start = time.process_time()
                step()
                if number >= 2:
                    taken.append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18"],
                        choices=list(MODELS))  # fmt: skip
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--scales", default="lsq", choices=["lsq", "lsq+", "pact", "fixed"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fine = True
    for name in arguments.models:
        plain, quantised = ratio(
            MODELS[name], arguments.target, arguments.scales, arguments.rounds
        )
        found = quantised / plain
        fine &= found <= LIMIT
        print(
            f"{name:<14} batch {MODELS[name].batch:>3}   float {1e3 * plain:7.1f} ms   "
            f"{arguments.scales} {1e3 * quantised:7.1f} ms   {found:.2f}x "
            f"(at most {LIMIT}x)",
            flush=True,
        )
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()

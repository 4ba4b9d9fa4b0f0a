"""Train the digits network and write its weights.

    python examples/digits/train.py            # writes digits.safetensors beside this file

40 epochs of SGD with Nesterov momentum on the 1097 training images, cosine schedule with a short
warm-up, label smoothing 0.05; each image is shifted, turned, scaled and sheared a little every
time. Everything is seeded and runs on one thread, so that the same torch on the same kind of
processor writes the same bytes. The weights of the last epoch are kept: the validation images
only tell whether training went well, and the test images are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from model import WEIGHTS, DigitsNet, accuracy, test_set, training_set, validation_set
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

RATE, MOMENTUM, DECAY, SMOOTHING = 0.1, 0.9, 5e-4, 0.05
WARM_UP = 0.05
"""The share of the steps over which the rate rises from zero."""
TURN, SCALE, SHEAR, SHIFT = 0.2, 0.12, 0.15, 0.18
"""Largest rotation (radians), scaling, shear, and shift (1 is half an image: four pixels)."""


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image under an affine map of its own."""

    def drawn(limit: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    turn, scale, shear = drawn(TURN), 1 + drawn(SCALE), drawn(SHEAR)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack(
        [cos, shear - sin, drawn(SHIFT), sin, cos, drawn(SHIFT)], dim=1
    ).reshape(-1, 2, 3)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def fit(
    forward: Callable[[torch.Tensor], torch.Tensor],
    parameters: Iterable[torch.Tensor],
    epochs: int,
    *,
    peak: float = RATE,
    seed: int = 0,
) -> Iterator[float]:
    """Train the parameters behind ``forward`` (images to scores); yields each epoch's loss."""
    generator = torch.Generator().manual_seed(seed)
    data = training_set()
    images, labels, size = data.inputs[0], data.labels, data.batch_size
    assert labels is not None
    optimizer = torch.optim.SGD(
        parameters, lr=peak, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    loss_of = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    step, steps = 0, epochs * len(data)
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(size):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, steps)
            loss = loss_of(forward(augment(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(chosen)
            step += 1
        yield total / len(images)


def train(model: nn.Module, epochs: int, seed: int = 0) -> None:
    """Train a module in place, from the values that it has; it ends in eval mode."""
    model.train()
    for epoch, loss in enumerate(fit(model, model.parameters(), epochs, seed=seed), start=1):
        if epoch % 5 == 0 or epoch == epochs:
            right = accuracy(model.eval(), validation_set())
            print(f"epoch {epoch:3d}: loss {loss:.4f}, validation {right:.2%}", flush=True)
        model.train()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits network.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    # A network this small gains nothing from a second thread, and sums would change their order.
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = DigitsNet()
    train(model, options.epochs, options.seed)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, options.output)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, trained in {time.perf_counter() - start:.0f} s")
    print(f"test accuracy: {accuracy(model, test_set()):.2%}")
    print(f"weights: {options.output} ({options.output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()

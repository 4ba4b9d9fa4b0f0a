"""A small convolutional network for handwritten digits, trained, with its data.

The data are scikit-learn's digits: 1797 grey images of 8x8 pixels, values 0 to 16, ten classes
(the test part of the UCI "Optical Recognition of Handwritten Digits" set, E. Alpaydin and
C. Kaynak, 1998), written by thirteen people. They are split in the order of the file: the first
1097 images to train on, then 300 to validate, the last 400 to test on. Neighbours in the file
mostly come from one writer (who wrote which is not recorded), so that most of the test digits
are by strangers to the network; a shuffled split would flatter it. Calibration images are
training images.

``factory`` is what ``pruna-opt run examples/digits/model.py:factory`` calls. Run as a script, this
file writes the data as ``.npz`` files for ``pruna-opt``:

    python examples/digits/model.py build/digits

The network has one piece of each kind that the passes work on: a plain stem, two residual blocks
(one with a projection), a max pool, a MobileNet-like inverted residual with ReLU6, a
depthwise-separable convolution with hardswish, a global average pool and a linear classifier.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from pruna_ir import TensorData

WEIGHTS = Path(__file__).with_name("digits.safetensors")
CLASSES = 10
TRAINING, VALIDATION, TEST = 1097, 300, 400


class ConvNorm(nn.Sequential):
    """A convolution without bias, batch norm, and an activation unless it is None."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        activation: type[nn.Module] | None = nn.ReLU,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(
                inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([] if activation is None else [activation()]))


class Residual(nn.Module):
    """``relu(conv(conv(x)) + x)``; x goes through a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3)
        self.second = ConvNorm(outputs, outputs, 3, None)
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, None)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, inputs, h, w]
        y = self.second(self.first(x)) + self.shortcut(x)
        return self.activation(y)  # [n, outputs, h, w]


class InvertedResidual(nn.Module):
    """``x + project(depthwise(expand(x)))`` with ReLU6, as in MobileNetV2."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNorm(channels, wide, 1, nn.ReLU6)
        self.depthwise = ConvNorm(wide, wide, 3, nn.ReLU6, groups=wide)
        self.project = ConvNorm(wide, channels, 1, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, channels, h, w]
        return x + self.project(self.depthwise(self.expand(x)))


class DigitsNet(nn.Module):
    """Images [n, 1, 8, 8] in [0, 1] to class scores [n, 10]; 114,282 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(1, 32, 3),
            Residual(32, 32),
            Residual(32, 64),
            nn.MaxPool2d(2),
            InvertedResidual(64, 3),
            ConvNorm(64, 64, 3, nn.Hardswish, groups=64),
            ConvNorm(64, 128, 1, nn.Hardswish),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(128, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.features(image)).flatten(1)
        return self.classifier(self.dropout(x))


def factory() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The trained network in eval mode, and example inputs."""
    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    images, _ = _images()
    return model.eval(), (images[:8],)


@cache
def _images() -> tuple[torch.Tensor, torch.Tensor]:
    """Every image [1797, 1, 8, 8] in [0, 1] and label [1797], in the order of the file."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy((digits.images / 16).astype(np.float32))
    return images.unsqueeze(1), torch.from_numpy(digits.target.astype(np.int64))


def _part(start: int, count: int, batch_size: int) -> TensorData:
    images, labels = _images()
    part = slice(start, start + count)
    return TensorData((images[part],), labels[part], batch_size)


def training_set(batch_size: int = 50) -> TensorData:
    """The 1097 images to train on."""
    return _part(0, TRAINING, batch_size)


def validation_set(batch_size: int = 50) -> TensorData:
    """The 300 images to choose by."""
    return _part(TRAINING, VALIDATION, batch_size)


def test_set(batch_size: int = 50) -> TensorData:
    """The 400 images that nothing was trained, calibrated or chosen on."""
    return _part(TRAINING + VALIDATION, TEST, batch_size)


def calibration(batch_size: int = 32) -> TensorData:
    """Every fourth training image (275), to calibrate and rank channels with."""
    images, labels = _images()
    return TensorData((images[:TRAINING:4],), labels[:TRAINING:4], batch_size)


def accuracy(model: nn.Module, data: TensorData) -> float:
    """The share of images that a module in eval mode classifies right."""
    right = total = 0
    with torch.no_grad():
        for batch in data:
            assert batch.labels is not None
            right += int((model(*batch.inputs).argmax(1) == batch.labels).sum())
            total += len(batch.labels)
    return right / total


def export(folder: Path) -> dict[str, Path]:
    """Write ``calibration.npz`` and ``test.npz`` into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, data in (("calibration", calibration()), ("test", test_set())):
        assert data.labels is not None
        written[name] = folder / f"{name}.npz"
        np.savez(written[name], image=data.inputs[0].numpy(), labels=data.labels.numpy())
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the digits as .npz files for pruna-opt.")
    parser.add_argument("folder", type=Path, help="where calibration.npz and test.npz go")
    for path in export(parser.parse_args().folder).values():
        print(path)

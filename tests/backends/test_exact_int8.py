"""Scales that are powers of two: an int8 artifact computes torch's own bits, whatever runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.equivalence import run_float64
from pruna_ir.lowering import Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context

PIPELINE = (
    "canonicalize,fold-batch-norm,insert-fake-quant{scales=SCALES,samples=48},round-biases,"
    "eliminate-dead-code"
)


class Residual(nn.Module):
    """conv-norm-relu, a grouped and a depthwise convolution around a residual add, a pooled head.

    Input float32[batch, 3, 16, 16]; the pool averages 2**6 pixels, which is exact too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(16, 24, 1, stride=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.depthwise(torch.relu(self.grouped(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def quantised(target: str, scales: str) -> Program:
    torch.manual_seed(0)
    x = torch.randn(48, 3, 16, 16)
    program = capture(Residual().eval(), (x[:2],))
    context = Context(data=TensorData((x,), batch_size=16), target=target)
    return Pipeline.parse(PIPELINE.replace("SCALES", scales)).run(program, context).program


def differing(program: Program, target: str, folder: Path) -> tuple[int, int]:
    """How many scores of 300 images the artifact, and torch in float64, compute differently."""
    torch.manual_seed(1)
    x = torch.randn(300, 3, 16, 16)
    with torch.no_grad():
        own = program(x)[0]
    artifact = build(program, target, folder / "artifact")
    assert artifact.certificate.verdict is Verdict.PASSED
    found = torch.from_numpy(np.asarray(artifact.load().run([x.numpy()])[0]))
    exact = run_float64(program, (x,))[0]
    return int((found != own).sum()), int((exact != own.double()).sum())


@pytest.mark.parametrize("target", ["onnx", "openvino", "tvm"])
def test_every_bit_is_torchs_own(target: str, tmp_path: Path) -> None:
    assert differing(quantised(target, "powers-of-two"), target, tmp_path) == (0, 0)


def test_with_finer_scales_rounding_differs(tmp_path: Path) -> None:
    """The control: 300 images are enough to see bits differ."""
    found, exact = differing(quantised("onnx", "any"), "onnx", tmp_path)
    assert found > 0
    assert exact > 0

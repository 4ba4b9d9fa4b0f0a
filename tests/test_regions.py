"""Regions under no_grad or disabled autocast become part of the one graph."""

from __future__ import annotations

import pytest
import torch

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError


class Frozen(torch.nn.Module):
    """Two results of a region with a parameter; one region inside another."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x):
        with torch.no_grad():
            a = x * self.weight
            with torch.autocast("cpu", enabled=False):
                b = a.exp()
        return x + a * b, b


class Mixed(torch.nn.Module):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.matmul(x, x)


def test_a_region_is_written_out():
    model, x = Frozen(), torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -2.0]])
    program = capture(model, (x,))
    assert [str(n.target) for n in program.calls()] == [
        "aten.mul.Tensor", "aten.exp.default", "aten.mul.Tensor", "aten.add.Tensor",
    ]  # fmt: skip
    for found, expected in zip(program(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_autocast_is_refused_with_the_remedy():
    with pytest.raises(CaptureError, match=r"capture it without autocast .*test_regions.py"):
        capture(Mixed(), (torch.ones(3, 3),), dynamic_batch=False)

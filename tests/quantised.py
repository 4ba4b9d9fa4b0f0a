"""A small quantised network that several tests share, with its calibration written by hand."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.program import Program
from pruna_ir.quantization import (
    S8_WEIGHT,
    U8_ASYMMETRIC,
    Grid,
    QuantParameters,
    choose_parameters,
    fake_quant_op,
)


class QuantisedNet(nn.Module):
    """conv, relu, conv, mean, linear, every operand on its grid; input float32[batch, 3, 9, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(6, 5)
        self._grids: dict[str, QuantParameters] = {}
        for layer in ("first", "second", "head"):
            weight = getattr(self, layer).weight.detach()
            limit = weight.flatten(1).abs().amax(1)
            self._calibrate(f"{layer}_w", -limit, limit, S8_WEIGHT, 0)
        for name, low, high in (("x", -3.0, 3.0), ("a", 0.0, 2.0), ("b", -1.0, 1.0)):
            self._calibrate(name, low, high, U8_ASYMMETRIC, None)

    def _calibrate(
        self,
        name: str,
        low: float | torch.Tensor,
        high: float | torch.Tensor,
        grid: Grid,
        axis: int | None,
    ) -> None:
        chosen = choose_parameters(low, high, grid, name, axis)
        self.register_buffer(f"{name}_scale", chosen.scale)
        self.register_buffer(f"{name}_zero", chosen.zero_point)
        self._grids[name] = chosen

    def _round(self, name: str, value: torch.Tensor) -> torch.Tensor:
        chosen = self._grids[name]
        scale, zero = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
        return fake_quant_op()(value, scale, zero, chosen.axis, chosen.grid.qmin, chosen.grid.qmax)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._round("x", x)
        first = self._round("first_w", self.first.weight)
        x = torch.relu(torch.conv2d(x, first, self.first.bias, padding=1))
        x = self._round("a", x)
        second = self._round("second_w", self.second.weight)
        x = torch.conv2d(x, second, self.second.bias, stride=2, groups=2)
        x = self._round("b", x).mean((2, 3))
        head = self._round("head_w", self.head.weight)
        return nn.functional.linear(self._round("b", x), head, self.head.bias)


def quantised_net() -> Program:
    """The captured `QuantisedNet`, seeded."""
    torch.manual_seed(0)
    return capture(QuantisedNet().eval(), (torch.randn(4, 3, 9, 9),))

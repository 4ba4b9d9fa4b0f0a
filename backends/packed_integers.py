"""Packed layers whose operands are fake-quantised run on integers.

    fake_quant(act(conv2d(fake_quant(x), fake_quant(W), b) + fake_quant(r)))
      -->
    qconv(qx, qW, b, + qr, act)          uint8 -> uint8

Input and residual are on grids of at most 8 bits with one scale; the weight on a symmetric one
with a scale for each output. A result that is rounded to a whole 8-bit grid, behind an activation
that oneDNN has, never leaves the integers; any other leaves the layer in float32.

Limits: NaN has no integer: it becomes some number of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import pruna_ir.kernels.fake_quant
from pruna_ir.call import bind_arguments
from pruna_ir.kernels.onednn_integers import NOTHING, Levels, PostOp, lacking_integers

aten = torch.ops.aten
FAKE_QUANT = pruna_ir.kernels.fake_quant.KERNEL.op


@dataclass(frozen=True)
class Grid8:
    """A fake-quant with one scale, its values stored as uint8 from ``low`` to ``high``."""

    node: fx.Node
    source: fx.Node
    levels: Levels
    low: int
    high: int

    @property
    def whole(self) -> bool:
        """Whether every uint8 is a value of the grid."""
        return (self.low, self.high) == (0, 255)


@dataclass(frozen=True)
class Integers:
    """What a layer needs to run on integers.

    Attributes:
        source: the grid of its input.
        weight: int8, [out, ...].
        scale: float32 [out], of the weight.
        residual: the grid of what is added; None where nothing is, or it is added in float32.
        out: the grid of the result; None for float32.
        post_op: the activation, where the result is on a grid.
    """

    source: Grid8
    weight: torch.Tensor
    scale: torch.Tensor
    residual: Grid8 | None = None
    out: Grid8 | None = None
    post_op: PostOp = NOTHING


Constants = Mapping[fx.Node, torch.Tensor]


def grid_of(node: fx.Node, constants: Constants) -> Grid8 | None:
    """The grid that a node rounds to; None where it is no fake-quant that fits into uint8."""
    if node.target is not FAKE_QUANT or node in constants:
        return None
    bound = bind_arguments(node)
    scale, zero = (constants.get(bound[name]) for name in ("scale", "zero_point"))
    if bound["axis"] is not None or scale is None or zero is None or scale.numel() != 1:
        return None
    # Signed grids are stored 128 higher.
    shift = 128 if bound["qmin"] < 0 else 0
    low, high = bound["qmin"] + shift, bound["qmax"] + shift
    if low < 0 or high > 255 or node.meta["val"].dtype != torch.float32:
        return None
    return Grid8(node, bound["x"], Levels(float(scale), int(zero) + shift), low, high)


def integer_weight(
    node: fx.Node, constants: Constants, *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A weight's int8 levels, outputs first, and each output's scale; None where it has none."""
    if node.target is not FAKE_QUANT or node not in constants:
        return None
    bound = bind_arguments(node)
    scale, zero = (constants.get(bound[name]) for name in ("scale", "zero_point"))
    if scale is None or zero is None or bool(zero.any()):
        return None
    if bound["qmin"] < -128 or bound["qmax"] > 127:
        return None
    weight = constants[node]
    weight = weight.t() if transposed else weight
    axis = bound["axis"]
    if axis is None:
        scale = scale.expand(len(weight))
    elif axis % weight.dim() != (1 if transposed else 0):
        return None
    scale = scale.float().contiguous()
    steps = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight / steps).to(torch.int8).contiguous(), scale


def post_op(activation: fx.Node | None, *, linear: bool) -> PostOp | None:
    """An activation in oneDNN's words; None where it has none for integer layers."""
    if activation is None:
        return NOTHING
    if activation.target in _POST_OPS:
        return _POST_OPS[activation.target]
    bound = bind_arguments(activation)
    if activation.target is aten.hardtanh.default:
        return PostOp("hardtanh", (float(bound["min_val"]), float(bound["max_val"])))
    if activation.target is aten.gelu.default and linear:
        return PostOp("gelu", (), str(bound["approximate"]))
    return None


_POST_OPS: Mapping[Any, PostOp] = {
    aten.relu.default: PostOp("relu"),
    aten.relu6.default: PostOp("hardtanh", (0.0, 6.0)),
    aten.silu.default: PostOp("swish"),
    aten.hardswish.default: PostOp("hardswish"),
}


def usable() -> bool:
    """Whether integer layers run here."""
    return not lacking_integers()

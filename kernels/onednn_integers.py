"""oneDNN's integer layers through torch: uint8 in, int8 weights, uint8 or float32 out.

    acc = sum over (qx - x_zero) * qw                              exact, in int32
    y   = act(acc * x_scale * w_scale + bias [+ (accum - accum_zero) * accum_scale])   in float32
    qy  = clamp(round(y / scale) + zero, 0, 255)                   where the result is uint8

That is what the layer computes on fake-quantised operands, up to the rounding of float32.
``accum`` is overwritten. Signed grids are stored as uint8 too, 128 higher.

Limits: processors with VNNI; older ones add products in 16 bits, which overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pruna_ir.kernels.onednn import Geometry


@dataclass(frozen=True)
class Levels:
    """The real numbers that uint8 levels stand for: ``(level - zero) * scale``."""

    scale: float
    zero: int


@dataclass(frozen=True)
class PostOp:
    """An activation that is computed with the result, in oneDNN's words."""

    name: str = "none"
    numbers: tuple[float, ...] = ()
    algorithm: str = ""


NOTHING = PostOp()
"""No activation."""


def lacking_integers() -> str:
    """Why there are no integer layers here; empty where there are."""
    if not torch._C._has_mkldnn:
        return "torch was built without oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "the processor has no VNNI"
    return ""


def pack_integer_convolution(
    weight: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    geometry: Geometry,
    input_shape: list[int],
) -> torch.Tensor:
    """A convolution's int8 weight [out, in / groups, height, width] in oneDNN's layout.

    Args:
        weight: int8.
        scale: float32 [out].
        levels: of the input.
        geometry: of the convolution.
        input_shape: [batch, in, height, width].
    """
    packed: torch.Tensor = torch.ops.onednn.qconv_prepack(
        weight, scale, levels.scale, levels.zero, list(geometry.stride), list(geometry.padding),
        list(geometry.dilation), geometry.groups, input_shape,
    )  # fmt: skip
    return packed


def pack_integer_linear(weight: torch.Tensor) -> torch.Tensor:
    """The int8 weight [out, in] of a linear layer in oneDNN's layout."""
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def integer_convolution_call(
    x: Any,
    levels: Levels,
    weight: tuple[Any, Any, Any],
    bias: Any,
    geometry: Geometry,
    *,
    out: Levels | None = None,
    post_op: PostOp = NOTHING,
    accum: tuple[Any, Levels] | None = None,
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The operator and arguments of an integer convolution, for tensors or nodes of a graph.

    Args:
        x: uint8 [batch, in, height, width].
        levels: of ``x``.
        weight: packed, its scales float32 [out], its zero points int32 [out].
        bias: float32 [out] or None.
        geometry: of the convolution.
        out: of the result; None for float32.
        post_op: the activation; relu, hardtanh, swish, hardswish or none.
        accum: uint8, channels-last, of the result's shape, which is added and overwritten; only
            where ``out`` is given.
    """
    scale, zero, dtype = _result(out)
    lists = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    shared = (bias, *lists, geometry.groups, scale, zero, dtype)
    source = (x, levels.scale, levels.zero, *weight)
    operator = torch.ops.onednn.qconv2d_pointwise
    last = (post_op.name, list(post_op.numbers), post_op.algorithm)
    if accum is None:
        return operator.default, (*source, *shared, *last)
    added, of_added = accum
    return operator.binary, (
        *source, added, *shared, of_added.scale, of_added.zero, "sum", 1.0, *last,
    )  # fmt: skip


def integer_linear_call(
    x: Any,
    levels: Levels,
    weight: tuple[Any, Any, Any],
    bias: Any,
    *,
    out: Levels | None = None,
    post_op: PostOp = NOTHING,
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The operator and arguments of an integer linear layer, for tensors or nodes of a graph.

    Args:
        x: uint8 [..., in].
        levels: of ``x``.
        weight: packed, its scales float32 [out], its zero points int32 [out].
        bias: float32 [out] or None.
        out: of the result; None for float32.
        post_op: the activation; relu, hardtanh, swish, hardswish, gelu or none.
    """
    return torch.ops.onednn.qlinear_pointwise.default, (
        x, levels.scale, levels.zero, *weight, bias, *_result(out), post_op.name,
        list(post_op.numbers), post_op.algorithm,
    )  # fmt: skip


def _result(out: Levels | None) -> tuple[float, int, torch.dtype]:
    return (1.0, 0, torch.float32) if out is None else (out.scale, out.zero, torch.uint8)

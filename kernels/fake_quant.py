"""Fake quantisation: round a float tensor onto an integer grid and come back to float.

    y = (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale

``round`` goes half to even, as ONNX's QuantizeLinear does. ``scale`` is a float tensor, [] where
``axis`` is None or [C] (one per index of ``axis``), stored in float32. ``zero_point`` has the same
shape and is int32, whatever the grid: lifting a program to float64 then leaves it alone, it
exports as a plain integer constant, and a backend casts it to the type that the grid needs.

Run in float64, the operator is the exact quantise-dequantise interpreter that int8 kernels are
compared with. float16 and bfloat16 inputs are computed in float32, since their own division would
miss the grid, and the result is rounded to the input's dtype.

Gradients are those of learned step size quantisation (Esser et al., ICLR 2020, equations 3 and 5)
with a zero point, and without the paper's gradient scale, which belongs to the training loop. With
v = x / scale, n = qmin - zero_point and p = qmax - zero_point:

    dy/dx     = 1 where n < v < p, else 0
    dy/dscale = round(v) - v where n < v < p; n where v <= n; p where v >= p

NaN stays NaN; infinities saturate. A scale must be positive: whoever makes one sees to that.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels.kernel import Kernel

_aten = torch.ops.aten
_REDUCED = (torch.float16, torch.bfloat16)


_SCHEMA = "(Tensor x, Tensor scale, Tensor zero_point, int? axis, int qmin, int qmax) -> Tensor"


@torch.library.custom_op("pruna::fake_quant", mutates_args=(), schema=_SCHEMA)
def fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    """Quantise ``x`` to the integers ``[qmin, qmax]`` and dequantise it again.

    Args:
        x: float tensor of any shape.
        scale: positive float tensor, [] or [x.shape[axis]].
        zero_point: int32 tensor of ``scale``'s shape, inside ``[qmin, qmax]``.
        axis: the dimension that ``scale`` runs along; None where it is a scalar.
        qmin: the smallest integer of the grid.
        qmax: the largest integer of the grid.

    Returns:
        A tensor of ``x``'s shape and dtype.

    >>> half = torch.tensor(0.5)
    >>> fake_quant(torch.tensor([0.2, 0.25, 0.75, 9.0]), half, torch.tensor(0), None, -4, 3)
    tensor([0.0000, 0.0000, 1.0000, 1.5000])
    """
    _check(x, scale, zero_point, axis, qmin, qmax)
    step, zero = _along(scale, axis, x), _along(zero_point, axis, x)
    work = x.to(step.dtype)
    levels = (work / step).round_().add_(zero).clamp_(qmin, qmax)
    return levels.sub_(zero).mul_(step).to(x.dtype)


def _check(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
) -> None:
    torch._check(x.is_floating_point(), lambda: f"fake_quant takes a float tensor, not {x.dtype}")
    torch._check(qmin < qmax, lambda: f"fake_quant needs qmin < qmax, not {qmin} and {qmax}")
    torch._check(
        scale.shape == zero_point.shape,
        lambda: f"fake_quant: scale {list(scale.shape)}, zero_point {list(zero_point.shape)}",
    )
    if axis is None:
        torch._check(
            scale.dim() == 0, lambda: f"fake_quant without axis: scale is {list(scale.shape)}"
        )
        return
    torch._check(
        -x.dim() <= axis < x.dim(), lambda: f"fake_quant: axis {axis} of a {x.dim()}-d tensor"
    )
    torch._check(
        scale.dim() == 1 and scale.shape[0] == x.shape[axis],
        lambda: f"fake_quant along axis {axis} of {list(x.shape)}: scale is {list(scale.shape)}",
    )


def _along(parameter: torch.Tensor, axis: int | None, x: torch.Tensor) -> torch.Tensor:
    """A parameter shaped to broadcast along ``axis`` of ``x``, in the dtype of the arithmetic."""
    dtype = torch.float32 if x.dtype in _REDUCED else x.dtype
    parameter = parameter.to(dtype)
    if axis is None:
        return parameter
    return parameter.reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))


@fake_quant.register_fake
def _(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
) -> torch.Tensor:
    _check(x, scale, zero_point, axis, qmin, qmax)
    return torch.empty_like(x)


def fake_quant_reference(
    x: Any, scale: Any, zero_point: Any, axis: int | None, qmin: int, qmax: int
) -> Any:
    """The operator's meaning in ATen operators, for float32 and float64.

    The axis is moved to the end, where [C] broadcasts whatever the rank of ``x``.
    """
    moved = x if axis is None else _aten.transpose.int(x, axis, -1)
    levels = _aten.add.Tensor(_aten.round.default(_aten.div.Tensor(moved, scale)), zero_point)
    bounded = _aten.sub.Tensor(_aten.clamp.default(levels, qmin, qmax), zero_point)
    y = _aten.mul.Tensor(bounded, scale)
    return y if axis is None else _aten.transpose.int(y, axis, -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    x, scale, zero_point, axis, qmin, qmax = inputs
    ctx.save_for_backward(x, scale, zero_point)
    ctx.axis, ctx.qmin, ctx.qmax = axis, qmin, qmax


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    step, zero = _along(scale, ctx.axis, x), _along(zero_point, ctx.axis, x)
    v = x.to(step.dtype) / step
    low, high = ctx.qmin - zero, ctx.qmax - zero
    inside = (v > low) & (v < high)
    to_x = grad * inside if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return to_x, None, None, None, None, None
    slope = torch.where(inside, v.round() - v, torch.where(v >= high, high, low))
    to_scale = (grad.to(slope.dtype) * slope).to(scale.dtype)
    if ctx.axis is None:
        to_scale = to_scale.sum()
    else:
        kept = ctx.axis % x.dim()
        others = [axis for axis in range(x.dim()) if axis != kept]
        to_scale = to_scale.sum(others) if others else to_scale
    return to_x, to_scale, None, None, None, None


torch.library.register_autograd("pruna::fake_quant", _gradients, setup_context=_save)

KERNEL = Kernel(torch.ops.pruna.fake_quant.default, fake_quant_reference, primitive=True)

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

Both are computed without v, from x and the result y, which a layer behind keeps anyway:

    dy/dscale = (y - x * dy/dx) / scale

One scale over a dense tensor on the CPU goes through in chunks that stay in cache, with the
clamps' edges moved from v to x once, exactly; the result is the same to the last bit.

NaN stays NaN; infinities saturate. A scale must be positive: whoever makes one sees to that.
"""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import torch

from pruna_ir.kernels.dense_pieces import channel_pieces, chunks, is_dense
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
    return fake_quantised(x, scale, zero_point, axis, qmin, qmax)


def fake_quantised(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    cap: float | None = None,
    centred: bool | None = None,
) -> torch.Tensor:
    """What `fake_quant` computes, without its checks, its dispatch and its gradients.

    With a cap: of ``clamp(x, max=cap)``. As rounding is monotone, that is a clamp of levels.
    ``centred`` says whether all zero points are known to be 0, or not all; None looks.
    """
    if axis is None and is_dense(x):
        return _whole_tensor(x, scale, zero_point, qmin, qmax, cap)
    x = x if cap is None else x.clamp(max=cap)
    step = _along(scale, axis, x)
    if axis is not None and is_dense(x) and is_centred(zero_point, centred):
        y, nothing = torch.empty_like(x), x.new_zeros(())
        for source, levels, own in channel_pieces(axis, x, y, step):
            torch.div(source, own, out=levels)
            levels.round_().clamp_(qmin, qmax)
            # Added to 0, since a product of -0.0 must become 0.0, as below.
            torch.addcmul(nothing, levels, own, out=levels)
        return y
    zero = _along(zero_point, axis, x)
    work = x.to(step.dtype)
    levels = (work / step).round_().add_(zero).clamp_(qmin, qmax)
    return levels.sub_(zero).mul_(step).to(x.dtype)


def is_centred(zero_point: torch.Tensor, known: bool | None = None) -> bool:
    """Whether all zero points are 0."""
    return not zero_point.any() if known is None else known


def _whole_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int,
    cap: float | None,
) -> torch.Tensor:  # fmt: skip
    """The operator for one scale, chunk by chunk; the same to the last bit.

    Levels count from the zero point, which moves the clamp instead of them. A product added to 0
    turns -0.0 into 0.0, as adding and subtracting the zero point does.
    """
    step, zero = scale.to(x.dtype), int(zero_point)
    factor, nothing = float(step), x.new_zeros(())
    y = torch.empty_like(x)
    low, high = float(qmin - zero), float(qmax - zero)
    if cap is not None:
        high = min(high, float(torch.div(x.new_tensor(cap), step).round_()))
    for source, levels in chunks(x, y):
        torch.div(source, step, out=levels)
        levels.round_().clamp_(low, high)
        torch.add(nothing, levels, alpha=factor, out=levels)
    return y


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point, axis, qmin, qmax = inputs
    ctx.save_for_backward(x, output, scale, zero_point)
    ctx.axis, ctx.qmin, ctx.qmax = axis, qmin, qmax


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, y, scale, zero_point = ctx.saved_tensors
    to_x, to_scale = fake_quant_gradients(
        grad, x, y, scale, zero_point, ctx.axis, ctx.qmin, ctx.qmax,
        wanted=(ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
    )  # fmt: skip
    return to_x, to_scale, None, None, None, None


def fake_quant_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    *,
    wanted: tuple[bool, bool] = (True, True),
    rounding: bool = True,
    cap: float | None = None,
    centred: bool | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients with respect to ``x`` and ``scale``.

    Args:
        grad: the gradient with respect to the result.
        x: the operand, as the other arguments.
        y: the result.
        scale: see `fake_quant`.
        zero_point: likewise.
        axis: likewise.
        qmin: likewise.
        qmax: likewise.
        wanted: which of the two are needed; the other is None.
        rounding: count what rounding does to the scale's gradient, round(v) - v inside of the
            grid; without it only values outside count, as if 0 stood there.
        cap: those of ``fake_quant(clamp(x, max=cap))``, of which ``y`` is the result; with one,
            rounding counts.
        centred: whether all zero points are known to be 0, or not all; None looks.
    """
    fast = not torch.is_grad_enabled() and is_dense(x, y, grad)
    if fast and axis is None:
        return _whole_gradients(
            grad, x, y, scale, zero_point, qmin, qmax, wanted, rounding, cap
        )
    if cap is not None:
        to_x, to_scale = fake_quant_gradients(
            grad, x.clamp(max=cap), y, scale, zero_point, axis, qmin, qmax, wanted=wanted
        )
        return None if to_x is None else to_x.masked_fill(x >= cap, 0.0), to_scale
    if fast and axis is not None and is_centred(zero_point, centred):
        return _weight_gradients(grad, x, y, scale, axis, qmin, qmax, wanted, rounding)
    step, zero = _along(scale, axis, x), _along(zero_point, axis, x)
    v = x.to(step.dtype) / step
    low, high = qmin - zero, qmax - zero
    outside = (v <= low) | (v >= high)
    to_x = grad.masked_fill(outside, 0.0) if wanted[0] else None
    if not wanted[1]:
        return to_x, None
    levels = v.round().clamp_(low, high)
    slope = levels - (v if rounding else levels).masked_fill(outside, 0.0)
    return to_x, _summed(slope * grad.to(step.dtype), axis).to(scale.dtype)


def _summed(product: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The sum over all dimensions but one."""
    if axis is None:
        return product.sum()
    others = [dim for dim in range(product.dim()) if dim != axis % product.dim()]
    return product.sum(others) if others else product


def _weight_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    axis: int,
    qmin: int,
    qmax: int,
    wanted: tuple[bool, bool],
    rounding: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients where no zero point differs from 0, in few passes over the values.

    hardtanh's gradient is the mask between two edges; the slope is counted in units of y, and
    divided by the scale once it is summed.
    """
    between = _aten.hardtanh_backward.grad_input
    to_x = torch.empty_like(x) if wanted[0] else None
    step, sums = _along(scale, axis, x), []
    out = y if to_x is None else to_x
    for value, result, g, own, piece in channel_pieces(axis, x, y, grad, step, out):
        v = value / own
        if to_x is not None:
            between(g, v, qmin, qmax, grad_input=piece)
        if wanted[1]:
            between(value if rounding else result, v, qmin, qmax, grad_input=v)
            torch.sub(result, v, out=v).mul_(g)
            sums.append(_summed(v, axis))
    return to_x, torch.cat(sums).to(scale.dtype) / scale if wanted[1] else None


def _whole_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    qmin: int,
    qmax: int,
    wanted: tuple[bool, bool],
    rounding: bool,
    cap: float | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients for one scale, chunk by chunk; hardtanh's is the mask between two edges.

    Where the cap lies inside of the grid, what it takes away is not the grid's: x is capped.
    """
    step, zero = float(scale), int(zero_point)
    low, high = _edge(step, qmin - zero, x.dtype), _edge(step, qmax - zero, x.dtype)
    capped = cap is not None and cap < high
    last = cap if cap is not None and capped else high
    between = _aten.hardtanh_backward.grad_input
    to_x = torch.empty_like(x) if wanted[0] else None
    pieces = list(chunks(grad, x, y, y if to_x is None else to_x))
    room, total = torch.empty_like(pieces[0][0]), 0.0
    for g, value, result, out in pieces:
        if to_x is not None:
            between(g, value, low, last, grad_input=out)
        if wanted[1]:
            slope = room[: len(g)]
            inside = torch.clamp(value, max=last, out=slope) if capped else value
            between(inside if rounding else result, inside, low, high, grad_input=slope)
            torch.sub(result, slope, out=slope)
            total += float(torch.dot(g, slope))
    to_scale = scale.new_tensor(total / step) if wanted[1] else None
    return to_x, to_scale


def _edge(step: float, level: int, dtype: torch.dtype) -> float:
    """The value nearest to 0 whose quotient by ``step``, as it is rounded, reaches a level.

    It is within a few units in the last place of their product. A quotient of two float32 numbers
    may be rounded to float64 on the way: that changes nothing.
    """
    if level == 0:
        return 0.0
    single = dtype is torch.float32

    def rounded(x: float) -> float:
        return ctypes.c_float(x).value if single else x

    def reaches(x: float) -> bool:
        return abs(rounded(x / step)) >= abs(level)

    edge = rounded(level * step)
    while math.isfinite(edge) and not reaches(edge):
        edge = _next(edge, math.copysign(math.inf, edge), single=single)
    while math.isfinite(edge) and reaches(nearer := _next(edge, 0.0, single=single)):
        edge = nearer
    return edge


def _next(x: float, towards: float, *, single: bool) -> float:
    """The next number of the precision from ``x``, which is not 0."""
    if not single:
        return math.nextafter(x, towards)
    bits: int = struct.unpack("<i", struct.pack("<f", x))[0]
    bits += 1 if abs(towards) > abs(x) else -1
    found: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return found


torch.library.register_autograd("pruna::fake_quant", _gradients, setup_context=_save)

KERNEL = Kernel(torch.ops.pruna.fake_quant.default, fake_quant_reference, primitive=True)

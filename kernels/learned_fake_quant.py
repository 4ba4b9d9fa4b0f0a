"""fake_quant with more that can be learned: a zero point, or the clipping alone.

The result is always `fake_quant`'s, bit for bit; only gradients are added. It is called directly,
not through the dispatcher, which saves a training loop tens of microseconds a call.

    offset    LSQ+ (Bhalgat et al., CVPR-W 2020, section 3.1) learns a real offset b in
              (x - b) / scale. Here zero_point = clamp(round(-b / scale), qmin, qmax), rounded with
              a straight-through gradient, so that b always stands on the grid and 0 is exact:

                  dy/dzero_point = -scale where x is clipped, else 0

    clipping  PACT (Choi et al., 2018, section 3) learns the bound a = scale * level alone:

                  dy/da = 1 where x is clipped, else 0

              that is fake_quant's gradient of the scale without its rounding term.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels.fake_quant import fake_quant_gradients, fake_quantised, is_centred


def zero_point_of(
    scale: torch.Tensor, offset: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    """The int32 zero point that stands for an offset: the integer nearest to -offset / scale.

    >>> zero_point_of(torch.tensor(0.5), torch.tensor(-1.3), 0, 15)
    tensor(3, dtype=torch.int32)
    """
    return (-offset / scale).detach().round().clamp(qmin, qmax).to(torch.int32)


def learned_fake_quant(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    axis: int | None,
    qmin: int,
    qmax: int,
    *,
    offset: torch.Tensor | None = None,
    rounding: bool = True,
    cap: float | None = None,
) -> torch.Tensor:
    """`fake_quant`, differentiable in x, scale and, where it is given, an offset.

    Args:
        x: see `fake_quant`.
        scale: likewise.
        zero_point: likewise; an offset takes its place.
        axis: likewise.
        qmin: likewise.
        qmax: likewise.
        offset: float tensor of ``scale``'s shape: the real number that ``zero_point`` shifts by,
            ``-zero_point * scale``.
        rounding: whether the rounding of values inside of the grid adds to the scale's gradient.
        cap: quantise ``clamp(x, max=cap)``, in passes over x that are made anyway; with rounding
            and without an offset only.

    >>> x = torch.tensor([0.2, 9.0])
    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> y = learned_fake_quant(x, step, torch.tensor(0), None, 0, 3, rounding=False)
    >>> y.sum().backward()
    >>> y.tolist(), float(step.grad)
    ([0.0, 1.5], 3.0)
    """
    assert cap is None or (offset is None and rounding)
    shift = None
    if offset is not None:
        zero_point = zero_point_of(scale, offset, qmin, qmax)
        shift = -offset / scale
    y: torch.Tensor = _Learned.apply(
        x, scale, shift, zero_point, axis, qmin, qmax, rounding, cap
    )
    return y


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor | None,  # noqa: ARG004  # it is what the zero point was rounded from
        zero_point: torch.Tensor,
        axis: int | None,
        qmin: int,
        qmax: int,
        rounding: bool,
        cap: float | None,
    ) -> torch.Tensor:
        # Looking takes longer than quantising a small weight.
        ctx.centred = axis is not None and is_centred(zero_point)
        y = fake_quantised(x, scale, zero_point, axis, qmin, qmax, cap, ctx.centred)
        ctx.save_for_backward(x, y, scale, zero_point)
        ctx.axis, ctx.qmin, ctx.qmax, ctx.rounding, ctx.cap = axis, qmin, qmax, rounding, cap
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, y, scale, zero_point = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1])
        to_x, to_scale = fake_quant_gradients(
            grad, x, y, scale, zero_point, ctx.axis, ctx.qmin, ctx.qmax,
            wanted=wanted, rounding=ctx.rounding, cap=ctx.cap,
            centred=ctx.centred,
        )  # fmt: skip
        to_shift = None
        if ctx.needs_input_grad[2] and to_x is not None:
            kept = [] if ctx.axis is None else [ctx.axis % x.dim()]
            others = [dim for dim in range(x.dim()) if dim not in kept]
            clipped = grad - to_x
            to_shift = -scale * (clipped.sum(others) if others else clipped).to(scale.dtype)
        return to_x, to_scale, to_shift, None, None, None, None, None, None

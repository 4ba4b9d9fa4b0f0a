"""A convolution with its epilogue in Triton, as an implicit matrix product.

    y[p, o] = act(sum over taps t and channels c of x[pixel(p, t), c] * weight[o, c, t] + bias[o]
                  + residual[p, o])                     or + residual[p, o] after act

Rows are the output's pixels of all images, columns its channels. No patches are written out: each
tile computes where its pixels read the input, tap by tap, and what lies in the padding is zero.
Tensors are read in whatever strides they have; channels-last ones give the widest loads.

Limits: one or two spatial dimensions, one group. float32 factors are multiplied in TF32 where
``torch.backends.cudnn.allow_tf32`` says so, as cuDNN does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pruna_ir.kernels import triton_code
from pruna_ir.kernels.triton_code import DTYPES, jit, language

tl: Any = None
activate: Any = None


def applies(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    groups: int,
) -> bool:
    """Whether the kernel takes this convolution: its rank, its groups, one fitting GPU."""
    dtypes = {t.dtype for t in (x, weight, bias, residual) if t is not None}
    return (
        groups == 1
        and x.dim() in (3, 4)
        and len(dtypes) == 1
        and dtypes <= set(DTYPES)
        and triton_code.runs_on(x, weight, bias, residual)
    )


def conv_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    activation_args: list[float],
    *,
    residual_last: bool = False,
) -> torch.Tensor:
    """``pruna::conv_act`` with one group; shapes and dtypes as there, all of one dtype.

    Raises:
        RuntimeError: the channels of x and weight differ, the kernel is larger than the input, or
            the residual has another shape than the result.
    """
    if x.dim() == 3:
        residual = None if residual is None else residual.unsqueeze(2)
        y = conv_act(
            x.unsqueeze(2), weight.unsqueeze(2), bias, residual, [1, *stride], [0, *padding],
            [1, *dilation], activation, activation_args, residual_last=residual_last,
        )  # fmt: skip
        return y.squeeze(2)
    sizes = _output(x, weight, stride, padding, dilation)
    torch._check(
        residual is None or list(residual.shape) == sizes,
        lambda: f"conv_act: residual is {list(residual.shape)}, the result {sizes}",  # type: ignore[union-attr]
    )
    y = torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=_format(x, weight))
    name, a, b = _named(activation, activation_args)
    pixels, channels = sizes[0] * sizes[2] * sizes[3], sizes[1]
    row, column = triton_code.tiles(pixels, channels, x.device)
    grid = (-(-pixels // row) * -(-channels // column),)
    other = x if residual is None else residual
    _kernel()[grid](
        x, weight, x if bias is None else bias.contiguous(), other, y,
        pixels, channels, x.shape[1], x.shape[2], x.shape[3], sizes[2], sizes[3],
        *x.stride(), *weight.stride(), *other.stride(), *y.stride(), a, b,
        TAPS_H=weight.shape[2], TAPS_W=weight.shape[3],
        STRIDE_H=stride[0], STRIDE_W=stride[1], PADDING_H=padding[0], PADDING_W=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1],
        ACTIVATION=name, BIASED=bias is not None, RESIDUAL=residual is not None,
        LAST=residual_last,
        PRECISION=triton_code.precision(x.dtype, convolution=True),
        ROWS=row, COLUMNS=column, DEPTH=32, num_warps=8 if row * column >= 128 * 128 else 4,
    )  # fmt: skip
    return y


def _output(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    """[batch, channels, height, width] of the result."""
    torch._check(
        x.shape[1] == weight.shape[1],
        lambda: f"conv_act: x is {list(x.shape)} and weight is {list(weight.shape)}",
    )
    spatial = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1)
        // stride[d] + 1
        for d in range(2)
    ]  # fmt: skip
    torch._check(
        min(spatial) > 0, lambda: f"conv_act: the kernel is larger than the input {list(x.shape)}"
    )
    return [x.shape[0], weight.shape[0], *spatial]


def _format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The layout that torch's convolution gives its result."""
    last = any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (x, weight)
    )
    return torch.channels_last if last else torch.contiguous_format


def _named(activation: str, args: list[float]) -> tuple[str, float, float]:
    """The kernel's name of an activation, and its two numbers."""
    if activation == "relu6":
        return "hardtanh", 0.0, 6.0
    a, b = (*args, 0.0, 0.0)[:2]
    return activation, float(a), float(b)


@cache
def _kernel() -> Any:
    global tl, activate
    tl = language()
    activate = triton_code.activation()

    @jit()
    def conv_act_kernel(  # type: ignore[no-untyped-def]
        x, weight, bias, residual, y,
        pixels, channels, depth, height, width, out_height, out_width,
        xb, xc, xh, xw, wo, wc, wh, ww, rb, rc, rh, rw, yb, yc, yh, yw, a, b,
        TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, STRIDE_H: tl.constexpr,
        STRIDE_W: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
        DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ACTIVATION: tl.constexpr,
        BIASED: tl.constexpr, RESIDUAL: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(channels, COLUMNS)
        p = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
        o = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        image = (p // (out_height * out_width)).to(tl.int64)
        i = p // out_width % out_height
        j = p % out_width
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tap in range(TAPS_H * TAPS_W):
            h = i * STRIDE_H - PADDING_H + tap // TAPS_W * DILATION_H
            w = j * STRIDE_W - PADDING_W + tap % TAPS_W * DILATION_W
            inside = (p < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            x_pixels = x + image * xb + h * xh + w * xw
            w_tap = weight + o * wo + tap // TAPS_W * wh + tap % TAPS_W * ww
            for start in range(0, depth, DEPTH):
                c = start + tl.arange(0, DEPTH)
                left = tl.load(
                    x_pixels[:, None] + (c * xc)[None, :],
                    mask=inside[:, None] & (c < depth)[None, :], other=0.0,
                )  # fmt: skip
                right = tl.load(
                    w_tap[None, :] + (c * wc)[:, None],
                    mask=(o < channels)[None, :] & (c < depth)[:, None], other=0.0,
                )  # fmt: skip
                total = tl.dot(left, right, total, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + o, mask=o < channels, other=0.0).to(tl.float32)[None, :]
        mask = (p < pixels)[:, None] & (o < channels)[None, :]
        r_pixels = residual + image * rb + i * rh + j * rw
        if RESIDUAL and not LAST:
            total += tl.load(r_pixels[:, None] + (o * rc)[None, :], mask=mask, other=0.0)
        total = activate(total, ACTIVATION, a, b)
        if RESIDUAL and LAST:
            total += tl.load(r_pixels[:, None] + (o * rc)[None, :], mask=mask, other=0.0)
        y_pixels = y + image * yb + i * yh + j * yw
        tl.store(y_pixels[:, None] + (o * yc)[None, :], total.to(y.dtype.element_ty), mask=mask)

    return conv_act_kernel

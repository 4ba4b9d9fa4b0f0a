"""The linear layer on integers in Triton: int8 products, int32 sums, float scales.

    y[m, n] = sum over k of x[m, k] * weight[n, k]  *  x_scale[m] * weight_scale[n]  +  bias[n]

The sum is exact (int32 holds 2^17 products of 2^14); it is rounded once when it becomes float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pruna_ir.kernels import triton_code
from pruna_ir.kernels.triton_code import jit, language

tl: Any = None


def applies(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernel takes these tensors: one fitting GPU."""
    return triton_code.runs_on(*tensors)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``pruna::int8_linear``; shapes and dtypes as there."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    count, columns = rows.shape[0], weight.shape[0]
    y = torch.empty(count, columns, dtype=torch.float32, device=x.device)
    row, column = triton_code.tiles(count, columns, x.device)
    grid = (-(-count // row) * -(-columns // column),)
    _kernel()[grid](
        rows, weight.contiguous(), x_scale.reshape(-1).contiguous(), weight_scale.contiguous(),
        weight_scale if bias is None else bias.contiguous(), y, count, columns, x.shape[-1],
        BY_ROW=x_scale.dim() > 0, BIASED=bias is not None, ROWS=row, COLUMNS=column, DEPTH=64,
        num_warps=8 if row * column >= 128 * 128 else 4,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], columns)


@cache
def _kernel() -> Any:
    global tl
    tl = language()

    @jit()
    def int8_linear_kernel(  # type: ignore[no-untyped-def]
        x, weight, x_scale, weight_scale, bias, y, rows, columns, width,
        BY_ROW: tl.constexpr, BIASED: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(columns, COLUMNS)
        r = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
        c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        # Rows times width may pass 2^31.
        x_rows = x + r.to(tl.int64)[:, None] * width
        w_rows = weight + c.to(tl.int64)[None, :] * width
        total = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, width, DEPTH):
            k = start + tl.arange(0, DEPTH)
            a = tl.load(
                x_rows + k[None, :], mask=(r < rows)[:, None] & (k < width)[None, :], other=0
            )
            b = tl.load(
                w_rows + k[:, None], mask=(c < columns)[None, :] & (k < width)[:, None], other=0
            )
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        scale = tl.load(weight_scale + c, mask=c < columns, other=0.0)[None, :]
        if BY_ROW:
            scale = scale * tl.load(x_scale + r, mask=r < rows, other=0.0)[:, None]
        else:
            scale = scale * tl.load(x_scale)
        result = total.to(tl.float32) * scale
        if BIASED:
            result += tl.load(bias + c, mask=c < columns, other=0.0)[None, :]
        where = y + r.to(tl.int64)[:, None] * columns + c[None, :]
        tl.store(where, result, mask=(r < rows)[:, None] & (c < columns)[None, :])

    return int8_linear_kernel

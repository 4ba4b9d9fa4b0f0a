"""The feed-forward block in Triton: two launches, the hidden values written once.

    h = act(x w1^T + b1)   or   act(x gate^T + gate_bias) * (x w1^T + b1)
    y = h w2^T + b2 [+ residual]

Both layers are one kernel: a tiled matrix product whose epilogue adds the bias, applies the
activation and adds the residual. With a gate, both products of a tile are summed in one loop,
which reads x once. One launch for the whole block would compute h again for every tile of columns
of y.

Sums are float32. float32 factors are multiplied as ``torch.set_float32_matmul_precision`` says.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pruna_ir.kernels import triton_code
from pruna_ir.kernels.triton_code import DTYPES, jit, language

tl: Any = None
activate: Any = None


def applies(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernel takes these tensors: one dtype of `DTYPES`, on one fitting GPU."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) == 1 and dtypes <= set(DTYPES) and triton_code.runs_on(*tensors)


def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``pruna::ffn``; shapes and dtypes as there, all tensors of one dtype."""
    rows = x.reshape(-1, x.shape[-1])
    hidden = dense(rows, w1, b1, gate_weight, gate_bias, activation)
    added = None if residual is None else residual.reshape(-1, w2.shape[0])
    y = dense(hidden, w2, b2, None, None, "none", added)
    return y.reshape(*x.shape[:-1], w2.shape[0])


def dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer, [rows, in] to [rows, out]; weights [out, in], biases [out], residual as y."""
    x, weight = x.contiguous(), weight.contiguous()
    gate = None if gate is None else gate.contiguous()
    (rows, width), columns = x.shape, weight.shape[0]
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    widest = 128 if gate is None else 64
    row, column = triton_code.tiles(rows, columns, x.device, widest=widest)
    grid = (-(-rows // row) * -(-columns // column),)
    _kernel()[grid](
        x, weight, _or(bias, x), _or(gate, x), _or(gate_bias, x), _or(residual, x), y, rows,
        columns, width, ACTIVATION=activation, BIASED=bias is not None, GATED=gate is not None,
        GATE_BIASED=gate_bias is not None, ADDED=residual is not None,
        PRECISION=triton_code.precision(x.dtype, convolution=False),
        ROWS=row, COLUMNS=column, DEPTH=32, num_warps=8 if row * column >= 128 * 128 else 4,
    )  # fmt: skip
    return y


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is never read, where there is no tensor."""
    return other if tensor is None else tensor.contiguous()


@cache
def _kernel() -> Any:
    global tl, activate
    tl = language()
    activate = triton_code.activation()

    @jit()
    def dense_kernel(  # type: ignore[no-untyped-def]
        x, weight, bias, gate, gate_bias, residual, y, rows, columns, width,
        ACTIVATION: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr,
        GATE_BIASED: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        across = tl.cdiv(columns, COLUMNS)
        r = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
        c = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
        # Rows times width may pass 2^31.
        x_rows = x + r.to(tl.int64)[:, None] * width
        w_rows = weight + c.to(tl.int64)[None, :] * width
        g_rows = gate + c.to(tl.int64)[None, :] * width
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        gates = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width, DEPTH):
            k = start + tl.arange(0, DEPTH)
            inside = (c < columns)[None, :] & (k < width)[:, None]
            a = tl.load(
                x_rows + k[None, :], mask=(r < rows)[:, None] & (k < width)[None, :], other=0.0
            )
            b = tl.load(w_rows + k[:, None], mask=inside, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if GATED:
                g = tl.load(g_rows + k[:, None], mask=inside, other=0.0)
                gates = tl.dot(a, g, gates, input_precision=PRECISION)
        if BIASED:
            total += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        if GATED:
            if GATE_BIASED:
                added = tl.load(gate_bias + c, mask=c < columns, other=0.0)
                gates += added.to(tl.float32)[None, :]
            total = activate(gates, ACTIVATION, 0.0, 0.0) * total
        else:
            total = activate(total, ACTIVATION, 0.0, 0.0)
        where = r.to(tl.int64)[:, None] * columns + c[None, :]
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        if ADDED:
            total += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + where, total.to(y.dtype.element_ty), mask=mask)

    return dense_kernel

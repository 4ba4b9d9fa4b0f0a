"""The linear layer on integers: int8 by int8, summed exactly, scaled by channel.

    y[..., n] = x_scale[...] * weight_scale[n] * sum over k of x[..., k] * weight[n, k]  +  bias[n]

Both operands are symmetric (their zero points are 0). Jacob et al., Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference (2018), section 2.2, has the
formula. For inference alone: integers have no gradient.

The fast paths are torch's integer product on a CPU and Triton's (``triton_int8_linear``) on an
NVIDIA GPU, Ampere or later.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels import triton_int8_linear
from pruna_ir.kernels.kernel import Kernel

_aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias) -> Tensor"
)


@torch.library.custom_op("pruna::int8_linear", mutates_args=(), schema=_SCHEMA)
def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """A linear layer of quantised inputs and weights, in float32.

    Args:
        x: [..., in], int8.
        weight: [out, in], int8; ``in`` is at most 131072, beyond which int32 sums overflow.
        x_scale: [] or the leading dimensions of ``x``, float32.
        weight_scale: [out], float32.
        bias: [out], float32, or None.

    Returns:
        [..., out], float32.

    Raises:
        RuntimeError: shapes or dtypes do not fit.

    >>> x, weight = torch.tensor([[[2, -1]], [[3, 4]]], dtype=torch.int8)
    >>> int8_linear(x, weight, torch.tensor(0.5), torch.tensor([2.0]), None)
    tensor([[2.]])
    """
    _check(x, weight, x_scale, weight_scale, bias)
    tensors = (x, weight, x_scale, weight_scale, bias)
    if triton_int8_linear.applies(*tensors):
        return triton_int8_linear.int8_linear(*tensors)
    # torch's own product is wrong for a width of 1, and takes nothing empty.
    if x.device.type != "cpu" or x.shape[-1] < 2 or not x.numel() or not weight.numel():
        result: torch.Tensor = int8_linear_reference(*tensors)
        return result
    sums = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t())
    y = sums.to(torch.float32).mul_(_scale(x_scale.reshape(-1, 1), weight_scale))
    y = y if bias is None else y.add_(bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def int8_linear_reference(
    x: Any, weight: Any, x_scale: Any, weight_scale: Any, bias: Any
) -> Any:
    """The operator's meaning in ATen operators; float64 holds every sum exactly."""
    rows, columns = (_aten.to.dtype(t, torch.float64) for t in (x, weight))
    sums = _aten.to.dtype(_aten.linear.default(rows, columns), torch.float32)
    by_row = _aten.unsqueeze.default(x_scale, -1)
    y = _aten.mul.Tensor(sums, _scale(by_row, weight_scale))
    return y if bias is None else _aten.add.Tensor(y, bias)


def _scale(by_row: Any, by_column: Any) -> Any:
    return _aten.mul.Tensor(by_row, by_column)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    floats = (x_scale, weight_scale, *((bias,) if bias is not None else ()))
    torch._check(
        x.dtype == weight.dtype == torch.int8 and all(t.dtype == torch.float32 for t in floats),
        lambda: f"int8_linear: x is {x.dtype}, weight {weight.dtype}, scales and bias "
        f"{', '.join(str(t.dtype) for t in floats)}; they must be int8 and float32",
    )
    torch._check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1] <= 1 << 17,
        lambda: f"int8_linear: x is {list(x.shape)} and weight is {list(weight.shape)}",
    )
    out = weight.shape[:1]
    torch._check(
        x_scale.shape in (torch.Size([]), x.shape[:-1])
        and weight_scale.shape == out
        and (bias is None or bias.shape == out),
        lambda: f"int8_linear: for x {list(x.shape)} and weight {list(weight.shape)}, x_scale is "
        f"{list(x_scale.shape)} and weight_scale {list(weight_scale.shape)}",
    )


@int8_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    _check(x, weight, x_scale, weight_scale, bias)
    return x.new_empty([*x.shape[:-1], weight.shape[0]], dtype=torch.float32)


KERNEL = Kernel(torch.ops.pruna.int8_linear.default, int8_linear_reference)

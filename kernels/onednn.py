"""oneDNN through torch: weights laid out once, residual and GELU computed with the result.

torch lays out the weight, the input and the output of an ordinary convolution afresh on each call,
and gives matrix products to another library, which cannot keep a weight in its own layout. The
operators here, which torch's own compiler uses, take a packed weight:

    y = conv2d(x, W', b) [+ residual]        W' in the layout that suits one input size
    y = linear(x, W', b) [+ residual]        W' in one layout for all

and may end in an exact or tanh GELU. Every other activation follows in place: measured, it costs
the same, and oneDNN's own relu and clamp make 0 of NaN, which would hide that something is wrong.

Limits: CPUs; float32, and bfloat16 where the processor has it; two-dimensional convolutions.
A convolution's weight that was packed for another size computes the same numbers up to rounding,
but may be twice as slow as an unpacked one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Geometry:
    """Where a two-dimensional convolution reads: pairs for height and width, and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def lacking(dtype: torch.dtype) -> str:
    """Why oneDNN does not compute in a dtype here; empty where it does.

    >>> lacking(torch.float64)
    'oneDNN computes in float32 and bfloat16, not in float64'
    """
    if not torch._C._has_mkldnn:
        return "torch was built without oneDNN"
    if dtype not in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"oneDNN computes in float32 and bfloat16, not in {name}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "the processor has no bfloat16"
    return ""


def pack_convolution(
    weight: torch.Tensor, geometry: Geometry, input_shape: list[int]
) -> torch.Tensor:
    """A convolution's weight in the layout that suits inputs of one shape.

    Args:
        weight: [out, in / groups, height, width], float32 or bfloat16.
        geometry: of the convolution.
        input_shape: [batch, in, height, width].

    Returns:
        An opaque tensor that only `convolution_call` takes. Which layout it has depends on the
        number of threads, too.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach().contiguous(),
        list(geometry.padding),
        list(geometry.stride),
        list(geometry.dilation),
        geometry.groups,
        input_shape,
    )
    return packed


def convolution_call(
    x: Any, packed: Any, bias: Any, geometry: Geometry, residual: Any = None
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The operator and arguments that compute ``conv2d(x, W, b) + residual``.

    Tensors may be given as such or as nodes of a graph. The result is channels-last, of the dtype
    of ``x``, and newly allocated.

    Args:
        x: [batch, in, height, width] in any layout; channels-last costs nothing to read.
        packed: the weight, from `pack_convolution`.
        bias: [out] or None.
        geometry: of the convolution.
        residual: of the result's shape and dtype, or None.
    """
    padding, stride = list(geometry.padding), list(geometry.stride)
    shared = (packed, bias, padding, stride, list(geometry.dilation), geometry.groups)
    operator = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return operator.default, (x, *shared, "none", [], "")
    return operator.binary, (x, residual, *shared, "add", 1.0, None, [], None)


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """The weight [out, in] of a linear layer in oneDNN's layout, for any number of rows."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def linear_call(
    x: Any, packed: Any, bias: Any, residual: Any = None, gelu: str = ""
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The operator and arguments that compute ``gelu(linear(x, W, b))`` or a sum with a residual.

    Args:
        x: [..., in].
        packed: the weight, from `pack_linear`.
        bias: [out] or None.
        residual: [..., out], or None.
        gelu: ``"none"`` (exact), ``"tanh"``, or empty for no activation; not with a residual.

    >>> op, arguments = linear_call(torch.ones(1, 2), pack_linear(torch.eye(2)), None)
    >>> op(*arguments)
    tensor([[1., 1.]])
    """
    operator = torch.ops.mkldnn._linear_pointwise
    if residual is not None:
        return operator.binary, (x, residual, packed, bias, "add")
    return operator.default, (x, packed, bias, "gelu" if gelu else "none", [], gelu)

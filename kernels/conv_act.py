"""A convolution with its epilogue: bias, activation, and a residual before or after it.

    y = act(conv(x, weight, bias) + residual)
    y = act(conv(x, weight, bias)) + residual           where residual_last

``conv`` is a one-, two- or three-dimensional convolution with zero padding, by the rank of
``weight``; ``act`` is one of

    none, relu, relu6, hardtanh (activation_args = [min, max]), leaky_relu ([slope]), hardswish,
    silu, sigmoid, gelu (exact), gelu_tanh, quick_gelu

The fast path for inference computes the epilogue in place in the convolution's own result. Beyond
that speed comes from weights that are laid out once, which an operator on plain tensors cannot do:
the eager backend spells this one out and packs its convolution (see `pruna_ir.kernels.onednn`).

A pool behind the activation is no part of the operator. What fusing it could save is a pass of the
activation over the larger image: pooled first, and activated then, the stem of a ResNet took 0.98
to 1.00 of its time, VGG's convolutions before a pool 0.95 to 1.01, one at 56x56 before an average
1.00 to 1.01 (packed, batch 1, one thread and two). oneDNN has no pool among its post-ops.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels import triton_conv_act
from pruna_ir.kernels.activations import IN_PLACE, REFERENCE, check_activation
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation, float[] activation_args, "
    "bool residual_last=False) -> Tensor"
)

_CONV = {1: _aten.conv1d.default, 2: _aten.conv2d.default, 3: _aten.conv3d.default}

@torch.library.custom_op("pruna::conv_act", mutates_args=(), schema=_SCHEMA)
def conv_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    activation_args: list[float],
    residual_last: bool = False,
) -> torch.Tensor:
    """``act(conv(x, weight, bias) + residual)``, differentiable in all four tensors.

    Args:
        x: [batch, in, ...spatial], any floating dtype.
        weight: [out, in / groups, ...kernel], the dtype of ``x``.
        bias: [out] or None.
        residual: a tensor of the result's shape and dtype, or None.
        stride: one integer per spatial dimension, as are ``padding`` and ``dilation``.
        padding: zeros added on both sides.
        dilation: distance of kernel elements.
        groups: number of blocks of channels.
        activation: one of `activations.ACTIVATIONS`.
        activation_args: ``[min, max]`` for hardtanh, ``[slope]`` for leaky_relu, empty otherwise.
        residual_last: add ``residual`` after the activation, not before it.

    Returns:
        [batch, out, ...spatial], the dtype of ``x``.

    Raises:
        UsageError: the activation is unknown or has the wrong number of arguments.
        RuntimeError: shapes or dtypes do not fit.

    >>> x, weight = torch.ones(1, 1, 2, 2), torch.full((1, 1, 1, 1), 7.0)
    >>> conv_act(x, weight, None, -x, [1, 1], [0, 0], [1, 1], 1, "hardtanh", [0.0, 5.0]).flatten()
    tensor([5., 5., 5., 5.])
    """
    _check(x, weight, residual, activation, activation_args)
    if triton_conv_act.applies(x, weight, bias, residual, groups):
        return triton_conv_act.conv_act(
            x, weight, bias, residual, stride, padding, dilation, activation, activation_args,
            residual_last=residual_last,
        )  # fmt: skip
    y = _convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        _check_residual(y, residual)
    if residual is not None and not residual_last:
        y.add_(residual)
    result: torch.Tensor = IN_PLACE[activation](y, *activation_args)
    return result.add_(residual) if residual is not None and residual_last else result


def conv_act_reference(
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    activation_args: list[float],
    residual_last: bool = False,
) -> Any:
    """The operator's meaning in ATen operators."""
    y = _convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None and not residual_last:
        y = _aten.add.Tensor(y, residual)
    y = REFERENCE[activation](y, *activation_args)
    return _aten.add.Tensor(y, residual) if residual is not None and residual_last else y


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    convolve = _CONV[len(stride)]
    return convolve(x, weight, bias, list(stride), list(padding), list(dilation), groups)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    activation_args: list[float],
) -> None:
    check_activation("conv_act", activation, activation_args)
    torch._check(
        x.dim() == weight.dim() and 3 <= x.dim() <= 5,
        lambda: f"conv_act: x is {list(x.shape)} and weight is {list(weight.shape)}",
    )
    torch._check(
        residual is None or residual.dtype == x.dtype,
        lambda: f"conv_act: x is {x.dtype}, but residual is {residual.dtype}",  # type: ignore[union-attr]
    )


def _check_residual(y: torch.Tensor, residual: torch.Tensor) -> None:
    torch._check(
        residual.shape == y.shape,
        lambda: f"conv_act: residual is {list(residual.shape)}, the result {list(y.shape)}",
    )


@conv_act.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    activation_args: list[float],
    residual_last: bool = False,  # noqa: ARG001
) -> torch.Tensor:
    _check(x, weight, residual, activation, activation_args)
    y: torch.Tensor = _convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        _check_residual(y, residual)
    return torch.empty_like(y)


differentiate_reference("pruna::conv_act", conv_act_reference)

KERNEL = Kernel(torch.ops.pruna.conv_act.default, conv_act_reference)

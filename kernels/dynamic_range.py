"""The scale and zero point of a tensor's own range, found when it is there: dynamic quantisation.

    low = min(min x, 0)        high = max(max x, 0)
    scale = (high - low) / (qmax - qmin)                            1 where that is below 2^-126
    zero_point = round(clamp(qmin - low / scale, qmin, qmax))       half to even

in the tensor's precision, as ONNX's DynamicQuantizeLinear has it. With ``fake_quant`` behind them,
activations need no calibration:

    s = dynamic_scale(x, 0, 255)
    y = fake_quant(x, s, dynamic_zero_point(x, s, 0, 255), None, 0, 255)

NaN stays NaN. The range is the whole tensor's: samples of a batch share it. No gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels.kernel import Kernel

_aten = torch.ops.aten
_SMALLEST = torch.finfo(torch.float32).tiny


def dynamic_scale_reference(x: Any, qmin: int, qmax: int) -> Any:
    """The scale in ATen operators."""
    low = _aten.clamp.default(_aten.amin.default(x), None, 0)
    high = _aten.clamp.default(_aten.amax.default(x), 0)
    scale = _aten.div.Scalar(_aten.sub.Tensor(high, low), qmax - qmin)
    tiny = _aten.lt.Scalar(scale, _SMALLEST)
    return _aten.where.self(tiny, _aten.ones_like.default(scale), scale)


def dynamic_zero_point_reference(x: Any, scale: Any, qmin: int, qmax: int) -> Any:
    """The zero point in ATen operators."""
    low = _aten.clamp.default(_aten.amin.default(x), None, 0)
    exact = _aten.add.Scalar(_aten.neg.default(_aten.div.Tensor(low, scale)), qmin)
    bounded = _aten.round.default(_aten.clamp.default(exact, qmin, qmax))
    return _aten.to.dtype(bounded, torch.int32)


@torch.library.custom_op(
    "pruna::dynamic_scale", mutates_args=(), schema="(Tensor x, int qmin, int qmax) -> Tensor"
)
def dynamic_scale(x: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """The step, [], with which the integers ``[qmin, qmax]`` span all of ``x`` and 0.

    >>> dynamic_scale(torch.tensor([-1.0, 3.0]), 0, 255)
    tensor(0.0157)
    """
    scale: torch.Tensor = dynamic_scale_reference(x, qmin, qmax)
    return scale


@torch.library.custom_op(
    "pruna::dynamic_zero_point",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, int qmin, int qmax) -> Tensor",
)
def dynamic_zero_point(
    x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    """The integer, int32 [], that stands for 0 where ``qmin`` stands for the least of ``x``.

    >>> x = torch.tensor([-1.0, 3.0])
    >>> dynamic_zero_point(x, dynamic_scale(x, 0, 255), 0, 255)
    tensor(64, dtype=torch.int32)
    """
    zero: torch.Tensor = dynamic_zero_point_reference(x, scale, qmin, qmax)
    return zero


@dynamic_scale.register_fake
def _(x: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    torch._check(qmin < qmax, lambda: f"dynamic_scale needs qmin < qmax, not {qmin} and {qmax}")
    return x.new_empty(())


@dynamic_zero_point.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty((), dtype=torch.int32)


SCALE = Kernel(torch.ops.pruna.dynamic_scale.default, dynamic_scale_reference)
ZERO_POINT = Kernel(torch.ops.pruna.dynamic_zero_point.default, dynamic_zero_point_reference)

"""Dead elements under reductions, softmax and norms: statistics are those of the alive elements.

A mean over 5 elements of which 2 are dead is the mean of 3. A result of which no element is alive
is dead. Operators that return places (``argmax``, ``topk``) or depend on the neighbour (``diff``)
are refused along an axis that is dead in part.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pruna_ir.masked_layout import elementwise
from pruna_ir.masked_operators import (
    Handler,
    Masked,
    Operands,
    dims_of,
    lift,
    masked,
    tensors,
    uniform,
    wrap,
)

# -- reductions ------------------------------------------------------------------------------


def _filled(x: Masked, value: float) -> Tensor:
    """The values with another number in the place of dead elements."""
    other: Tensor = torch.full((), value, dtype=x.value.dtype)
    return torch.where(x.mask, x.value, other)


def _moments(x: Masked, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of the alive elements; dimensions kept."""
    count = x.mask.sum(dims, keepdim=True).to(torch.float64)
    mean = x.value.sum(dims, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(x.mask, x.value - mean, torch.zeros((), dtype=x.value.dtype))
    return count, mean, (deviation * deviation.conj()).real.sum(dims, keepdim=True)


def _variance(operands: Operands, x: Masked, dims: list[int]) -> Tensor:
    count, _, squares = _moments(x, dims)
    correction = operands.get("correction")
    if correction is None:
        correction = 1 if operands.get("unbiased") in (None, True) else 0
    divisor: Tensor = (count - correction).clamp(min=0)
    return squares / divisor


def _extreme(worst: float) -> Callable[[Operands, Masked, list[int]], Tensor]:
    def statistic(operands: Operands, x: Masked, dims: list[int]) -> Tensor:
        if not x.value.is_floating_point():
            raise operands.refuse("reduces over removed channels that are no real numbers")
        filled = _filled(x, worst)
        return filled.amax(dims, keepdim=True) if worst < 0 else filled.amin(dims, keepdim=True)

    return statistic


def _norm(operands: Operands, x: Masked, dims: list[int]) -> Tensor:
    """A norm in which a 0 counts for nothing."""
    order = operands.get("ord") if "ord" in operands.arguments else operands.get("p")
    order = 2.0 if order is None else float(order)
    if order <= 0:
        raise operands.refuse("counts removed channels, and its value there is not defined")
    norm: Tensor = torch.linalg.vector_norm(x.value, order, dims, keepdim=True)
    return norm


def _product(_: Operands, x: Masked, dims: list[int]) -> Tensor:
    result = _filled(x, 1)
    for dim in dims:
        result = result.prod(dim, keepdim=True)
    return result


_Statistic = Callable[[Operands, Masked, list[int]], Tensor]

_STATISTICS: dict[str, _Statistic] = {
    "mean": lambda _, x, dims: _moments(x, dims)[1],
    "sum": lambda _, x, dims: x.value.sum(dims, keepdim=True),
    "var": _variance,
    "std": lambda operands, x, dims: _variance(operands, x, dims).sqrt(),
    "amax": _extreme(-math.inf),
    "amin": _extreme(math.inf),
    "logsumexp": lambda _, x, dims: _filled(x, -math.inf).logsumexp(dims, keepdim=True),
    "prod": _product,
    "any": lambda _, x, dims: torch.any(x.value != 0, dims, keepdim=True),
    "all": lambda _, x, dims: torch.all(_filled(x, 1) != 0, dims, keepdim=True),
    "linalg_vector_norm": _norm,
    "norm": _norm,
}
"""Each over some dimensions, which it keeps with size 1."""


def _reduction(*names: str) -> Handler:
    """Statistics over ``dim``: one result a name."""

    def handler(operands: Operands) -> Any:
        x = tensors(operands)[0]
        dims = dims_of(operands, x.value.dim())
        alive = x.mask.sum(dims, keepdim=True) > 0
        gone = () if operands.get("keepdim") else tuple(dims)
        results = [
            masked(
                lift(_STATISTICS[name](operands, x, dims)).squeeze(gone), alive.squeeze(gone)
            )
            for name in names
        ]
        return results[0] if len(results) == 1 else tuple(results)

    return handler


def _along(operands: Operands) -> Any:
    """An operator along ``dim`` that cannot tell dead elements: there may be none beside alive."""
    x = tensors(operands)[0]
    name = "dims" if "dims" in operands.arguments else "dim"
    dims = dims_of(operands, x.value.dim(), name)
    line = uniform(operands, x.mask, dims)
    results = operands.call()
    single = not isinstance(results, (tuple, list))
    wrapped = []
    for result in [results] if single else results:
        fits = result.dim() == line.dim()
        wrapped.append(masked(lift(result), line if fits else line.squeeze(tuple(dims))))
    return wrapped[0] if single else tuple(wrapped)


def _extremum(operands: Operands) -> Any:
    """``max`` and ``min``: of two tensors, of all elements, or along one axis with the place.

    Places among dead elements mean something only where nobody reads them.
    """
    if operands.get("other") is not None:
        return elementwise(operands)
    largest = str(operands.node.target).startswith("aten.max")
    reduction = _reduction("amax" if largest else "amin")
    if "dim" not in operands.arguments:
        return reduction(operands)
    parts = [user for user in operands.node.users if user.target is operator.getitem]
    if any(part.args[1] == 1 and part.users for part in parts):
        return _along(operands)
    value = reduction(operands)
    return value, masked(operands.call()[1], value.alive)


def _cumulative(neutral: float) -> Handler:
    """A running total in which dead elements count for nothing."""

    def handler(operands: Operands) -> Masked:
        x = operands["self"]
        return masked(lift(operands.call(changed={"self": Masked(_filled(x, neutral))})), x.mask)

    return handler


def _softmax(operands: Operands) -> Masked:
    """Dead elements get no weight."""
    x = operands["self"]
    changed = {"self": Masked(_filled(x, -math.inf)), "dtype": None}
    return masked(lift(operands.call(changed=changed)), x.mask)


# -- norms -----------------------------------------------------------------------------------


def _layer_norm(operands: Operands) -> Masked | tuple[Masked, ...]:
    """(x - mean) / sqrt(var + eps) * weight + bias over the alive of the last dimensions."""
    x, shape = operands["input"], operands["normalized_shape"]
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    count, mean, squares = _moments(x, dims)
    scale = (squares / count.clamp(min=1) + operands["eps"]).rsqrt()
    result = _affine(operands, x, (x.value - mean) * scale)
    if "native" in str(operands.node.target):
        return result, masked(mean, count > 0), masked(scale, count > 0)
    return result


def rms_norm(operands: Operands) -> Masked:
    """x / sqrt(mean(x^2) + eps) * weight over the alive of the last dimensions.

    Without an epsilon torch takes that of float32, for lower precisions too; in float64 it would
    take a smaller one.
    """
    x, shape = operands["input"], operands["normalized_shape"]
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    eps = operands["eps"]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    count = x.mask.sum(dims, keepdim=True).clamp(min=1)
    mean_square = x.value.square().sum(dims, keepdim=True) / count
    return _affine(operands, x, x.value * (mean_square + eps).rsqrt())


def _affine(operands: Operands, x: Masked, value: Tensor, view: Sequence[int] = ()) -> Masked:
    """A normalised value scaled and shifted; ``view`` gives the parameters' shape."""
    alive = x.mask
    weight, bias = operands.get("weight"), operands.get("bias")
    if weight is not None:
        shape = view or weight.value.shape
        value, alive = value * weight.value.view(shape), alive & weight.mask.view(shape)
    if bias is not None:
        shape = view or bias.value.shape
        value, alive = value + bias.value.view(shape), alive & bias.mask.view(shape)
    return masked(value, alive)


def _group_norm(operands: Operands) -> Masked | tuple[Masked, ...]:
    """The statistics of a group are those of its alive elements."""
    x, native = operands["input"], "native" in str(operands.node.target)
    groups = operands["group" if native else "num_groups"]
    n, channels, *rest = x.value.shape
    split = (n, groups, -1)
    flat = Masked(x.value.reshape(split), x.mask.reshape(split))
    count, mean, squares = _moments(flat, [2])
    scale = (squares / count.clamp(min=1) + operands["eps"]).rsqrt()
    value = ((flat.value - mean) * scale).reshape(x.value.shape)
    result = _affine(operands, x, value, (channels, *[1] * len(rest)))
    if native:
        alive = (count > 0).squeeze(-1)
        return result, masked(mean.squeeze(-1), alive), masked(scale.squeeze(-1), alive)
    return result


def _channelwise(axis: str | int, *names: str) -> Handler:
    """An operator with parameters for the channels of one axis."""

    def handler(operands: Operands) -> Any:
        x = tensors(operands)[0]
        place = operands[axis] if isinstance(axis, str) else min(axis, x.value.dim() - 1)
        alive = x.mask
        for name in names:
            parameter = operands.get(name)
            if place is not None and isinstance(parameter, Masked) and parameter.value.numel() > 1:
                shape = [1] * x.value.dim()
                shape[place] = -1
                alive = alive & parameter.mask.view(shape)
        results = operands.call()
        if isinstance(results, (tuple, list)):
            return (masked(lift(results[0]), alive), *map(wrap, results[1:]))
        return masked(lift(results), alive)

    return handler


def _batch_norm(operands: Operands) -> Any:
    """Each channel for itself: running statistics, or those of its alive elements."""
    if operands.get("training"):
        return _channel_norm(operands, batch=True)
    if operands.get("use_input_stats"):
        return _channel_norm(operands, batch=False)
    return _channelwise(1, "weight", "bias", "running_mean", "running_var")(operands)


def _channel_norm(operands: Operands, *, batch: bool) -> Masked:
    """Normalised by the statistics of a channel over space, and over the batch as well."""
    x = operands["input"]
    dims = [d for d in range(x.value.dim()) if d > 1 or (batch and d == 0)]
    count, mean, squares = _moments(x, dims)
    value = (x.value - mean) * (squares / count.clamp(min=1) + operands["eps"]).rsqrt()
    return _affine(operands, x, value, (x.value.shape[1], *[1] * (x.value.dim() - 2)))


_ALONG = (
    "sort topk argsort argmax argmin median diff cummax cummin fft_fft fft_ifft fft_rfft "
    "fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn"
)

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": _reduction(name) for name in _STATISTICS},
    **{f"aten::{name}": _along for name in _ALONG.split()},
    "aten::var_mean": _reduction("var", "mean"),
    "aten::std_mean": _reduction("std", "mean"),
    "aten::max": _extremum,
    "aten::min": _extremum,
    "aten::cumsum": _cumulative(0.0),
    "aten::cumprod": _cumulative(1.0),
    "aten::logcumsumexp": _cumulative(-math.inf),
    **{
        f"aten::{name}": _softmax
        for name in ("softmax", "_softmax", "log_softmax", "_log_softmax")
    },
    "aten::layer_norm": _layer_norm,
    "aten::native_layer_norm": _layer_norm,
    "aten::rms_norm": rms_norm,
    "aten::group_norm": _group_norm,
    "aten::native_group_norm": _group_norm,
    "aten::batch_norm": _batch_norm,
    "aten::instance_norm": _batch_norm,
    "aten::_native_batch_norm_legit_no_training": _batch_norm,
    "aten::prelu": _channelwise(1, "weight"),
    "aten::fake_quantize_per_channel_affine": _channelwise("axis", "scale", "zero_point"),
    "pruna::fake_quant": _channelwise("axis", "scale", "zero_point"),
}
"""Operator name without overload to what it computes where elements are dead."""

"""Which range of a tensor to keep, from what was observed of it. From a histogram, four ranges:

    minmax      the observed minimum and maximum
    percentile  the values at the quantiles 1 - p and p
    mse         the range that minimises the mean squared error of quantise-dequantise, with
                rounding and clipping both counted (Sung et al., 2015; Banner et al., 2019)
    kl          the range whose quantised distribution diverges least from the observed one
                (Migacz, 8-bit Inference with TensorRT, GTC 2017); see `pruna_ir.divergence`

For mse, the error of a bin is that of its centre plus the variance min(w, scale)**2 / 12 inside
of it, and exact zeros, which every grid represents, count as no error; kl leaves them out too.
Limits: values are weighted alike, and ranges are per tensor.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from pruna_ir.divergence import least_divergence, running_sums
from pruna_ir.errors import PassError, UsageError
from pruna_ir.histogram import Histogram
from pruna_ir.observers import Observer
from pruna_ir.quantization import Grid, QuantParameters, choose_parameters

Method = Literal["minmax", "mse", "percentile", "kl"]
METHODS: tuple[str, ...] = get_args(Method)


def estimate(
    seen: Observer, method: Method, grid: Grid, layer: str, percentile: float = 99.99
) -> QuantParameters:
    """The scale and zero point for a tensor, from what was observed of it.

    Args:
        seen: a `Histogram`, or for ``minmax`` any observer.
        method: how the range is chosen (see the module's text).
        grid: the integers.
        layer: named in errors.
        percentile: for ``percentile``: the share of values, in percent, below the upper bound
            and above the lower one.

    Raises:
        PassError: nothing was observed.
        UsageError: the method is unknown.
    """
    if seen.low > seen.high:
        raise PassError(f"{layer}: no value was observed; is the calibration data empty?")
    if method == "minmax":
        return choose_parameters(seen.low, seen.high, grid, layer)
    if not isinstance(seen, Histogram):
        raise UsageError(f"ranges by {method} need a histogram, not {type(seen).__name__}")
    if method == "percentile":
        return choose_parameters(*_percentiles(seen, percentile), grid, layer)
    if method == "mse":
        return choose_parameters(*_least_error(seen, grid, layer), grid, layer)
    if method == "kl":
        return choose_parameters(*_least_divergence(seen, grid), grid, layer)
    raise UsageError(f"unknown range method {method!r}; there are {', '.join(METHODS)}")


def _percentiles(seen: Histogram, percentile: float) -> tuple[float, float]:
    if not 50.0 < percentile <= 100.0:
        raise UsageError(f"percentile must be above 50 and at most 100, not {percentile}")
    counts = seen.counts.double()
    counts[-seen.first] += seen.zeros
    below = torch.cumsum(counts, 0)
    rank = below[-1] * percentile / 100.0
    high = (int(torch.searchsorted(below, rank)) + seen.first + 1) * seen.width
    above = torch.cumsum(counts.flip(0), 0)
    last = seen.first + len(counts) - 1
    low = (last - int(torch.searchsorted(above, rank))) * seen.width
    return max(low, seen.low), min(high, seen.high)


def noise(
    seen: Histogram, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """The summed squared error of quantising all observed values with each of [n] parameters.

    With c a bin's centre, the bins that round to a level r add the sum of (r - c)**2 = r**2 * n -
    2 * r * sum(c) + sum(c**2), so that running sums over bins give each level at once.

    Args:
        seen: the values.
        scale: [n] scales.
        zero_point: [n] zero points.
        grid: the integers.

    Returns:
        [n] float64 errors.
    """
    centres, counts = seen.centres(), seen.counts.double()
    below = running_sums(counts)  # [bins + 1]: values in the bins before each
    below_x = running_sums(counts * centres)
    step, zero = scale.double()[:, None], zero_point.double()[:, None]
    levels = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.float64) - zero  # [n, levels]
    edges = (levels[:, :-1] + 0.5) * step
    inner = torch.ceil(edges / seen.width - 0.5) - seen.first  # the first bin of the next level
    bins = torch.nn.functional.pad(inner.clamp(0, len(counts)).long(), (1, 1))
    bins[:, -1] = len(counts)
    held, held_x = below[bins].diff(dim=1), below_x[bins].diff(dim=1)
    reals = levels * step
    error = (reals * (reals * held - 2.0 * held_x)).sum(1) + (counts * centres.square()).sum()
    spread = torch.clamp(scale.double(), max=seen.width).square() / 12.0
    return error.clamp(min=0.0) + spread * counts.sum()


def sqnr_db(seen: Histogram, parameters: QuantParameters) -> float:
    """Signal over quantisation noise, in dB, that per-tensor parameters give the values seen."""
    lost = noise(
        seen, parameters.scale.reshape(1), parameters.zero_point.reshape(1), parameters.grid
    )
    signal = float((seen.counts.double() * seen.centres().square()).sum())
    if signal == 0.0 or float(lost) == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / float(lost))


def clipped_fraction(seen: Histogram, parameters: QuantParameters) -> float:
    """The share of the values seen that lie beyond half a step outside of the grid."""
    scale, zero = float(parameters.scale), int(parameters.zero_point)
    low = (parameters.grid.qmin - zero - 0.5) * scale
    high = (parameters.grid.qmax - zero + 0.5) * scale
    centres = seen.centres()
    outside = (centres < low) | (centres > high)
    return int(seen.counts[outside].sum()) / max(seen.total, 1)


def _least_error(seen: Histogram, grid: Grid, layer: str) -> tuple[float, float]:
    """Coordinate descent over the two bounds, each a fraction of what was observed.

    A symmetric grid has one bound. Fractions are searched from 1 down to 2**-10 in steps of
    2**(1/4), then finely around the best.
    """
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    best = (1.0, 1.0)
    both, only_low, only_high = (True, True), (True, False), (False, True)
    one_bound = grid.symmetric or 0.0 in (low, high)
    sides = [both] if one_bound else [both, only_high, only_low, only_high, only_low]
    for moves_low, moves_high in sides:
        for fractions in (_COARSE, _FINE):
            around = best if fractions is _FINE else (1.0, 1.0)
            fixed = torch.ones_like(fractions)
            lows = low * (around[0] * fractions if moves_low else best[0] * fixed)
            highs = high * (around[1] * fractions if moves_high else best[1] * fixed)
            candidates = choose_parameters(lows, highs, grid, layer)
            errors = noise(seen, candidates.scale, candidates.zero_point, grid)
            chosen = int(errors.argmin())
            best = (
                float(lows[chosen]) / low if low else 1.0,
                float(highs[chosen]) / high if high else 1.0,
            )
    return low * best[0], high * best[1]


_COARSE = torch.exp2(-torch.arange(41, dtype=torch.float64) / 4.0)
_FINE = torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(0.85, 1.18, 12).double()])


def _least_divergence(seen: Histogram, grid: Grid) -> tuple[float, float]:
    """The range [-t, t] of the least divergence, cut to what was observed."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    threshold = least_divergence(seen.counts, seen.first, grid)
    if threshold is None:
        return low, high
    return max(low, -threshold * seen.width), min(high, threshold * seen.width)

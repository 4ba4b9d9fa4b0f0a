"""Calibration: what ranges the tensors of a program take on data, and which range to keep.

One walk over the data (see `packed_walk`). Values are freed at their last use, and each observed
tensor is folded into an observer of fixed size; no activation is kept. Values are the program's up
to rounding: convolutions run in oneDNN's own layouts, and large batches in parts.

`Histogram` counts values in bins of width w = 2**k at integer multiples of w. Where the values
outgrow its bins, w doubles and pairs of bins merge. Since k depends on the overall range alone,
the histogram of given values is the same for every order and every split of them, and equals the
one that a pass over all of them at once would give. (A convolution or linear layer may itself
round differently in batches of another size, so that values near an edge change their bins.)

From a histogram, four ranges:

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
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import fx

from pruna_ir.bin_counts import count_bins, flattened
from pruna_ir.data import DataSource
from pruna_ir.divergence import halved, least_divergence, running_sums
from pruna_ir.errors import PassError, UsageError
from pruna_ir.packed_walk import PackedWalk
from pruna_ir.program import Program, module_path
from pruna_ir.quantization import Grid, QuantParameters, choose_parameters
from pruna_ir.transform import Progress, no_progress

Method = Literal["minmax", "mse", "percentile", "kl"]
METHODS: tuple[str, ...] = get_args(Method)

_SMALLEST_EXPONENT = -126
"""Bins are not narrower than the smallest normal float32."""
_MOST = torch.finfo(torch.float32).max


class Observer(Protocol):
    """Something of fixed size that summarises all values that a tensor takes.

    It must not matter how the values are split into calls, nor which strides they have.
    """

    low: float
    high: float

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        ...


@runtime_checkable
class Mergeable(Observer, Protocol):
    """An observer of which several can see some of the values each, in threads of their own."""

    def empty(self) -> Mergeable:
        """One of the same kind that has seen nothing."""
        ...

    def merge(self, other: Any) -> None:
        """Take in everything that another of the same kind has taken in."""
        ...


@dataclass
class MinMax:
    """The smallest and largest value so far.

    >>> seen = MinMax()
    >>> seen.update(torch.tensor([1.0, -2.0]))
    >>> seen.low, seen.high
    (-2.0, 1.0)
    """

    low: float = math.inf
    high: float = -math.inf

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        self.widen(*bounds(x))

    def widen(self, least: float, most: float) -> None:
        """`update`, with the smallest and largest value of a tensor."""
        self.low, self.high = min(self.low, least), max(self.high, most)

    def merge(self, other: MinMax) -> None:
        """Take in everything that another has taken in."""
        self.widen(other.low, other.high)

    def empty(self) -> MinMax:
        """One of the same kind that has seen nothing."""
        return MinMax()


def bounds(x: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest value of a non-empty tensor; NaN where it holds one."""
    # Flattened, as torch copies what is not in the order of its dimensions.
    least, most = torch.aminmax(flattened(x.detach()))
    return float(least), float(most)


class Histogram:
    """Counts of values in at most ``bins`` bins of width ``2**exponent``, grown as needed.

    Bin i of ``counts`` holds the values in ``[first + i, first + i + 1) * 2**exponent``; exact
    zeros are counted in ``zeros`` instead.

    >>> seen = Histogram(bins=4)
    >>> seen.update(torch.tensor([0.5, 3.5, 0.0]))
    >>> seen.width, seen.first, seen.counts.tolist(), seen.zeros
    (1.0, 0, [1, 0, 0, 1], 1)
    """

    def __init__(self, bins: int = 8192) -> None:
        if bins < 2:
            raise UsageError(f"a histogram needs at least 2 bins, not {bins}")
        self.bins = bins
        self.low, self.high = math.inf, -math.inf
        self.exponent = _SMALLEST_EXPONENT
        self.first = 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.zeros = 0

    @property
    def width(self) -> float:
        """The width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """The number of values so far."""
        return self.zeros + int(self.counts.sum())

    def centres(self) -> torch.Tensor:
        """The centre of each bin, float64."""
        index = torch.arange(len(self.counts), dtype=torch.float64) + self.first
        return (index + 0.5) * self.width

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        self.take(x, *bounds(x))

    def take(self, x: torch.Tensor, least: float, most: float) -> None:
        """`update`, for a tensor whose smallest and largest value are known already."""
        self._cover(min(self.low, least), max(self.high, most))
        self.zeros += count_bins(x, self.counts, self.first, self.exponent, signed=least < 0)

    def merge(self, other: Histogram) -> None:
        """Take in everything that another histogram has taken in."""
        if other.low > other.high:
            return
        self._cover(min(self.low, other.low), max(self.high, other.high))
        counts, first = other.counts, other.first
        for _ in range(self.exponent - other.exponent):
            counts, first = halved(counts, first)
        start = first - self.first
        self.counts[start : start + len(counts)] += counts
        self.zeros += other.zeros

    def empty(self) -> Histogram:
        """One with as many bins that has seen nothing."""
        return Histogram(self.bins)

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins until ``[low, high]`` and 0 fit, and give each of them a bin."""
        if (low, high) == (self.low, self.high) and len(self.counts):
            return
        self.low, self.high = low, high
        exponent = self.exponent
        while _last(high, exponent) - _first(low, exponent) >= self.bins:
            exponent += 1
        counts, first = self.counts, self.first
        for _ in range(exponent - self.exponent if len(counts) else 0):
            counts, first = halved(counts, first)
        grown_first = _first(low, exponent)
        grown = torch.zeros(_last(high, exponent) - grown_first + 1, dtype=torch.int64)
        start = first - grown_first
        grown[start : start + len(counts)] = counts
        self.exponent, self.first, self.counts = exponent, grown_first, grown


def _first(low: float, exponent: int) -> int:
    return min(0, math.floor(math.ldexp(low, -exponent)))


def _last(high: float, exponent: int) -> int:
    return max(0, math.floor(math.ldexp(high, -exponent)))


# -- from observations to parameters -------------------------------------------------------------


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


# -- the walk over the data ----------------------------------------------------------------------


def observe(
    program: Program,
    observers: Mapping[fx.Node, Observer],
    data: DataSource,
    *,
    samples: int = 128,
    progress: Progress = no_progress,
) -> int:
    """Run the program on data and let observers see the values of their nodes.

    Args:
        program: what to run; its graph may be under rewrite.
        observers: the observer of each node of interest; updated in place.
        data: batches of inputs. Where the program fixes its batch size, they are cut to it.
        samples: stop after this many samples (rows of dimension 0 of the first input).
        progress: called after each batch with the samples done.

    Returns:
        The number of samples seen.

    Raises:
        UsageError: the data is empty or does not fit the program.
        PassError: a value is NaN or infinite; the message names the layer and the batch.
    """
    if samples < 1:
        raise UsageError(f"calibration needs at least 1 sample, not {samples}")
    # Each thread has observers of its own; the caller's take in the others' in the end.
    own = _mergeable(observers)
    count = torch.get_num_threads() - 1 if own else 0
    helpers = [{key: one.empty() for key, one in own.items()} for _ in range(count)]
    shown = [_Shown(observers)]
    for helper in helpers:
        shown.append(_Shown({node: helper[id(seen)] for node, seen in observers.items()}))
    walk = PackedWalk(program, observers, *shown)
    done = 0
    for number, inputs in enumerate(runs(program, data, samples)):
        for each in shown:
            each.batch = number
        walk.walk(inputs)
        done += _rows(inputs)
        progress("calibrate", done, max(done, min(samples, len(data) * _rows(inputs))))
    for helper in helpers:
        for key, one in own.items():
            one.merge(helper[key])
    return done


def _mergeable(observers: Mapping[fx.Node, Observer]) -> dict[int, Mergeable]:
    """Each observer by its id; none where one cannot take in what another has seen."""
    found = {id(one): one for one in observers.values() if isinstance(one, Mergeable)}
    return found if len(found) == len({id(one) for one in observers.values()}) else {}


def runs(
    program: Program, data: DataSource, samples: int = sys.maxsize
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The inputs of one run after another, until this many samples are reached.

    Where the program fixes its batch size, batches are cut to it.

    Raises:
        UsageError: the data is empty or does not fit the program.
    """
    done = 0
    for batch in _runs(program, data):
        inputs = tuple(program.bind(_cut(program, batch, samples - done), {}))
        yield inputs
        done += _rows(inputs)
        if done >= samples:
            return
    if not done:
        raise UsageError(
            "the calibration data holds no sample that fits the program's inputs "
            f"({'; '.join(map(str, program.inputs))}); give at least one whole batch"
        )


def calibration_data(
    data: DataSource | None, owner: str, samples: int | None = None
) -> DataSource:
    """The data, where there is enough of it; nothing but its first batch is read.

    Args:
        data: what the user gave.
        owner: the pass that asks, for the message.
        samples: how many samples the user asked for; None for whatever there is.

    Raises:
        UsageError: there is no data, it is empty, or it holds too few samples.
    """
    if data is None:
        raise UsageError(
            f"{owner} calibrates activation ranges on data, and there is none; give "
            "calibration data (--data FILE.npz, or Context(data=...))"
        )
    first = next(iter(data), None) if len(data) else None
    if first is None or not _rows(first.inputs):
        raise UsageError(f"{owner}: the calibration data is empty; give at least one sample")
    # Batches after the first are not larger, so that this is the most that there can be.
    most = len(data) * _rows(first.inputs)
    if samples is not None and most < samples:
        raise too_few(owner, most, samples)
    return data


def too_few(owner: str, there: int, samples: int) -> UsageError:
    """The error for data that holds fewer samples than were asked for."""
    return UsageError(
        f"{owner}: samples={samples} were asked for, but the calibration data holds at most "
        f"{there}; give more data, or samples={there}"
    )


class _Shown:
    """Shows values to their observers; refuses those that have no range."""

    def __init__(self, observers: Mapping[fx.Node, Observer]) -> None:
        self.observers = observers
        self.batch = 0

    def __call__(self, node: fx.Node, value: Any) -> None:
        """Let the node's observer see its value."""
        seen = self.observers[node]
        layer = layer_name(node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise PassError(f"{layer}: only float tensors have a range to calibrate")
        if not value.numel():
            return
        least, most = bounds(value)
        if not (least >= -_MOST and most <= _MOST):
            raise PassError(
                f"{layer} ({node.name}) computes NaN, infinity or more than float32 holds on "
                f"calibration batch {self.batch}; repair data or model, or exclude the layer"
            )
        if isinstance(seen, Histogram):
            seen.take(value, least, most)
        elif isinstance(seen, MinMax):
            seen.widen(least, most)
        else:
            seen.update(value)


def layer_name(node: fx.Node) -> str:
    """What errors and remarks call a node: the path of its module, or its own name."""
    return module_path(node) or node.name


def _runs(program: Program, data: DataSource) -> Iterator[tuple[torch.Tensor, ...]]:
    """The inputs of each run: the batches, cut where the program fixes its batch size."""
    fixed = _fixed_batch(program)
    for batch in data:
        rows = _rows(batch.inputs)
        if fixed is None or rows == fixed or len(batch.inputs) != len(program.inputs):
            yield batch.inputs
            continue
        for start in range(0, rows - fixed + 1, fixed):
            yield tuple(
                tensor[start : start + fixed] if tensor.dim() and len(tensor) == rows else tensor
                for tensor in batch.inputs
            )


def _fixed_batch(program: Program) -> int | None:
    sizes = [spec.shape[0] for spec in program.inputs if spec.shape]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _rows(inputs: tuple[torch.Tensor, ...]) -> int:
    return next((len(tensor) for tensor in inputs if tensor.dim()), 1)


def _cut(
    program: Program, inputs: tuple[torch.Tensor, ...], left: int
) -> tuple[torch.Tensor, ...]:
    """At most ``left`` rows of the inputs whose first dimension is dynamic."""
    if _rows(inputs) <= left or _fixed_batch(program) is not None:
        return inputs
    return tuple(
        tensor[:left] if spec.shape and isinstance(spec.shape[0], str) else tensor
        for spec, tensor in zip(program.inputs, inputs, strict=False)
    )

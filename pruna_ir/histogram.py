"""`Histogram` counts values in bins of width w = 2**k at integer multiples of w.

Where the values outgrow its bins, w doubles and pairs of bins merge. Since k depends on the
overall range alone, the histogram of given values is the same for every order and every split of
them, and equals the one that a pass over all of them at once would give. (A convolution or linear
layer may itself round differently in batches of another size, so that values near an edge change
their bins.)
"""

from __future__ import annotations

import math

import torch

from pruna_ir.bin_counts import count_bins
from pruna_ir.divergence import halved
from pruna_ir.errors import UsageError
from pruna_ir.observers import bounds

_SMALLEST_EXPONENT = -126
"""Bins are not narrower than the smallest normal float32."""


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

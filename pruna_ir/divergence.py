"""The clipping range whose quantised distribution diverges least from the observed one.

Source: Migacz, 8-bit Inference with TensorRT, GTC 2017: values are clipped to [-t, t], counted in
bins, and quantised to the levels of the grid; of all t, the one of the least Kullback-Leibler
divergence is kept (see `divergences`). A symmetric grid sees absolute values; an asymmetric one
clips both sides at t, each as far as it goes.

One thing is added to the source: at most 1 / levels of the values may be clipped, as many as an
average level holds. Where values are few or far from 0, the divergence alone is least, and even 0,
for the range that clips nearly all of them into one bin.

Limits: a range has one threshold for both sides. Exact zeros are the caller's to leave out: all
grids represent them, and after a ReLU they would outweigh everything else.
"""

from __future__ import annotations

import math

import torch

from pruna_ir.quantization import Grid

BINS_A_LEVEL = 16
"""As many as in the original: 2048 bins for 128 levels."""


def least_divergence(counts: torch.Tensor, first: int, grid: Grid) -> int | None:
    """The threshold, in bins, of the least divergence; the largest where several are equal.

    Bins are merged in pairs until there are at most `BINS_A_LEVEL` for each level.

    Args:
        counts: [bins], the number of values in each bin.
        first: the number of the first bin, <= 0; bin 0 begins at the value 0.
        grid: the integers.

    Returns:
        The threshold, or None where there are fewer bins than levels.

    >>> counts = torch.tensor([9, 1, 9, 1, 1, 1, 0, 1])
    >>> least_divergence(counts, 0, Grid(0, 3, symmetric=False))
    5
    """
    levels = grid.qmax + 1 if grid.symmetric else grid.qmax - grid.qmin + 1
    merged = 1
    while _reach(counts, first, grid) > levels * BINS_A_LEVEL:
        counts, first = halved(counts, first)
        merged *= 2
    if grid.symmetric:
        counts, first = _folded(counts, first), 0
    least = _smallest_threshold(counts, first, levels)
    if least is None:
        return None
    thresholds = torch.arange(least, max(len(counts) + first, -first) + 1)
    outside = counts.sum() - _kept(counts, first, thresholds)
    thresholds = thresholds[outside * levels <= counts.sum()]
    found = divergences(counts, first, thresholds, levels)
    best = len(found) - 1 - int(found.flip(0).argmin())
    return int(thresholds[best]) * merged


def _kept(counts: torch.Tensor, first: int, thresholds: torch.Tensor) -> torch.Tensor:
    """How many values lie in the bins [-t, t) of each threshold t."""
    start, end = _kept_bins(counts, first, thresholds)
    sums = running_sums(counts)
    return sums[end] - sums[start]


def _kept_bins(
    counts: torch.Tensor, first: int, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions at which the bins [-t, t) of each threshold t begin and end."""
    start = (-thresholds).clamp(min=first) - first
    return start, thresholds.clamp(max=len(counts) + first) - first


def halved(counts: torch.Tensor, first: int) -> tuple[torch.Tensor, int]:
    """The same counts in bins of twice the width, and the number of their first bin."""
    before = first % 2
    after = (len(counts) + before) % 2
    padded = torch.nn.functional.pad(counts, (before, after))
    return padded.reshape(-1, 2).sum(1), first // 2


def running_sums(x: torch.Tensor) -> torch.Tensor:
    """[n + 1]: the sum of everything before each position, the whole sum at the end."""
    return torch.nn.functional.pad(torch.cumsum(x, 0), (1, 0))


def _reach(counts: torch.Tensor, first: int, grid: Grid) -> int:
    return max(len(counts) + first, -first) if grid.symmetric else len(counts)


def _folded(counts: torch.Tensor, first: int) -> torch.Tensor:
    """The counts of absolute values: what bin -1 holds goes to bin 0, and so on."""
    below, above = counts[:-first].flip(0) if first else counts[:0], counts[-first:]
    folded = torch.zeros(max(len(below), len(above)), dtype=counts.dtype)
    folded[: len(below)] += below
    folded[: len(above)] += above
    return folded


def _smallest_threshold(counts: torch.Tensor, first: int, levels: int) -> int | None:
    """The least threshold that leaves a bin for each level; None where there are too few bins."""
    if len(counts) < levels:
        return None
    shorter = min(len(counts) + first, -first)
    return levels - shorter if levels > 2 * shorter else -(-levels // 2)


def divergences(
    counts: torch.Tensor, first: int, thresholds: torch.Tensor, levels: int
) -> torch.Tensor:
    """How far a distribution is from itself, clipped to a range and quantised to levels.

    A threshold of t bins keeps the bins in [-t, t). With n of them kept,

        P   the kept counts, those outside added to the first and last kept bin, over their sum
        Q   the kept counts without those outside; level j has the bins [j * n // levels,
            (j + 1) * n // levels), and each of its non-empty bins gets the mean of them; over
            their sum
        KL  sum over bins of P * log(P / Q): infinite where P has mass that Q has not, such as
            where clipping would put values into an empty bin

    Sums over bins are differences of running sums, so that a threshold costs O(levels).

    Args:
        counts: [bins], the number of values in each bin.
        first: the number of the first bin, <= 0; bin 0 begins at the value 0.
        thresholds: [n] integers; each must keep at least ``levels`` bins.
        levels: the number of levels.

    Returns:
        [n] float64 divergences.
    """
    c = counts.double()
    start, end = _kept_bins(counts, first, thresholds)
    sums = running_sums(c), running_sums((c > 0).double()), running_sums(torch.xlogy(c, c))
    steps = torch.arange(levels + 1)
    edges = start[:, None] + steps * (end - start)[:, None] // levels  # [n, levels + 1]
    held, filled = sums[0][edges].diff(dim=1), sums[1][edges].diff(dim=1)
    kept = held.sum(1)
    total = sums[0][-1]
    below, above = sums[0][start], total - sums[0][end]
    # sum P log P and sum P log Q over the kept counts, times their total, then the outsiders.
    own = sums[2][end] - sums[2][start]
    own += _moved(c, start, below) + _moved(c, end - 1, above)
    mean = held / filled.clamp(min=1.0)
    cross = torch.xlogy(held, mean).sum(1)
    cross += torch.xlogy(below, _quantised(c, start, mean[:, 0]))
    cross += torch.xlogy(above, _quantised(c, end - 1, mean[:, -1]))
    found = (own - cross) / total - torch.log(total) + torch.log(kept)
    return torch.where(kept > 0, found, math.inf)


def _moved(counts: torch.Tensor, at: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """The change of x log x where counts are added to a bin."""
    own = counts[at]
    return torch.xlogy(own + added, own + added) - torch.xlogy(own, own)


def _quantised(counts: torch.Tensor, at: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What quantisation gives a bin: the mean of its level, 0 where the bin is empty."""
    return torch.where(counts[at] > 0, mean, 0.0)

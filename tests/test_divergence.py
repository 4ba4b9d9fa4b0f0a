"""Divergences of clipped and quantised histograms, against the definition bin by bin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.divergence import divergences, least_divergence
from pruna_ir.quantization import S8_SYMMETRIC, Grid


def divergence_reference(counts: list[int], first: int, threshold: int, levels: int) -> float:
    """Bin by bin, as the definition reads."""
    start, end = max(-threshold, first) - first, min(threshold - first, len(counts))
    kept = counts[start:end]
    p = list(kept)
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[end:])
    q = [0.0] * len(kept)
    for level in range(levels):
        bins = range(level * len(kept) // levels, (level + 1) * len(kept) // levels)
        filled = [i for i in bins if kept[i]]
        for i in filled:
            q[i] = sum(kept[i] for i in bins) / len(filled)
    if not sum(kept):
        return math.inf
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a and not b:
            return math.inf
        if a:
            total += a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
    return total


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 3) | st.integers(0, 1000), min_size=4, max_size=40),
    st.integers(0, 40), st.integers(2, 9),
)  # fmt: skip
def test_divergences_are_those_of_the_definition(
    counts: list[int], below: int, levels: int
) -> None:
    first = -min(below, len(counts) - 1)
    thresholds = [
        t
        for t in range(1, len(counts) + 1)
        if min(t, -first) + min(t, len(counts) + first) >= levels
    ]
    if not thresholds:
        return
    found = divergences(torch.tensor(counts), first, torch.tensor(thresholds), levels)
    for threshold, value in zip(thresholds, found.tolist(), strict=True):
        wanted = divergence_reference(counts, first, threshold, levels)
        assert value == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_a_histogram_with_fewer_bins_than_levels_has_no_threshold() -> None:
    assert least_divergence(torch.tensor([1, 2, 3]), 0, Grid(0, 3, symmetric=False)) is None
    assert least_divergence(torch.ones(127), 0, S8_SYMMETRIC) is None
    assert least_divergence(torch.ones(128), 0, S8_SYMMETRIC) == 128

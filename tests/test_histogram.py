"""Histograms against naive numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.histogram import Histogram
from tests.observed import seen, state, values


@settings(max_examples=100)
@given(values, st.integers(2, 50))
def test_counts_are_those_of_numpy(data: list[float], bins: int) -> None:
    histogram = seen(torch.tensor(data), bins)
    x = np.array(data, dtype=np.float64)
    assert len(histogram.counts) <= bins
    assert (histogram.low, histogram.high) == (x.min(), x.max())
    assert histogram.zeros == (x == 0).sum()
    edges = (np.arange(len(histogram.counts) + 1) + histogram.first) * histogram.width
    expected = np.histogram(x[x != 0], edges)[0]
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.total == len(data)


@settings(max_examples=100)
@given(values, st.integers(0, 40), st.integers(2, 50), st.randoms())
def test_order_and_split_do_not_matter(data: list[float], cut: int, bins: int, random) -> None:
    whole = seen(torch.tensor(data), bins)
    shuffled = list(data)
    random.shuffle(shuffled)
    split = Histogram(bins)
    parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
    for part in parts:
        split.update(torch.tensor(part))
    merged = Histogram(bins)
    for part in parts:
        merged.merge(seen(torch.tensor(part), bins))
    assert state(whole) == state(split) == state(merged)


def test_the_bins_are_as_narrow_as_the_range_allows() -> None:
    histogram = seen(torch.tensor([0.1, 1.0]), bins=16)
    assert histogram.width == 1 / 8
    histogram.update(torch.tensor([100.0]))
    assert histogram.width == 8.0
    assert histogram.counts.tolist() == [2, *[0] * 11, 1]


def test_large_tensors_are_counted_whole() -> None:
    x = torch.randn(3, 7, 99991)
    assert seen(x).total == x.numel()
    assert state(seen(x)) == state(seen(x.permute(2, 0, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    assert state(seen(x)) == state(seen(x.double()))


def test_subnormal_values_have_bins() -> None:
    histogram = seen(torch.tensor([2.0**-149, -(2.0**-149)]))
    assert histogram.total == 2
    assert histogram.width == torch.finfo(torch.float32).smallest_normal


def test_too_few_bins_are_refused() -> None:
    with pytest.raises(UsageError, match="bins"):
        Histogram(1)

"""Lists of values, and histograms of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from pruna_ir.histogram import Histogram

values = st.lists(
    st.floats(-(2.0**60), 2.0**60, allow_nan=False, width=32) | st.just(0.0),
    min_size=1, max_size=40,
)  # fmt: skip


def seen(x: torch.Tensor, bins: int = 8192) -> Histogram:
    histogram = Histogram(bins)
    histogram.update(x)
    return histogram


def state(histogram: Histogram) -> tuple[object, ...]:
    return (
        histogram.exponent, histogram.first, histogram.counts.tolist(), histogram.zeros,
        histogram.low, histogram.high,
    )  # fmt: skip

"""Minima and maxima."""

from __future__ import annotations

import torch
from hypothesis import given

from pruna_ir.observers import MinMax
from tests.observed import values


@given(values)
def test_minmax_is_exact(data: list[float]) -> None:
    observer = MinMax()
    for value in data:
        observer.update(torch.tensor([value]))
    assert (observer.low, observer.high) == (min(data), max(data))

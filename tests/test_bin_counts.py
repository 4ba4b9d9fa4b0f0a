"""Counts in bins against numpy, for every layout, dtype, sign and number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.bin_counts import count_bins, flattened

values = st.lists(
    st.floats(-100.0, 100.0, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 8.0]),
    min_size=1, max_size=50,
)  # fmt: skip


def reference(x: torch.Tensor, exponent: int, first: int, bins: int) -> tuple[list[int], int]:
    flat = x.double().flatten().numpy()
    edges = (np.arange(bins + 1) + first) * 2.0**exponent
    # numpy's last bin has its upper edge, ours has not: one more bin takes it.
    counts = np.histogram(flat[flat != 0], np.append(edges, edges[-1] + 2.0**exponent))[0]
    return counts[:-1].tolist(), int((flat == 0).sum())


def check(x: torch.Tensor, exponent: int, first: int, bins: int, *, signed: bool) -> None:
    counts = torch.full((bins,), 3)
    zeros = count_bins(x, counts, first, exponent, signed=signed)
    counts -= 3
    assert (counts.tolist(), zeros) == reference(x, exponent, first, bins)
    assert int(counts.sum()) + zeros == x.numel()


@settings(deadline=None)
@given(values, st.integers(-3, 9))
def test_signed_values(data: list[float], exponent: int) -> None:
    reach = int(128 / 2.0**exponent) + 1
    check(torch.tensor(data), exponent, -reach, 2 * reach, signed=True)


@settings(deadline=None)
@given(values, st.integers(-3, 9), st.integers(-5, 0))
def test_values_of_one_sign(data: list[float], exponent: int, first: int) -> None:
    x = torch.tensor(data).abs()
    bins = int(128 / 2.0**exponent) + 1 - first
    check(x, exponent, first, bins, signed=False)
    check(x, exponent, first, bins, signed=True)


@pytest.mark.parametrize("exponent", [-126, 0, 115, 121, 127])
def test_bins_of_every_width(exponent: int) -> None:
    width = 2.0**exponent
    x = torch.tensor([0.0, 1.0, 1.5, 0.5]) * width
    check(x, exponent, 0, 2, signed=False)
    check(torch.cat([x, -x]), exponent, -2, 4, signed=True)


def test_what_underflows_is_no_zero() -> None:
    x = torch.tensor([1e-45, 0.0])
    for signed in (False, True):
        counts = torch.zeros(3, dtype=torch.int64)
        assert count_bins(x, counts, 0, 20, signed=signed) == 1
        assert counts.tolist() == [1, 0, 0]


@pytest.mark.parametrize("bins", [2**15 - 17, 2**15 - 16, 2**15 - 1, 2**15, 40_000])
def test_as_many_bins_as_asked_for(bins: int) -> None:
    x = torch.arange(bins).float()
    check(x, 0, 0, bins, signed=False)
    check(x - 7, 0, -7, bins, signed=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("signed", [False, True])
def test_other_dtypes(dtype: torch.dtype, signed: bool) -> None:
    x = torch.linspace(-3.0 if signed else 0.0, 5.0, 77).to(dtype)
    check(x, -4, -48, 130, signed=signed)


def test_layouts_are_read_in_the_order_of_memory() -> None:
    x = torch.randn(2, 3, 5, 7)
    layouts = {
        "plain": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "with gaps": torch.randn(2, 3, 5, 14)[..., :7],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "one value": torch.tensor(1.5),
    }
    for name, value in layouts.items():
        check(value, -5, -200, 400, signed=True)
        copied = flattened(value).data_ptr() != value.data_ptr()
        assert copied == (name in ("with gaps", "expanded")), name


def test_what_a_call_leaves_behind_is_not_counted() -> None:
    for length in (300_000, 5, 70_001):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(length, dtype=dtype).relu_()
            check(x, -6, 0, 1000, signed=False)
            check(x, -6, 0, 40_000, signed=False)
            check(-x, -6, -1000, 1001, signed=True)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("signed", [False, True])
def test_several_threads_count_the_same(signed: bool, two_threads: None) -> None:
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    check(x, -6, -500, 1000, signed=signed)
    torch.set_num_threads(1)
    check(x, -6, -500, 1000, signed=signed)


def test_a_value_without_a_bin_is_no_silent_loss() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        count_bins(torch.tensor([5.0]), counts, 0, 0, signed=False)
    with pytest.raises(RuntimeError):
        count_bins(torch.tensor([-1.0, 2.0]), counts, 0, 0, signed=True)

"""Evidence: sums that combine in any order, exactly for integers, over batches, windows, ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.passes.evidence import Evidence, Window

numbers = st.floats(-1e6, 1e6, width=32)
pieces = st.lists(
    st.tuples(st.sampled_from(["a", "b", "n"]), st.lists(numbers, min_size=3, max_size=3)),
    max_size=12,
)


def gathered(given_pieces):
    evidence = Evidence()
    for key, values in given_pieces:
        kept = [int(v) for v in values] if key == "n" else values
        evidence.add(key, torch.tensor(kept))
    return evidence


def assert_equal(a, b):
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        if a[key].dtype == torch.int64:
            assert torch.equal(a[key], b[key])
        else:
            torch.testing.assert_close(a[key], b[key], rtol=1e-12, atol=1e-8)


@given(pieces, st.data())
def test_any_split_gives_the_same_sums(whole, data):
    cut = data.draw(st.integers(0, len(whole)))
    merged = gathered(whole[:cut])
    merged.merge(gathered(whole[cut:]))
    assert_equal(merged, gathered(whole))


@given(pieces, pieces, pieces)
def test_merging_is_associative_and_commutes(a, b, c):
    left = gathered(a)
    left.merge(gathered(b))
    left.merge(gathered(c))
    inner = gathered(b)
    inner.merge(gathered(c))
    right = gathered(a)
    right.merge(inner)
    assert_equal(left, right)
    turned = gathered(c)
    turned.merge(gathered(b))
    turned.merge(gathered(a))
    assert_equal(left, turned)


def test_half_precision_values_add_up_in_float64():
    evidence = Evidence()
    for _ in range(3000):
        evidence.add("x", torch.ones(1, dtype=torch.bfloat16))
    assert evidence["x"].item() == 3000.0


def test_evidence_owns_its_sums():
    value = torch.ones(2, dtype=torch.float64)
    a, b = Evidence(), Evidence()
    a.add("x", value)
    b.merge(a)
    b.add("x", value)
    assert value.tolist() == [1.0, 1.0]
    assert a["x"].tolist() == [1.0, 1.0]


def test_one_process_needs_no_ranks():
    evidence = gathered([("a", [1.0, 2.0, 3.0])])
    evidence.over_ranks()
    assert evidence["a"].tolist() == [1.0, 2.0, 3.0]


@given(st.lists(numbers, min_size=1, max_size=9), st.integers(1, 4))
def test_a_window_holds_the_last_batches(values, size):
    window = Window(size)
    for value in values:
        seen = Evidence()
        seen.add("x", torch.tensor(value))
        window.push(seen)
    assert window.total()["x"].item() == pytest.approx(sum(values[-size:]), abs=1e-6)


def test_a_window_without_batches_is_refused():
    with pytest.raises(UsageError, match="a window holds at least 1 batch, not 0"):
        Window(0)

"""Size expressions are arithmetic on dimensions, and nothing else."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import CaptureError
from pruna_ir.symbolic_sizes import evaluate_size

sizes = st.recursive(
    st.sampled_from(["n", "m"]) | st.integers(0, 9).map(str),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*"]), inner),
)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 50), st.integers(1, 50))
def test_size_expressions_are_arithmetic(text: str, n: int, m: int) -> None:
    expected = eval(text, {"n": n, "m": m})
    assert evaluate_size(text, {"n": n, "m": m}) == expected


@pytest.mark.parametrize("text", ["n.real", "print(1)", "n[0]", "'a'", "k", "n if n else 1", "1."])
def test_size_expressions_are_nothing_else(text: str) -> None:
    with pytest.raises(CaptureError):
        evaluate_size(text, {"n": 3})


def test_floor_division_is_allowed() -> None:
    assert evaluate_size("n//2 - -3", {"n": 9}) == operator.floordiv(9, 2) + 3

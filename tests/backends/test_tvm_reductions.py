"""Softmax and layer norm by rows, and functions as arithmetic, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.tvm_reductions import layer_norm, softmax
from tests.backends.tvm_expressions import Array, compiled

EPSILON = 1e-5


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 150))
def test_softmax_of_rows_of_any_length(rows: int, length: int) -> None:
    x = 5 * drawn(2, rows, length, seed=length)
    exact = torch.from_numpy(x).double().softmax(-1).numpy()
    assert np.abs(compiled(softmax, x) - exact).max() < 5e-7


def test_softmax_of_rows_with_infinities_and_nan() -> None:
    x = drawn(5, 37)
    x[1, 3:9] = -np.inf
    x[2] = -np.inf
    x[3, 20] = np.nan
    x[4] *= 1e4
    plain, masked = compiled(softmax, x), compiled(lambda a: softmax(a, masked=True), x)
    exact = torch.from_numpy(x).double().softmax(-1).numpy()
    assert np.array_equal(np.isnan(plain), np.isnan(exact))
    for result in (plain, masked):
        assert np.abs(result - exact)[[0, 1, 4]].max() < 5e-7
        assert not result[1, 3:9].any()
    assert not masked[2].any()
    assert np.isnan(masked[3]).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(2, 150), st.sampled_from([0.0, 100.0]))
def test_layer_norm_of_rows_of_any_length(rows: int, length: int, offset: float) -> None:
    x, gamma, beta = drawn(2, rows, length, seed=length) + offset, drawn(length), drawn(length)
    x = x.astype(np.float32)
    actual = compiled(lambda a, g, b: layer_norm(a, g, b, EPSILON), x, gamma, beta)
    wide = [torch.from_numpy(v).double() for v in (x, gamma, beta)]
    exact = torch.nn.functional.layer_norm(
        wide[0], (length,), wide[1], wide[2], EPSILON
    ).numpy()
    # the mean is known to a rounding of the offset, which the division by the deviation magnifies
    deviation = wide[0].var(-1, correction=0).add(EPSILON).sqrt().min().item()
    assert np.abs(actual - exact).max() < 2e-6 * (3 + (4 + offset) / deviation)


def _mapped(name: str) -> Any:
    from tvm import te, tirx

    return lambda x: te.compute(x.shape, lambda *at: getattr(tirx, name)(x(*at)), name="mapped")


POINTS = np.concatenate(
    [
        np.linspace(-120, 120, 40001),
        np.linspace(-5, 5, 40001),
        np.logspace(-30, 30, 2001),
        -np.logspace(-30, 30, 2001),
    ]
).astype(np.float32)
EXACT = {"exp": torch.exp, "erf": torch.special.erf, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize(
    ("name", "bound"), [("exp", 1e-7), ("erf", 4e-7), ("tanh", 4e-7), ("sigmoid", 2e-7)]
)
def test_functions_are_within_their_stated_errors(name: str, bound: float) -> None:
    actual = compiled(_mapped(name), POINTS).astype(np.float64)
    exact = EXACT[name](torch.from_numpy(POINTS).double()).numpy()
    assert np.array_equal(np.isnan(actual), np.isnan(exact))
    normal = (np.abs(exact) > np.finfo(np.float32).tiny) & (exact < np.finfo(np.float32).max)
    errors = np.abs(np.subtract(actual, exact, where=exact < 3.5e38, out=np.zeros_like(exact)))
    assert (errors[normal] / np.abs(exact[normal])).max() < bound
    assert errors[np.abs(exact) <= np.finfo(np.float32).tiny].max(initial=0.0) < 1e-38
    assert np.isinf(actual[exact > 3.5e38]).all()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_functions_of_infinities_and_nan(name: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0] * 8, dtype=np.float32)
    expected = EXACT[name](torch.from_numpy(x)).numpy()
    assert np.array_equal(compiled(_mapped(name), x), expected, equal_nan=True)

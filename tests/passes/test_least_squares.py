"""Least squares from moments equals least squares on all the data at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import PassError
from pruna_ir.passes.least_squares import Moments, ridge, solve


def drawn(seed, positions, groups, inputs, outputs):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, groups, inputs, generator=generator, dtype=torch.float64) + 3
    e = torch.randn(positions, groups, outputs, generator=generator, dtype=torch.float64) - 5
    return x, e


@given(
    seed=st.integers(0, 99), positions=st.integers(1, 40), groups=st.integers(1, 3),
    inputs=st.integers(1, 6), outputs=st.integers(1, 4),
    damping=st.sampled_from([1e-6, 1e-2, 1.0]), cut=st.integers(0, 40),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_solution_is_that_of_lstsq_on_the_stacked_data(
    seed, positions, groups, inputs, outputs, damping, cut
):
    x, e = drawn(seed, positions, groups, inputs, outputs)
    seen = Moments()
    for part in (slice(0, cut), slice(cut, None)):
        if len(x[part]):
            seen.update(x[part], e[part])
    change, bias = solve(seen, damping)
    for group in range(groups):
        own, wanted = x[:, group], e[:, group]
        centred, lack = own - own.mean(0), wanted - wanted.mean(0)
        strength = ridge(centred.square().sum(0).mean()[None], damping)
        stacked = torch.cat([centred, strength.sqrt() * torch.eye(inputs, dtype=torch.float64)])
        target = torch.cat([lack, torch.zeros(inputs, outputs, dtype=torch.float64)])
        expected = torch.linalg.lstsq(stacked, target, driver="gelsd").solution.T
        assert torch.allclose(change[group], expected, rtol=1e-6, atol=1e-9)
        residual = wanted - own @ change[group].T - bias[group]
        assert float(residual.mean(0).abs().max()) < 1e-9


def test_fewer_positions_than_inputs_stay_finite_and_exact():
    x, e = drawn(0, 3, 1, 8, 2)
    seen = Moments()
    seen.update(x, e)
    change, bias = solve(seen, 1e-9)
    assert torch.allclose(x[:, 0] @ change[0].T + bias[0], e[:, 0], atol=1e-6)


def test_inputs_that_never_vary_change_the_bias_alone():
    seen = Moments()
    seen.update(torch.ones(5, 1, 2), torch.full((5, 1, 1), 4.0))
    change, bias = solve(seen, 0.1)
    assert not change.any()
    assert bias.tolist() == [[4.0]]


def test_a_ridge_below_rounding_is_refused_by_name():
    x, e = drawn(0, 50, 1, 1, 1)
    seen = Moments()
    seen.update(torch.cat([x, x, x], 2) * 1e6, e)
    with pytest.raises(PassError, match="raise damping"):
        solve(seen, 1e-300)


def test_moments_about_a_large_mean_keep_their_digits():
    x, e = drawn(1, 200, 1, 3, 1)
    near, far = Moments(), Moments()
    for part in (slice(0, 30), slice(30, 200)):
        near.update(x[part], e[part])
        far.update(x[part] + 1e6, e[part])
    assert math.isclose(float(near.xx.sum()), float(far.xx.sum()), rel_tol=1e-6)


@pytest.mark.parametrize("inputs", [191, 192, 387, 770])
def test_moments_of_many_inputs_are_the_plain_product(inputs):
    """They are computed in blocks, each mirrored pair once."""
    x, e = drawn(inputs, 50, 2, inputs, 3)
    seen = Moments()
    seen.update(x, e)
    centred = (x - x.mean(0)).transpose(0, 1)
    assert torch.allclose(seen.xx, centred.mT @ centred, rtol=1e-12, atol=1e-12)

"""Learned rounding: the functions of the paper, and roundings of single maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.passes.learned_rounding import (
    Problem,
    Training,
    annealed,
    inverse,
    learn_rounding,
    nearest,
    rectified_sigmoid,
    refined,
    regulariser,
)


def problem(groups=1, outputs=3, inputs=8, rows=64, bounds=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows, inputs, generator=generator)
    weight = (3 * torch.randn(groups, outputs, inputs, generator=generator)).clamp(-7.4, 7.4)
    step = torch.rand(groups, outputs, 1, generator=generator) + 0.1
    y = x @ (weight * step).mT
    bias = torch.zeros(groups, 1, outputs)
    low, high = torch.tensor(-7.0), torch.tensor(7.0)
    return Problem(x, y, weight, step, bias, low, high, bounds)


@given(st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=50)
def test_the_rectified_sigmoid_and_its_inverse(h):
    value = torch.tensor(h, dtype=torch.float64)
    assert float(rectified_sigmoid(inverse(value))) == pytest.approx(h, abs=1e-12)


def test_the_regulariser_is_zero_at_decisions_and_largest_between():
    assert float(regulariser(torch.tensor([0.0, 1.0, 1.0]), 3.0)) == 0.0
    assert float(regulariser(torch.tensor([0.5, 0.5]), 20.0)) == 2.0
    assert float(regulariser(torch.tensor(0.25), 2.0)) == pytest.approx(0.75)
    assert annealed(0.5) == 11.0


@pytest.mark.parametrize("bounds", [None, (0.0, torch.inf), (0.0, 6.0)])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_level_is_next_to_its_weight_and_on_the_grid(groups, bounds):
    given_ = problem(groups, bounds=bounds)
    levels = learn_rounding(given_, Training(60, 32), torch.Generator().manual_seed(0))
    clipped = given_.weight.clamp(-7, 7)
    assert torch.equal(levels, levels.round())
    assert float(levels.abs().max()) <= 7
    assert float((levels - clipped).abs().max()) < 1


def test_integers_stay():
    given_ = problem()
    whole = Problem(
        given_.x, given_.y + 1, given_.weight.round(), given_.step, given_.bias, given_.low,
        given_.high,
    )  # fmt: skip
    levels = learn_rounding(whole, Training(60, 32), torch.Generator().manual_seed(0))
    assert torch.equal(levels, whole.weight.clamp(-7, 7))
    assert torch.equal(levels, nearest(whole))


def test_errors_of_dependent_inputs_cancel():
    x = torch.randn(1, 200, 1, generator=torch.Generator().manual_seed(0)).expand(1, 200, 10)
    weight = torch.linspace(1.35, 1.45, 10).reshape(1, 1, 10)
    given_ = Problem(
        x, x @ weight.mT, weight, torch.ones(1, 1, 1), torch.zeros(1, 1, 1),
        torch.tensor(-7.0), torch.tensor(7.0),
    )  # fmt: skip
    levels = learn_rounding(given_, Training(500, 64), torch.Generator().manual_seed(0))
    assert float(nearest(given_).sum()) == 10.0
    assert float(levels.sum()) == pytest.approx(14.0, abs=1.0)


def test_an_error_of_the_mean_is_made_up_for_by_refining():
    given_ = problem(inputs=16)
    shifted = Problem(
        given_.x + 1, (given_.x + 1) @ (given_.weight * given_.step).mT, given_.weight,
        given_.step, given_.bias + 0.3, given_.low, given_.high,
    )  # fmt: skip

    def lost(levels):
        made = shifted.x @ (levels * shifted.step).mT + shifted.bias
        return float((made - shifted.y).square().mean())

    assert lost(refined(shifted, nearest(shifted))) < 0.6 * lost(nearest(shifted))


@given(st.integers(0, 99), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=20)
def test_no_single_change_of_a_refined_rounding_lowers_the_error(seed, groups):
    given_ = problem(groups=groups, seed=seed, inputs=7)

    def lost(levels):
        made = given_.x @ (levels * given_.step).mT + given_.bias
        return (made - given_.y).double().square().sum(1)

    plain = nearest(given_)
    levels = refined(given_, plain)
    assert bool((lost(levels) <= lost(plain) * (1 + 1e-6)).all())
    other = given_.weight.floor().clamp(-7, 7) + given_.weight.ceil().clamp(-7, 7) - levels
    for i in range(7):
        changed = levels.clone()
        changed[..., i] = other[..., i]
        assert bool((lost(changed) >= lost(levels) * (1 - 1e-5)).all())

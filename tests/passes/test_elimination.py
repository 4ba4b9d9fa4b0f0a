"""Greedy elimination: each unit's cost at its turn, equal to refitting from scratch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.coupling import couple
from pruna_ir.passes.elimination import Columns, eliminate, obs_greedy
from pruna_ir.passes.scored_members import Candidates
from tests.passes.compensation import Residual, context, program_of


def drawn(seed, units, per_unit, outputs):
    generator = torch.Generator().manual_seed(seed)
    inputs = units * per_unit
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    table = torch.randperm(inputs, generator=generator).reshape(units, per_unit)
    return Columns(weight, x.T @ x / len(x), table)


def error_without(columns, gone):
    """The error of the best refit without some units, by lstsq from scratch."""
    lost = columns.table[gone].flatten()
    kept = [i for i in range(columns.weight.shape[1]) if i not in set(lost.tolist())]
    root = torch.linalg.cholesky(columns.covariance).T
    target = root @ columns.weight.T
    if not kept:
        return float(target.square().sum())
    best = torch.linalg.lstsq(root[:, kept], target, driver="gelsd").solution
    return float((root[:, kept] @ best - target).square().sum())


@given(seed=st.integers(0, 99), units=st.integers(1, 6), per_unit=st.integers(1, 3),
       layers=st.integers(1, 2))  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_it_is_the_naive_greedy_choice_with_refitting_from_scratch(seed, units, per_unit, layers):
    matrices = [drawn(seed + 100 * n, units, per_unit, 3) for n in range(layers)]
    score = eliminate(matrices)
    power = sum(columns.power for columns in matrices)
    gone, floor = [], 0.0
    for _ in range(units):
        now = sum(error_without(c, gone) for c in matrices) if gone else 0.0
        left = [u for u in range(units) if u not in gone]
        costs = {u: sum(error_without(c, [*gone, u]) for c in matrices) - now for u in left}
        cheapest = min(costs, key=lambda u: costs[u])
        floor = max(floor, costs[cheapest] / power)
        assert np.isclose(score[cheapest], floor, rtol=1e-5, atol=1e-8)
        gone.append(cheapest)
    assert (np.diff(score[gone]) >= 0).all()


def test_of_two_units_that_stand_in_for_one_another_one_is_cheap():
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    layer = Columns(
        torch.tensor([[1.0, 1.0, 0.1]]).double(), covariance + 1e-8 * torch.eye(3).double(),
        torch.tensor([[0], [1], [2]]),
    )  # fmt: skip
    score = eliminate([layer])
    assert score.min() < 1e-6
    assert np.argsort(score)[2] == 1


def test_a_channel_that_gives_nothing_goes_first():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    with torch.no_grad():
        program.tensor("blocks.0.3.weight")[:, 2] = 0.0
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.name == "blocks.0.0.weight[0]"]
    ((score,),) = obs_greedy(Candidates(program, coupling, groups, where))
    assert np.argsort(score)[0] == 2
    assert score[2] < 1e-12

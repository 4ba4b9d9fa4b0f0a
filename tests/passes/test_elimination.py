"""Greedy elimination: each unit's cost at its turn, equal to refitting from scratch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.coupling import couple
from pruna_ir.passes import elimination
from pruna_ir.passes.consumers import readings
from pruna_ir.passes.elimination import (
    Columns,
    columns_of,
    eliminate,
    has_bias,
    input_moments,
    obs_greedy,
    refittable,
)
from pruna_ir.passes.least_squares import ENOUGH
from pruna_ir.passes.scored_members import Candidates
from tests.passes.compensation import Layers, Residual, context, program_of


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
    root = torch.linalg.cholesky(columns.moment).T
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


def test_equal_costs_keep_the_order_of_elimination():
    """Without one of two opposed inputs the other is worth nothing, whatever its index."""
    opposed = torch.tensor([[1.0, 0.999], [0.999, 1.0]]).double()
    for table in ([[0], [1]], [[1], [0]]):
        weight = torch.tensor([[1.0, -1.001]]).double()
        score = eliminate([Columns(weight, opposed, torch.tensor(table))])
        cheaper = [unit for (unit,) in table].index(0)
        assert score[cheaper] < score[1 - cheaper] < score[cheaper] * (1 + 1e-8)


@pytest.mark.parametrize("rounds", [3, 7])
def test_several_units_a_round_go_one_after_another(monkeypatch, rounds):
    """Each of two twins is free before the other goes; a round that takes both at once would
    cost all that they carry."""
    columns = drawn(5, 20, 1, 4)
    twin = torch.zeros(20, 20, dtype=torch.float64)
    twin[range(20), [0, 0, *range(2, 20)]] = 1.0
    moment = twin @ columns.moment @ twin.T + 1e-9 * torch.eye(20, dtype=torch.float64)
    columns = Columns(columns.weight, moment, columns.table)
    alone = eliminate([columns])
    monkeypatch.setattr(elimination, "ROUNDS", rounds)
    together = eliminate([columns])
    assert np.argsort(together).tolist() == np.argsort(alone).tolist()
    assert np.allclose(together, alone, rtol=1e-6)


def one_shot(columns):
    """Units by what their lone removal costs, as the criterion obs ranks them."""
    units = len(columns.table)
    return np.argsort([error_without(columns, [unit]) for unit in range(units)], kind="stable")


def test_it_leaves_less_error_than_scores_of_single_units():
    """No theorem for several units (the first is the best by definition), so on average."""
    ratios = []
    for seed in range(12):
        columns = drawn(seed, 12, 1, 4)
        greedy, single = np.argsort(eliminate([columns])), one_shot(columns)
        assert greedy[0] == single[0]
        errors = [
            [error_without(columns, order[:count].tolist()) for count in (3, 6, 9)]
            for order in (greedy, single)
        ]
        ratios.append(np.divide(*errors))
    assert np.mean(ratios) < 0.9
    assert np.mean(np.array(ratios) <= 1 + 1e-9) > 0.9


# -- the error that the calibration data shows ---------------------------------------------------


def reading_of(program, group_name, where):
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.name == group_name]
    ((reading,),) = readings(Candidates(program, coupling, groups, where))
    layer = refittable(program, reading)
    seen = input_moments(program, {layer.node: layer}, where.data, where.seed)[layer.node]
    return reading, layer, seen


class Wide(nn.Module):
    """Six neurons, one of them nearly constant, that a layer with or without bias reads."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3, bias=bias)
        with torch.no_grad():
            self.one.weight[2] *= 0.01
            self.one.bias[2] = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_costs_the_error_that_least_squares_leaves_on_the_data(monkeypatch, bias, seed):
    """Refitting weights, and the bias where there is one, to activations from scratch."""
    monkeypatch.setattr(elimination, "DAMPING", 1e-12)
    program, where = program_of(lambda: Wide(bias), 4, seed=seed), context(4, seed=seed)
    reading, layer, seen = reading_of(program, "one.weight[0]", where)
    assert has_bias(program, layer) is bias
    score = eliminate([columns_of(program, reading, layer, seen, centred=bias)])
    (x,) = where.data.inputs
    one, two = program.tensor("one.weight"), program.tensor("two.weight").detach().double()
    with torch.no_grad():
        read = torch.relu(x @ one.T + program.tensor("one.bias")).double()
    constant = torch.ones(len(read), 1, dtype=torch.float64)
    y = read @ two.T
    power = (y - y.mean(0) * bias).square().mean(0).sum()

    def error(gone):
        inputs = read[:, [u for u in range(6) if u not in gone]]
        inputs = torch.cat([inputs, constant], 1) if bias else inputs
        best = torch.linalg.lstsq(inputs, y, driver="gelsd").solution
        return float((inputs @ best - y).square().mean(0).sum() / power)

    gone, before, floor = [], 0.0, 0.0
    for unit in np.argsort(score)[:5].tolist():
        costs = {u: error([*gone, u]) - before for u in range(6) if u not in gone}
        assert costs[unit] <= min(costs.values()) + 1e-9
        floor = max(floor, costs[unit])
        assert np.isclose(score[unit], floor, rtol=1e-4, atol=1e-8)
        gone.append(unit)
        before = error(gone)


def test_a_neuron_that_hardly_varies_is_free_only_where_a_bias_takes_up_its_mean():
    shares = {}
    for bias in (True, False):
        program, where = program_of(lambda bias=bias: Wide(bias), 4), context(4)
        coupling = couple(program)
        groups = [g for g in coupling.groups if g.name == "one.weight[0]"]
        ((score,),) = obs_greedy(Candidates(program, coupling, groups, where))
        shares[bias] = np.argsort(np.argsort(score))[2]
    assert shares[True] == 0 < shares[False]


def test_what_serves_as_a_bias():
    found = {}
    for factory, shape in ((Layers, (3, 8, 8)), (Residual, (4, 6, 6))):
        program, where = program_of(factory, *shape), context(*shape)
        coupling = couple(program)
        for each in readings(Candidates(program, coupling, coupling.groups, where)):
            for reading in each:
                if layer := refittable(program, reading):
                    found[str(layer.weight.target)] = has_bias(program, layer)
    assert found == {
        "normed.weight": True, "bare.weight": False, "weight": False, "last.weight": False,
        "blocks.0.3.weight": True, "blocks.1.3.weight": True,
    }  # fmt: skip


def test_few_samples_of_many_positions_are_seen_whole():
    """Sequences hold hundreds of positions: a fixed number of each would be too few."""
    program = program_of(lambda: Wide(bias=False), 300, 4)
    where = context(300, 4, samples=3, batch=2)
    assert reading_of(program, "one.weight[0]", where)[2].count == 900 < ENOUGH


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

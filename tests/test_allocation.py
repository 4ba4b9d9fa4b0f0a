"""Allocation: against all combinations and another solver; refusals; fronts that only fall."""

from __future__ import annotations

import time
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from pruna_ir.allocation import (
    TOLERANCE,
    Point,
    Problem,
    front,
    least_cost,
    least_loss,
    pareto,
)
from pruna_ir.errors import PrunaError, UsageError

values = st.one_of(
    st.integers(0, 12).map(float),
    st.floats(0, 1e6, allow_subnormal=False),
    st.floats(-9, 3).map(lambda power: 10.0**power),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    costs, losses = (
        tuple(tuple(draw(st.lists(values, min_size=n, max_size=n))) for n in sizes)
        for _ in range(2)
    )
    return Problem(costs, losses, draw(st.sampled_from([0.0, 7.0, 1e5])))


def everything(problem: Problem) -> list[Point]:
    return [problem.point(picks) for picks in product(*(range(len(r)) for r in problem.costs))]


def slack(rows: tuple[tuple[float, ...], ...]) -> float:
    return 2 * TOLERANCE * sum(map(max, rows))


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0, 1))
def test_no_combination_loses_less_within_the_budget(problem: Problem, share: float) -> None:
    low, high = problem.cheapest().cost, problem.finest().cost
    budget = low + share * max(high - low, 0.0)
    found = least_loss(problem, budget)
    assert found == problem.point(found.picks)
    assert found.cost <= budget + slack(problem.costs)
    best = min(point.loss for point in everything(problem) if point.cost <= budget)
    assert found.loss <= best + slack(problem.losses)


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0, 1))
def test_no_combination_is_cheaper_within_the_limit(problem: Problem, share: float) -> None:
    low, high = problem.finest().loss, problem.cheapest().loss
    limit = low + share * max(high - low, 0.0)
    found = least_cost(problem, limit)
    assert found.loss <= limit + slack(problem.losses)
    best = min(point.cost for point in everything(problem) if point.loss <= limit)
    assert found.cost <= best + slack(problem.costs)


@settings(deadline=None, max_examples=25)
@given(problems())
def test_a_front_falls_and_no_combination_is_better_than_its_points(problem: Problem) -> None:
    found = front(problem, 6)
    assert found[0].cost == problem.cheapest().cost
    assert found[-1].loss == problem.finest().loss
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in pairwise(found))
    margins = slack(problem.costs), slack(problem.losses)
    for point in found:
        assert not any(
            other.cost < point.cost - margins[0] and other.loss < point.loss - margins[1]
            for other in everything(problem)
        )


def test_of_equal_losses_the_cheapest_is_taken() -> None:
    problem = Problem(((9.0, 5.0, 2.0), (3.0, 1.0)), ((0.0, 0.0, 4.0), (1.0, 1.0)))
    assert least_loss(problem, 12.0) == Point((1, 1), 6.0, 1.0)
    assert least_cost(problem, 1.0) == Point((1, 1), 6.0, 1.0)


def test_the_checks_above_find_a_worse_choice() -> None:
    problem = Problem(((4.0, 1.0), (4.0, 1.0)), ((0.0, 5.0), (0.0, 2.0)))
    best = min(point.loss for point in everything(problem) if point.cost <= 5.0)
    assert problem.point((1, 0)).loss > best + slack(problem.losses)


def test_a_budget_that_cannot_be_kept_says_what_can() -> None:
    problem = Problem(((4.0, 2.0),), ((0.0, 5.0),), fixed=1.0)
    with pytest.raises(UsageError, match=r"budget of 2.5 cannot be kept: costs go from 3 to 5"):
        least_loss(problem, 2.5)
    with pytest.raises(UsageError, match=r"limit of -1 cannot be kept: losses go from 0 to 5"):
        least_cost(problem, -1.0)


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        ((), (), "needs items"),
        (((1.0, 2.0),), ((1.0,),), "a cost and a loss for each option"),
        (((),), ((),), "at least one option"),
        (((float("nan"),),), ((1.0,),), "finite and at least 0, not nan"),
        (((1.0,),), ((-1.0,),), "finite and at least 0, not -1"),
    ],
)
def test_tables_that_make_no_sense_are_refused(costs, losses, message) -> None:
    with pytest.raises(UsageError, match=message):
        Problem(costs, losses)


def test_a_front_needs_two_points() -> None:
    with pytest.raises(UsageError, match="at least 2 points, not 1"):
        front(Problem(((1.0,),), ((1.0,),)), 1)


def test_dominated_points_are_left_out() -> None:
    good, equal, worse = Point((0,), 1.0, 1.0), Point((1,), 1.0, 1.0), Point((2,), 2.0, 1.0)
    assert pareto([worse, equal, good]) in ([good], [equal])


def many(count: int, seed: int) -> Problem:
    """Layers of sizes and losses that differ by decades, with four widths each."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 64, count) ** 2 * 144.0
    costs = size[:, None] * np.array([32, 8, 4, 2]) / 8 + np.array([0, 512, 512, 512])
    spread = rng.uniform(0.8, 1.2, (count, 4)) * np.array([0, 1e-3, 0.1, 1.0])
    losses = 10.0 ** rng.uniform(-6, -2, count)[:, None] * spread
    return Problem(tuple(map(tuple, costs.tolist())), tuple(map(tuple, losses.tolist())))


def by_highs(problem: Problem, budget: float) -> float:
    """The least loss as a branch and bound solver finds it."""
    costs, losses = np.array(problem.costs), np.array(problem.losses)
    one_each = np.kron(np.eye(len(costs)), np.ones(costs.shape[1]))
    scale = 1e6 / losses.max(1).sum()
    answer = milp(
        losses.ravel() * scale, integrality=np.ones(losses.size, np.int64), bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1.0, 1.0),
            LinearConstraint(costs.reshape(1, -1) / budget, -np.inf, 1.0),
        ],
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    return float(answer.fun / scale)


@pytest.mark.parametrize(("count", "share"), [(20, 0.2), (60, 0.13), (60, 0.3), (150, 0.2)])
def test_a_branch_and_bound_solver_finds_nothing_better(count: int, share: float) -> None:
    problem = many(count, count)
    budget = share * sum(row[0] for row in problem.costs)
    found = least_loss(problem, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(by_highs(problem, budget), rel=1e-6)


def test_many_layers_are_solved_in_seconds() -> None:
    problem = many(400, 0)
    start = time.process_time()
    found = front(problem, 10)
    assert len(found) == 10
    assert time.process_time() - start < 30


def test_what_is_too_hard_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs and losses that are proportional: only trying all sums tells them apart."""
    costs = tuple((float(np.sqrt(2 + i)), 0.0) for i in range(24))
    losses = tuple((0.0, row[0]) for row in costs)
    monkeypatch.setattr("pruna_ir.allocation.MOST_PARTIAL", 1000)
    with pytest.raises(PrunaError, match="partial choices, more than 1,000"):
        least_loss(Problem(costs, losses), 31.4159)

"""Allocation: against all combinations, what it refuses, and fronts that only fall."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.allocation import (
    TOLERANCE,
    Point,
    Problem,
    front,
    least_cost,
    least_loss,
    pareto,
)
from pruna_ir.errors import UsageError

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


def test_many_layers_are_solved_in_seconds() -> None:
    """400 layers with four widths each, of sizes and losses that differ by six decades."""
    costs = tuple(
        tuple(float((7 + 13 * i % 61) ** 2 * bits) for bits in (32, 8, 4, 2)) for i in range(400)
    )
    losses = tuple(
        tuple(10.0 ** (i * 7919 % 600 / 100 - 6) * f for f in (0.0, 1e-3, 0.1, 1.0))
        for i in range(400)
    )
    problem = Problem(costs, losses)
    budget = 0.2 * sum(row[0] for row in costs)
    found = least_loss(problem, budget)
    assert found.cost <= budget
    uniform = problem.point([1] * 200 + [2] * 200)
    assert found.loss < uniform.loss

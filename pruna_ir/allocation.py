"""Allocation: one option for each of several items, under a budget, as an integer program.

Each item (a layer) takes exactly one of its options (widths); option j of item i costs c_ij and
loses l_ij. With x_ij in {0, 1}, x_i0 = 1 - sum_{j>0} x_ij:

    least_loss:   minimise sum l_ij x_ij    so that    fixed + sum c_ij x_ij <= budget
    least_cost:   minimise fixed + sum c_ij x_ij    so that    sum l_ij x_ij <= limit

This is the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
chapter 11). HiGHS solves it by branch and bound (`scipy.optimize.milp`) with no gap allowed; both
rows are scaled to sums of up to 1e6, so that its absolute tolerance of 1e-6 is 1e-12 of the whole.
What it returns is priced anew and, where it breaks its bound (solvers round), cut off, and the
program is solved again. Of several solutions with the least loss the cheapest is taken, and the
other way round, so that no other one is as good in both: each solution is Pareto optimal.

Limits: losses and costs are finite and not negative; they add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from pruna_ir.errors import PrunaError, UsageError

TOLERANCE = 1e-9
"""By how much, as a share of the largest possible sum, a bound may be exceeded by rounding."""
_SCALE = 1e6
_ATTEMPTS = 50
_INFEASIBLE = 2

Table = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Point:
    """One option for each item, what they cost together with the fixed part, and what they lose.

    Attributes:
        picks: the number of each item's option.
        cost: the sum of their costs and the fixed cost.
        loss: the sum of their losses.
    """

    picks: tuple[int, ...]
    cost: float
    loss: float


@dataclass(frozen=True)
class Problem:
    """Items with their options.

    Attributes:
        costs: of each item, what each of its options costs.
        losses: of each item, what each of its options loses.
        fixed: what there is to pay in any case.

    >>> problem = Problem(((4.0, 1.0), (4.0, 1.0)), ((0.0, 5.0), (0.0, 2.0)), fixed=1.0)
    >>> least_loss(problem, 6.0)
    Point(picks=(0, 1), cost=6.0, loss=2.0)
    >>> least_cost(problem, 4.9).picks
    (0, 1)
    """

    costs: tuple[tuple[float, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if not self.costs or [len(r) for r in self.costs] != [len(r) for r in self.losses]:
            raise UsageError("an allocation needs items, and a cost and a loss for each option")
        if not all(self.costs):
            raise UsageError("every item of an allocation needs at least one option")
        values = (v for row in (*self.costs, *self.losses, (self.fixed,)) for v in row)
        for value in values:
            if not (math.isfinite(value) and value >= 0.0):
                raise UsageError(f"costs and losses must be finite and at least 0, not {value}")

    def point(self, picks: Sequence[int]) -> Point:
        """What a choice of options costs and loses."""
        cost = self.fixed + math.fsum(c[j] for c, j in zip(self.costs, picks, strict=True))
        loss = math.fsum(x[j] for x, j in zip(self.losses, picks, strict=True))
        return Point(tuple(picks), cost, loss)

    def cheapest(self) -> Point:
        """The least cost that there is, at the least loss for that cost."""
        return self.point([
            min(range(len(c)), key=lambda j: (c[j], x[j]))
            for c, x in zip(self.costs, self.losses, strict=True)
        ])  # fmt: skip

    def finest(self) -> Point:
        """The least loss that there is, at the least cost for that loss."""
        return self.point([
            min(range(len(c)), key=lambda j: (x[j], c[j]))
            for c, x in zip(self.costs, self.losses, strict=True)
        ])  # fmt: skip


def least_loss(problem: Problem, budget: float) -> Point:
    """The choice of least loss whose cost is within the budget.

    Raises:
        UsageError: even the cheapest choice costs more; the message says what can be reached.
    """
    cheapest = problem.cheapest()
    if cheapest.cost > budget + _slack(problem.costs):
        raise UsageError(
            f"a budget of {budget:.6g} cannot be kept: costs go from {cheapest.cost:.6g} to "
            f"{problem.finest().cost:.6g}"
        )
    room = budget - problem.fixed
    found = problem.point(_solve(problem.losses, problem.costs, room, cheapest.picks))
    thrifty = problem.point(_solve(problem.costs, problem.losses, found.loss, found.picks))
    return _better(found, thrifty, lambda p: (p.loss <= found.loss, -p.cost))


def least_cost(problem: Problem, limit: float) -> Point:
    """The cheapest choice whose loss is within the limit.

    Raises:
        UsageError: even the finest choice loses more; the message says what can be reached.
    """
    finest = problem.finest()
    if finest.loss > limit + _slack(problem.losses):
        raise UsageError(
            f"a limit of {limit:.6g} cannot be kept: losses go from {finest.loss:.6g} to "
            f"{problem.cheapest().loss:.6g}"
        )
    found = problem.point(_solve(problem.costs, problem.losses, limit, finest.picks))
    room = found.cost - problem.fixed
    careful = problem.point(_solve(problem.losses, problem.costs, room, found.picks))
    return _better(found, careful, lambda p: (p.cost <= found.cost, -p.loss))


def front(problem: Problem, points: int) -> list[Point]:
    """Pareto optimal choices from the cheapest to the finest, by rising cost and falling loss.

    Budgets are spread evenly between the two; each is solved exactly. There may be fewer points
    than asked for where budgets lead to the same choice.

    Raises:
        UsageError: fewer than 2 points are asked for.
    """
    if points < 2:
        raise UsageError(f"a front has at least 2 points, not {points}")
    first, last = problem.cheapest(), problem.finest()
    budgets = np.linspace(first.cost, last.cost, points)[1:-1]
    found = [first, *(least_loss(problem, float(budget)) for budget in budgets), last]
    return pareto(found)


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those points than which no other is as cheap and loses as little, by rising cost.

    >>> a, b, c = Point((0,), 1.0, 5.0), Point((1,), 2.0, 5.0), Point((2,), 3.0, 1.0)
    >>> [p.cost for p in pareto([c, b, a])]
    [1.0, 3.0]
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in pairwise(kept))
    return kept


def _better(one: Point, other: Point, key: Any) -> Point:
    return max(one, other, key=key)


def _slack(rows: Sequence[Sequence[float]]) -> float:
    return TOLERANCE * math.fsum(map(max, rows))


def _solve(
    aims: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    bound: float,
    known: Sequence[int],
) -> tuple[int, ...]:
    """The picks of least aim whose weight is within a bound; ``known`` are some that are."""
    first = np.cumsum([0, *(len(row) - 1 for row in aims)])
    steps, changes = _steps(aims), _steps(weights)
    if not len(steps):
        return tuple(known)
    owner = np.repeat(np.arange(len(aims)), np.diff(first))
    one_each = np.zeros((len(aims), len(steps)))
    one_each[owner, np.arange(len(steps))] = 1.0
    most = math.fsum(map(max, weights)) or 1.0
    room = min(bound, most) - math.fsum(row[0] for row in weights)
    limits = [
        LinearConstraint(one_each, -np.inf, 1.0),
        LinearConstraint(changes[None] * (_SCALE / most), -np.inf, room * (_SCALE / most)),
    ]
    scaled = steps * (_SCALE / (math.fsum(map(max, aims)) or 1.0))
    for _ in range(_ATTEMPTS):
        answer = milp(
            scaled, integrality=np.ones(len(steps), np.int64), bounds=Bounds(0, 1),
            constraints=limits, options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if answer.status == _INFEASIBLE:
            # Rounding alone can make a bound infeasible that known picks meet exactly.
            return tuple(known)
        if answer.x is None or answer.status != 0:
            raise PrunaError(f"the integer program could not be solved: {answer.message}")
        taken = answer.x > 0.5
        picks = _picks(taken, first)
        if math.fsum(w[j] for w, j in zip(weights, picks, strict=True)) <= bound + _slack(weights):
            return picks
        cut = np.where(taken, 1.0, -1.0)
        limits.append(LinearConstraint(cut[None], -np.inf, taken.sum() - 1.0))
    raise PrunaError(
        f"the integer program could not be solved: {_ATTEMPTS} answers in a row broke their bound "
        f"of {bound:.6g}"
    )


def _steps(rows: Sequence[Sequence[float]]) -> Table:
    """What each option but the first has more than the first of its item."""
    return np.array([value - row[0] for row in rows for value in row[1:]], dtype=np.float64)


def _picks(taken: np.ndarray[Any, np.dtype[np.bool_]], first: Any) -> tuple[int, ...]:
    found = []
    for low, high in pairwise(first):
        (chosen,) = np.nonzero(taken[low:high])
        found.append(int(chosen[0]) + 1 if len(chosen) else 0)
    return tuple(found)

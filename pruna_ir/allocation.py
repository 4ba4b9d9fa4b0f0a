"""Allocation: one option for each of several items, under a budget, as an integer program.

Each item (a layer) takes exactly one of its options (widths); option j of item i costs c_ij and
loses l_ij. With x_ij in {0, 1}, sum_j x_ij = 1:

    least_loss:   minimise sum l_ij x_ij    so that    fixed + sum c_ij x_ij <= budget
    least_cost:   minimise fixed + sum c_ij x_ij    so that    sum l_ij x_ij <= limit

This is the multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004,
chapter 11). It is solved by dynamic programming over the items with bounds: of all partial choices
those stay that no other one beats in both cost and loss (section 11.5), and whose linear
relaxation, the rest of the items along their lower convex hulls (section 11.2), does not lie above
the best solution known; rounding the relaxation down gives that solution. Items with the widest
range of costs go first. Real networks leave some thousands of partial choices at most; numbers
are compared at 1e-12 of the largest possible sum.

Of several solutions with the least loss the cheapest is taken, and the other way round, so that no
other one is as good in both: each solution is Pareto optimal.

Limits: losses and costs are finite and not negative; they add up. Costs and losses that are
proportional to one another, with nothing to tell choices apart, can need too many partial choices;
that is an error (`MOST_PARTIAL`), never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pruna_ir.errors import PrunaError, UsageError

TOLERANCE = 1e-9
"""By how much, as a share of the largest possible sum, a bound may be exceeded by rounding."""
MOST_PARTIAL = 2_000_000
"""How many partial choices are kept at most."""
_EQUAL = 1e-12

Array = np.ndarray[Any, np.dtype[np.float64]]


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
    room = _room(problem, budget)
    found = problem.point(_solve(problem.losses, problem.costs, room))
    thrifty = problem.point(_solve(problem.costs, problem.losses, found.loss))
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
    found = problem.point(_solve(problem.costs, problem.losses, limit))
    room = _room(problem, found.cost)
    careful = problem.point(_solve(problem.losses, problem.costs, room))
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


def _room(problem: Problem, budget: float) -> float:
    """What is left for the items, and what adding the fixed cost may have rounded off."""
    return budget - problem.fixed + 4 * math.ulp(budget)


def _better(one: Point, other: Point, key: Any) -> Point:
    return max(one, other, key=key)


def _slack(rows: Sequence[Sequence[float]]) -> float:
    return TOLERANCE * math.fsum(map(max, rows))


def _solve(
    aims: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], bound: float
) -> tuple[int, ...]:
    """The picks of least aim whose weight is within a bound, which some must be."""
    most = math.fsum(map(max, weights))
    relaxed = _Relaxation(aims, weights)
    room = min(bound, most) + _EQUAL * most
    equal = _EQUAL * math.fsum(map(max, aims))
    spent, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[Array, Array]] = []
    best, where = math.inf, (0, 0, 0)
    for stage in range(len(aims) + 1):
        least, breaks, values = relaxed.rest(stage)
        left = room - spent - least
        # Rounding can leave a little less than no room; what is cheapest fits all the same.
        step = np.maximum(np.searchsorted(breaks, left, side="right") - 1, 0)
        rounded = lost + values[step]
        if rounded.min() < best:
            found = int(rounded.argmin())
            best, where = float(rounded[found]), (stage, found, int(step[found]))
        if stage == len(aims):
            break
        hopeful = lost + np.interp(left, breaks, values) < best - equal
        if not hopeful.any():
            break
        kept = np.flatnonzero(hopeful)
        options = relaxed.options(stage)
        next_least = relaxed.rest(stage + 1)[0]
        spent = np.add.outer(spent[kept], [weights[relaxed.order[stage]][j] for j in options])
        lost = np.add.outer(lost[kept], [aims[relaxed.order[stage]][j] for j in options])
        parent = np.repeat(kept, len(options))
        option = np.tile(options, len(kept))
        chosen = _undominated(spent.ravel(), lost.ravel(), room - next_least)
        if len(chosen) > MOST_PARTIAL:
            raise PrunaError(
                f"the integer program keeps {len(chosen):,} partial choices, more than "
                f"{MOST_PARTIAL:,}; give fewer widths, or another budget"
            )
        spent, lost = spent.ravel()[chosen], lost.ravel()[chosen]
        trail.append((parent[chosen], option[chosen]))
    return _picks(relaxed, trail, where)


def _undominated(spent: Array, lost: Array, most: float) -> Any:
    """The numbers of the partial choices within a weight that no other one beats, by weight."""
    order = np.lexsort((lost, spent))
    order = order[spent[order] <= most]
    values = lost[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(values)[:-1]])
    return order[values < before]


def _picks(
    relaxed: _Relaxation, trail: Sequence[tuple[Array, Array]], where: tuple[int, int, int]
) -> tuple[int, ...]:
    """The options of a partial choice, with the rest of the items along the relaxation."""
    stage, row, step = where
    picks = relaxed.rounded(stage, step)
    for earlier in reversed(range(stage)):
        parent, option = trail[earlier]
        picks[relaxed.order[earlier]] = int(option[row])
        row = int(parent[row])
    return tuple(picks)


class _Relaxation:
    """The linear relaxation of the last items of a program, as a function of the room left.

    Attributes:
        order: the items, those with the widest range of weights first.
    """

    def __init__(
        self, aims: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]
    ) -> None:
        self._aims, self._weights = aims, weights
        self._useful = [_useful(a, w) for a, w in zip(aims, weights, strict=True)]
        span = [
            w[useful[-1]] - w[useful[0]]
            for w, useful in zip(weights, self._useful, strict=True)
        ]
        self.order = sorted(range(len(aims)), key=lambda item: -span[item])
        steps = [
            (
                (aims[item][b] - aims[item][a]) / (weights[item][b] - weights[item][a]),
                place, number, b, weights[item][b] - weights[item][a],
                aims[item][b] - aims[item][a],
            )
            for place, item in enumerate(self.order)
            for number, (a, b) in enumerate(pairwise(_hull(self._useful[item], aims[item],
                                                           weights[item])))
        ]  # fmt: skip
        steps.sort(key=lambda step: step[:3])
        self._places = np.array([step[1] for step in steps], dtype=np.int64)
        self._options = [step[3] for step in steps]
        self._gains = np.array([step[4:] for step in steps], dtype=np.float64).reshape(-1, 2)

    def options(self, stage: int) -> list[int]:
        """The options of an item that no other of its options beats, by weight."""
        return self._useful[self.order[stage]]

    def rest(self, stage: int) -> tuple[float, Array, Array]:
        """The least weight of the items from a stage on, and what more room makes of their aims.

        Returns:
            The least weight; the room above it at which the aims stop falling along a straight
            line; and the aims there.
        """
        rest = self.order[stage:]
        least = math.fsum(self._weights[item][self._useful[item][0]] for item in rest)
        start = math.fsum(self._aims[item][self._useful[item][0]] for item in rest)
        gains = self._gains[self._places >= stage]
        path = np.cumsum(np.concatenate([[[0.0, start]], gains]), axis=0)
        return least, path[:, 0], path[:, 1]

    def rounded(self, stage: int, steps: int) -> list[int]:
        """Picks for all items, those from a stage on after so many steps of the relaxation."""
        picks = [useful[0] for useful in self._useful]
        taken = np.flatnonzero(self._places >= stage)[:steps]
        for number in taken:
            picks[self.order[self._places[number]]] = self._options[number]
        return picks


def _useful(aims: Sequence[float], weights: Sequence[float]) -> list[int]:
    """The options that no other one beats or equals in both, by rising weight."""
    kept: list[int] = []
    for option in sorted(range(len(aims)), key=lambda j: (weights[j], aims[j])):
        if not kept or aims[option] < aims[kept[-1]]:
            kept.append(option)
    return kept


def _hull(useful: Sequence[int], aims: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Those of the options that are on the lower convex hull of aim over weight."""
    hull: list[int] = []
    for c in useful:
        while len(hull) > 1:
            a, b = hull[-2:]
            rise = (aims[b] - aims[a]) * (weights[c] - weights[a])
            if rise < (aims[c] - aims[a]) * (weights[b] - weights[a]):
                break
            hull.pop()
        hull.append(c)
    return hull

"""A search for bit widths: from what layers cost and lose to a choice, a front and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, fx

from pruna_ir.allocation import Point, Problem, front, least_cost, least_loss, pareto
from pruna_ir.errors import UsageError
from pruna_ir.pareto import BitSearch, FrontPoint, LayerChoices
from pruna_ir.pareto_drawing import drawing
from pruna_ir.passes.bit_costs import CostKind, Costs, Priced
from pruna_ir.passes.bit_sensitivity import NOISE, Losses, Lost, Measure, Rounding, changes
from pruna_ir.passes.bit_widths import FLOAT
from pruna_ir.serialize import whole_file
from pruna_ir.transform import Progress


@dataclass(frozen=True)
class Search:
    """What was measured, as an integer program, and its solutions.

    Attributes:
        measure: what counts as lost.
        priced: the float program, its layers, and the program at each width.
        costs: of each layer at each width.
        losses: measures what layers lose together.
        lost: for each layer, what it loses alone, by integer width.
    """

    measure: Measure
    priced: Priced
    costs: Costs
    losses: Losses
    lost: Sequence[Mapping[str, Lost]]

    @cached_property
    def problem(self) -> Problem:
        """The integer program; its options are the widths, in their order."""
        widths = list(self.priced.programs)
        return Problem(
            tuple(tuple(row[width] for width in widths) for row in self.costs.table),
            tuple(
                tuple(max(row[w][self.measure], 0.0) if w in row else 0.0 for w in widths)
                for row in self.lost
            ),
            self.costs.fixed,
        )

    def solved(self, budget: float | None, limit: float | None) -> Point:
        """The choice of least loss within a share of the cost, or of least cost within a loss."""
        if budget is not None:
            return least_loss(self.problem, budget * self.costs.reference)
        assert limit is not None
        return least_cost(self.problem, limit)

    def widths(self, point: Point) -> dict[str, str]:
        """The width of each layer, by its path."""
        return {
            name: width
            for group, width in zip(self.priced.groups, self._words(point), strict=True)
            for name in group.names
        }

    def _words(self, point: Point) -> list[str]:
        widths = list(self.priced.programs)
        return [widths[pick] for pick in point.picks]

    def measured(self, point: Point) -> float:
        """What all layers lose together."""
        changed: dict[fx.Node, Mapping[fx.Node, Rounding | Tensor]] = {}
        for group, width in zip(self.priced.groups, self._words(point), strict=True):
            if width != FLOAT:
                changed.update(changes(self.priced.base, group, self.priced.programs[width]))
        return self.losses.together(changed)[self.measure]

    def at(self, point: Point, label: str = "") -> FrontPoint:
        """A point with its measured loss."""
        return FrontPoint(
            point.cost, point.loss, self.measured(point), self.widths(point), label
        )

    def uniform(self) -> list[FrontPoint]:
        """The points with one width for all layers."""
        count = len(self.priced.groups)
        return [
            self.at(self.problem.point([number] * count), width)
            for number, width in enumerate(self.priced.programs)
        ]

    def front(self, chosen: Point, points: int, progress: Progress) -> list[FrontPoint]:
        """Pareto optimal points, the chosen one among them, each measured."""
        found = pareto([*front(self.problem, points), chosen])
        result = []
        for done, point in enumerate(found):
            progress("points of the front", done, len(found))
            result.append(self.at(point))
        progress("points of the front", len(found), len(found))
        return result

    def layers(self) -> tuple[LayerChoices, ...]:
        """What each layer costs and loses at each width."""
        nothing = dict.fromkeys({NOISE, self.measure}, 0.0)
        return tuple(
            LayerChoices(
                str(group),
                dict(cost),
                {
                    measure: {width: lost.get(width, nothing)[measure] for width in cost}
                    for measure in sorted(nothing)
                },
            )
            for group, cost, lost in zip(
                self.priced.groups, self.costs.table, self.lost, strict=True
            )
        )


def check_budget(owner: str, kind: CostKind, budget: float, costs: Costs) -> None:
    """Refuse a budget that no choice of widths can keep.

    Raises:
        UsageError: with the least and the greatest cost that can be reached.
    """
    least, greatest = (
        costs.fixed + sum(pick(row.values()) for row in costs.table) for pick in (min, max)
    )
    if least > budget * costs.reference:
        raise UsageError(
            f"{owner}: budget={budget:g} of the {kind} cannot be kept: the widths reach from "
            f"{least / costs.reference:.1%} ({least:.6g} {costs.unit}) to "
            f"{greatest / costs.reference:.1%} ({greatest:.6g} {costs.unit}) of the float "
            f"program's {costs.reference:.6g}; raise the budget, or add narrower widths"
        )


def check_limit(owner: str, limit: float, search: Search) -> None:
    """Refuse a limit that no choice of widths is predicted to keep.

    Raises:
        UsageError: with the least and the greatest loss that can be reached.
    """
    least, greatest = search.problem.finest().loss, search.problem.cheapest().loss
    if least > limit:
        raise UsageError(
            f"{owner}: limit={limit:g} of the {search.measure} cannot be kept: the widths are "
            f"predicted to reach from {least:.4g} to {greatest:.4g}; raise the limit, or add "
            "wider widths"
        )


def save(found: BitSearch, path: Path) -> None:
    """Write a search as JSON, and its picture beside it as SVG.

    Raises:
        LoweringError: a file cannot be written.
    """
    for file, text in ((path, found.to_json()), (path.with_suffix(".svg"), drawing(found))):
        with whole_file(file) as opened:
            opened.write(text.encode())

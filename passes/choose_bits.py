"""Choose the bits of each layer under a budget, by measurement, and quantise with them.

For every layer and every width, what the outputs lose when that layer alone is quantised is
measured on data (`bit_sensitivity`), and what the layer costs is counted, or measured on the
target (`bit_costs`). One width for each layer is then an integer program (`pruna_ir.allocation`):

    minimise  sum loss(l, b_l)    so that  fixed + sum cost(l, b_l) <= budget * cost of the float
    minimise  sum cost(l, b_l)    so that  sum loss(l, b_l) <= limit

as in Yao et al., HAWQ-V3, ICML 2021, section 3.4. The sums rest on layers being independent; how
far that holds is measured: of every point of the Pareto front both the predicted and the measured
loss are saved. Then the fake-quants are inserted as insert-fake-quant does.

Cost: a calibration for each width and one more, a run of what follows each layer for each layer
and width, and a run for each point of the front. Limits: see `bit_sensitivity` and `bit_costs`. A
loss below 0 (quantising the layer helped, on these samples) counts as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pruna_ir.allocation import Point
from pruna_ir.calibration import Method, calibration_data
from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.pareto import BitSearch, FrontPoint, bits_option
from pruna_ir.passes.bit_costs import CostKind, Priced, costs_of, inserted_cost
from pruna_ir.passes.bit_search import Search, check_budget, check_limit, save
from pruna_ir.passes.bit_sensitivity import (
    Losses,
    Measure,
    has_labels,
    is_float_program,
    layer_groups,
    sensitivities,
    some_runs,
    without_fake_quants,
)
from pruna_ir.passes.bit_widths import FLOAT, parse_width
from pruna_ir.passes.calibration_runs import rows
from pruna_ir.passes.quant_insertion import DEFAULT_SAMPLES, Insertion, noise_budget
from pruna_ir.program import Program
from pruna_ir.transform import Effect, Pass, Rewrite

DEFAULT_BUDGET = 0.25
"""The share of the float program's cost where the options say nothing."""
TOLERATED = 0.03
"""By how much of the float program's cost a whole program may be above a budget unremarked."""


@dataclass(frozen=True)
class ChooseBits(Pass):
    """Give each layer the bits that a budget allows and its measured sensitivity asks for.

    Options:
        budget: the greatest cost, as a share of the float program's; 0.25 where neither this nor
            ``limit`` is given. The loss is minimised.
        limit: the greatest predicted loss, in the unit of ``measure``. The cost is minimised.
        of: what costs: ``size`` (bytes), ``operations`` (bit operations) or ``latency`` (on the
            target, by its profiler).
        measure: what is lost: ``noise`` over signal of the outputs, ``loss`` (cross entropy
            against labels, or next tokens), or ``divergence`` from the float program's classes.
        widths: what a layer may have, such as ``[w8a8, w4a8, float]``.
        points: how many budgets the Pareto front is solved for.
        samples: how many samples to calibrate and measure on; by default up to 128.
        save: a ``.json`` file for all that was measured and found; the front is drawn as an
            ``.svg`` file of the same name.
        target, ranges, percentile, weights, granularity, activations, products, exclude, sqnr_db:
            as for insert-fake-quant. Without ``sqnr_db`` the budget of noise is that of the
            narrowest of ``widths``.

    Requires: calibration data in the context, with labels for ``measure=loss``; a float program.
    """

    name: ClassVar[str] = "choose-bits"
    effect: ClassVar[Effect] = Effect.BOUNDED

    budget: float | None = None
    limit: float | None = None
    of: CostKind = "size"
    measure: Measure = "noise"
    widths: tuple[str, ...] = ("w8a8", "w4a8", FLOAT)
    points: int = 16
    samples: int | None = None
    save: str = ""
    target: str = ""
    ranges: Method = "mse"
    percentile: float = 99.99
    weights: Literal["minmax", "mse"] = "minmax"
    granularity: Literal["channel", "tensor"] = "channel"
    activations: Literal["target", "symmetric", "asymmetric"] = "target"
    products: bool | None = None
    exclude: tuple[str, ...] = ()
    sqnr_db: float | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.limit is not None:
            raise UsageError(
                f"{self.name}: give either budget, a share of the float program's cost, or limit, "
                "the greatest loss; the other is minimised"
            )
        if self.budget is not None and not self.budget > 0.0:
            raise UsageError(f"{self.name}: budget must be above 0, not {self.budget}")
        if self.limit is not None and not self.limit >= 0.0:
            raise UsageError(f"{self.name}: limit must be at least 0, not {self.limit}")
        if self.points < 2:
            raise UsageError(f"{self.name}: points must be at least 2, not {self.points}")
        if self.save and Path(self.save).suffix != ".json":
            raise UsageError(f"{self.name}: save must name a .json file, not '{self.save}'")
        self._check_widths()
        self._insertion(())

    def _check_widths(self) -> None:
        found = [parse_width(word, "widths") for word in self.widths]
        if len(set(self.widths)) < max(len(self.widths), 2) or found == [None]:
            raise UsageError(
                f"{self.name}: widths must be at least two different ones, such as [w8a8, w4a8], "
                f"not [{', '.join(self.widths)}]"
            )

    @property
    def min_sqnr_db(self) -> float:  # type: ignore[override]  # the options decide
        """The budget of the pipeline's check."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        found = [parse_width(word, "widths") for word in self.widths]
        return noise_budget(min(min(w.weight, w.activation) for w in found if w is not None))

    def _insertion(self, bits: Sequence[str]) -> Insertion:
        return Insertion(
            owner=self.name, target=self.target, ranges=self.ranges, percentile=self.percentile,
            weights=self.weights, granularity=self.granularity, activations=self.activations,
            bits=tuple(bits), products=self.products, samples=self.samples, exclude=self.exclude,
        )  # fmt: skip

    def rewrite(self, rw: Rewrite) -> None:
        """Measure, solve, insert, save."""
        batches = self._data(rw)
        priced = self._priced(rw)
        target, seed = self.target or rw.context.target, rw.context.seed
        costs = costs_of(self.of, priced, target, seed)
        budget = DEFAULT_BUDGET if self.budget is None and self.limit is None else self.budget
        if budget is not None:
            check_budget(self.name, self.of, budget, costs)
        losses = Losses(priced.base, batches, self.measure)
        lost = sensitivities(
            losses, priced.base, priced.groups, priced.quantised(), rw.context.progress
        )
        search = Search(self.measure, priced, costs, losses, lost)
        if self.limit is not None:
            check_limit(self.name, self.limit, search)
        chosen = search.solved(budget, self.limit)
        inserted = self._insert(rw, search.widths(chosen))
        kind, samples = self.of, sum(rows(rw.before, batch.inputs) for batch in batches)
        price = inserted_cost(kind, inserted, priced.base, costs, chosen.cost, target, seed)
        result = BitSearch(
            target=target, cost=kind, unit=costs.unit, measure=self.measure, samples=samples,
            reference=costs.reference, fixed=costs.fixed, layers=search.layers(),
            front=tuple(self._front(rw, search, chosen)), uniform=tuple(search.uniform()),
            chosen=search.at(chosen),
            inserted=losses.of(inserted), inserted_cost=price,
        )  # fmt: skip
        node = next(rw.calls())
        rw.note(node, result.summary())
        if budget is not None and price > (budget + TOLERATED) * costs.reference:
            rw.skip(
                node,
                f"as a whole the program costs {price:.4g} {costs.unit}, "
                f"{price / costs.reference:.1%} of the float one's and more than "
                f"budget={budget:g}: its layers' costs do not add up, as where the target "
                "converts between layers of different widths",
            )
        if self.save:
            save(result, Path(self.save))

    def _front(self, rw: Rewrite, search: Search, chosen: Point) -> list[FrontPoint]:
        """The front, which nobody sees unless it is saved."""
        return search.front(chosen, self.points, rw.context.progress) if self.save else []

    def _data(self, rw: Rewrite) -> list[Batch]:
        """The runs to measure on; what cannot be measured is refused here, before any work."""
        if not is_float_program(rw.before):
            raise UsageError(f"{self.name} starts from a float program; this one is quantised")
        data = calibration_data(rw.context.data, self.name, self.samples)
        batches = some_runs(rw.before, data, self.samples or DEFAULT_SAMPLES)
        if self.measure == "loss" and not has_labels(rw.before, batches[0]):
            raise UsageError(
                f"{self.name}: measure=loss needs labels, and the data has none; give labels, or "
                "take measure=noise or measure=divergence"
            )
        return batches

    def _priced(self, rw: Rewrite) -> Priced:
        """The program at each width, and as it is without fake-quants."""
        programs: dict[str, Program] = {}
        integers = [width for width in self.widths if width != FLOAT]
        for width in integers:
            trial = Rewrite(rw.before, self.name, rw.context)
            self._insertion((width,)).insert(trial)
            programs[width] = trial.finish()
        base = without_fake_quants(programs[integers[0]])
        base = replace(base, attributes=rw.before.attributes)
        groups = [
            group for group in layer_groups(base, list(programs.values()))
            if all(rw.in_scope(node) for node in group.nodes)
        ]  # fmt: skip
        if not groups:
            raise UsageError(f"{self.name}: there is no layer here that could be quantised")
        return Priced(base, groups, {width: programs.get(width, base) for width in self.widths})

    def _insert(self, rw: Rewrite, widths: Mapping[str, str]) -> Program:
        """Quantise the program under rewrite; returns what it is then."""
        if set(widths.values()) != {FLOAT}:
            self._insertion(bits_option(widths)).insert(rw)
        rw.refresh()
        return rw.program.fork()

"""Sensitivity: what the outputs lose, as measured, when a group alone loses some of its units.

How many units each group can spare cannot be read off their scores: an error early in a network
may vanish or grow on its way, and errors at all positions of a layer may cancel or add up. Here it
is measured. A criterion says in which order the units of a group go; at several levels

    E(k) = sum over outputs of  mean (y - y_k)^2 / Var(y)

is the error of the whole program without the first k of them, with the layers that read the group
refitted to the survivors in closed form (`least_squares`; He et al., Channel Pruning, ICCV 2017),
everything else as it was. Errors of several groups add up nearly as long as they are small, so
that the best plan for a budget is a knapsack: along the lower convex hull of E over the cost
removed, the cheapest step of all groups goes first. The score of a unit is the slope of its step:

    s(u) = dE / dcost at u's place in the order

so that a global ranking by s is that greedy solution. Sources: layer-wise sensitivity for pruning,
Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.2; budgets from additive
errors measured layer by layer: Frantar and Alistarh, SPDY, ICML 2022; ZipLM, NeurIPS 2023.

Cost: groups times levels times the part of the program behind the group, over at most `SAMPLES`
samples of the data (whole batches). Groups that no refittable layer reads are removed for good and
the smaller program is run; consumers that cannot be refitted read zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pruna_ir.coupling import Coupling, Group
from pruna_ir.errors import UsageError
from pruna_ir.passes.consumers import Reading, readings
from pruna_ir.passes.elimination import Columns, columns_of, input_moments, refittable
from pruna_ir.passes.layer_inputs import Frontier, Inputs, batches_of
from pruna_ir.passes.least_squares import Moments
from pruna_ir.passes.linear_layers import Layer
from pruna_ir.passes.scored_members import Candidates, Scores
from pruna_ir.program import Program

LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""The shares of a group that are tried; 1 stands for all but one."""
SAMPLES = 128
"""How many samples are run for each level."""

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Without:
    """What differs when a group lacks some units: per consumer, what it reads and computes."""

    zeroed: Mapping[fx.Node, tuple[fx.Node, int, Tensor]]
    """Consumer -> its source, the dimension, and the channels that are zero."""
    refitted: Mapping[fx.Node, tuple[fx.Node, Tensor, Tensor, int]]
    """Consumer -> its weight's node, the new weight, what is added to the output, and where."""


def sensitivities(
    candidates: Candidates,
    orders: Sequence[Scores],
    removed: Callable[[Mask], float],
    smaller: Callable[[Mask], Program],
) -> list[Scores]:
    """For each unit of every group, the error that its removal adds per cost that it saves.

    Args:
        candidates: the groups, with the calibration data in their context.
        orders: one score a unit, whose order within a group is that in which units go.
        removed: the share of the cost that a selection of units removes.
        smaller: the program without a selection of units.

    Raises:
        UsageError: there is no calibration data, or no output of floating-point numbers.
    """
    context, program = candidates.context, candidates.program
    if context.data is None:
        raise UsageError(
            "ranking=sensitivity needs calibration data: give --data FILE.npz, or "
            "Context(data=...)"
        )
    found = readings(candidates)
    layers = {
        r.consumer.node: layer
        for each in found for r in each
        if (layer := refittable(program, r)) is not None
    }  # fmt: skip
    moments = input_moments(program, layers, context.data, context.seed)
    run = _Run(program, _some(batches_of(program, context.data)))
    place = {node: number for number, node in enumerate(program.calls())}
    curves: dict[int, tuple[list[int], list[float]]] = {}
    first = [min((place[r.consumer.node] for r in each), default=0) for each in found]
    for done, number in enumerate(sorted(range(len(found)), key=lambda n: first[n])):
        context.progress("sensitivity of groups", done, len(found))
        order = np.argsort(orders[number], kind="stable")
        counts = _levels(len(order))
        errors = []
        for count in counts:
            gone = order[:count]
            if found[number]:
                change = _without(program, found[number], gone, layers, moments)
                errors.append(run.error(change))
            else:
                mask = _mask(candidates.coupling, candidates.groups[number], gone)
                errors.append(run.error_of(smaller(mask)))
        curves[number] = (counts, errors)
    base = removed(np.zeros(len(candidates.coupling.solved.frozen), np.bool_))

    def saved(group: Group, gone: Ids) -> float:
        return removed(_mask(candidates.coupling, group, gone)) - base

    return [
        _slopes(group, np.argsort(orders[number], kind="stable"), *curves[number], saved)
        for number, group in enumerate(candidates.groups)
    ]


def _levels(units: int) -> list[int]:
    return sorted({min(max(1, round(level * units)), units - 1) for level in LEVELS})


def _some(batches: Sequence[Inputs]) -> list[Inputs]:
    found: list[Inputs] = []
    for inputs in batches:
        found.append(inputs)
        if sum(len(x[0]) for x in found) >= SAMPLES:
            break
    return found


def _mask(coupling: Coupling, group: Group, gone: Ids) -> Mask:
    mask = np.zeros(len(coupling.solved.frozen), np.bool_)
    mask[group.units[gone]] = True
    return mask


def _without(
    program: Program,
    found: Sequence[Reading],
    gone: Ids,
    layers: Mapping[fx.Node, Layer],
    moments: Mapping[fx.Node, Moments],
) -> Without:
    """What the consumers of a group read and compute without some of its units."""
    zeroed: dict[fx.Node, tuple[fx.Node, int, Tensor]] = {}
    refitted: dict[fx.Node, tuple[fx.Node, Tensor, Tensor, int]] = {}
    for reading in found:
        consumer = reading.consumer
        if consumer.node not in layers:
            channels = torch.from_numpy(reading.table[gone].flatten())
            zeroed[consumer.node] = (consumer.source, consumer.axis, channels)
            continue
        layer, seen = layers[consumer.node], moments[consumer.node]
        columns = columns_of(program, reading, layer, seen, centred=True)
        fitted = _refit(columns, columns.table[torch.from_numpy(gone)].flatten())
        shift = (columns.weight - fitted) @ seen.mean_x[0].cpu()
        old = program.tensor(str(layer.weight.target)).detach()
        weight = layer.weight_of(fitted[None], old.shape).to(old.device, old.dtype)
        refitted[consumer.node] = (
            layer.weight, weight, shift.to(old.device, old.dtype), layer.channel_dim
        )  # fmt: skip
    return Without(zeroed, refitted)


def _refit(columns: Columns, gone: Tensor) -> Tensor:
    """The weight with zeros for some inputs and the others refitted, [outputs, inputs]."""
    stays = torch.ones(columns.weight.shape[1], dtype=torch.bool)
    stays[gone] = False
    survivors = stays.nonzero().flatten()
    system = columns.moment[survivors][:, survivors]
    cross = columns.moment[survivors][:, gone] @ columns.weight[:, gone].T
    fitted = torch.zeros_like(columns.weight)
    fitted[:, survivors] = columns.weight[:, survivors] + torch.linalg.solve(system, cross).T
    return fitted


class _Run:
    """The program over some data, continued with changes from wherever they begin."""

    def __init__(self, program: Program, batches: Sequence[Inputs]) -> None:
        self._program, self._batches = program, batches
        self._frontier = Frontier(program, batches)
        with torch.no_grad():
            self._wanted = [self._outputs(program(*inputs)) for inputs in batches]
        joined = [torch.cat(parts) for parts in zip(*self._wanted, strict=True)]
        self._power = [float((y - y.mean(0)).square().sum()) for y in joined]
        if not any(self._power):
            raise UsageError(
                "ranking=sensitivity needs an output of numbers that vary over the data"
            )
        self._last = {
            operand: node for node in program.graph.nodes for operand in node.all_input_nodes
        }

    def error(self, change: Without) -> float:
        """The error of the outputs with a change; changes must come in the graph's order."""
        changed = {*change.zeroed, *change.refitted}
        self._frontier.reach(next(n for n in self._program.calls() if n in changed))
        return self._compared(
            self._continued(batch, change) for batch in range(len(self._batches))
        )

    def error_of(self, program: Program) -> float:
        """The error of the outputs of another program."""
        with torch.no_grad():
            return self._compared(program(*inputs) for inputs in self._batches)

    def _compared(self, found: Iterable[Sequence[Tensor]]) -> float:
        errors = [0.0] * len(self._power)
        for outputs, wanted in zip(found, self._wanted, strict=True):
            for number, (y, reference) in enumerate(
                zip(self._outputs(outputs), wanted, strict=True)
            ):
                errors[number] += float((y - reference).square().sum())
        return sum(e / power for e, power in zip(errors, self._power, strict=True) if power > 0)

    @staticmethod
    def _outputs(values: Sequence[Tensor]) -> list[Tensor]:
        return [y.double().cpu() for y in values if y.dtype.is_floating_point]

    def _continued(self, batch: int, change: Without) -> list[Tensor]:
        """The outputs of one batch, from the frontier on."""
        env: dict[fx.Node, Any] = {}
        for node in self._frontier.ahead():
            env[node] = self._changed(node, batch, change, env)
            for operand in node.all_input_nodes:
                if self._last[operand] is node:
                    env.pop(operand, None)
        return [
            env[n] if n in env else self._frontier.values(n)[batch]
            for n in self._program.results()
        ]

    def _changed(
        self, node: fx.Node, batch: int, change: Without, env: dict[fx.Node, Any]
    ) -> Any:
        if node in change.zeroed:
            source, dim, channels = change.zeroed[node]
            x = env[source] if source in env else self._frontier.values(source)[batch]
            masked = x.index_fill(dim, channels.to(x.device), 0.0)
            return self._frontier.evaluate(node, batch, {**env, source: masked})
        if node in change.refitted:
            weight, value, shift, dim = change.refitted[node]
            y = self._frontier.evaluate(node, batch, {**env, weight: value})
            return y + shift.reshape(-1, *[1] * (y.dim() - 2)) if dim == 1 else y + shift
        return self._frontier.evaluate(node, batch, env)


def _slopes(
    group: Group,
    order: Ids,
    counts: Sequence[int],
    errors: Sequence[float],
    saved: Callable[[Group, Ids], float],
) -> Scores:
    """The error added per cost saved at each unit's place, along the curve's lower convex hull."""
    costs = [saved(group, order[:count]) for count in counts]
    hull = _hull([(0, 0.0, 0.0), *zip(counts, costs, errors, strict=True)])
    middles, slopes = [], []
    for (k, cost, error), (next_k, next_cost, next_error) in pairwise(hull):
        middles.append((k + next_k) / 2)
        slopes.append(max(next_error - error, 0.0) / max(next_cost - cost, 1e-12))
    places = np.arange(len(order)) + 0.5
    along = np.interp(places, middles, slopes)
    # Units of equal slope keep their order.
    along += places * (1e-9 * (max(slopes) or 1.0) / len(order))
    scores = np.zeros(len(order))
    scores[order] = along
    return scores


def _hull(points: Sequence[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """The lower convex hull of (place, cost, error), by cost.

    >>> _hull([(0, 0.0, 0.0), (1, 1.0, 5.0), (2, 2.0, 6.0), (3, 3.0, 30.0)])
    [(0, 0.0, 0.0), (2, 2.0, 6.0), (3, 3.0, 30.0)]
    """
    hull: list[tuple[int, float, float]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(
    a: tuple[int, float, float], b: tuple[int, float, float], c: tuple[int, float, float]
) -> bool:
    """Whether b is not below the line from a to c."""
    return (b[2] - a[2]) * (c[1] - a[1]) >= (c[2] - a[2]) * (b[1] - a[1])

"""Elimination: units leave one after another, each time the one whose loss refitting mends best.

A layer y = W x that reads a group's channels, with H the second moment of x, is left with the
squared error per position (after all of its other columns are refitted to y)

    c(u) = trace(W_u ((H^-1)_uu)^-1 W_u^T)                    u: the columns of a unit

when unit u goes. Where the layer has a bias, or a batch norm or an addition that serves as one,
that takes up what a unit gives on average, and H is the covariance; else H is E[x x^T], so that a
unit that hardly varies is not free. Optimal Brain Surgeon removes the cheapest, updates and goes
on:

    W <- W - W_u ((H^-1)_uu)^-1 (H^-1)_u:        H^-1 <- H^-1 - (H^-1)_:u ((H^-1)_uu)^-1 (H^-1)_u:

so that of two units that stand in for one another only one is cheap. Sources: Hassibi and Stork,
Optimal Brain Surgeon, NeurIPS 1992; for whole structures with updates, Kurtic, Frantar and
Alistarh, ZipLM, NeurIPS 2023, section 3.1. Columns of a convolution are whole patches.

The score of a unit is what its removal cost at its turn, as a share of the power of the layers'
outputs (trace(W H W^T), summed), and more than that of any unit removed before it: the order of
the scores is the order of elimination, and as shares of an output they compare over groups.

Limits: each choice is the cheapest, which for several units together need not be the best. Groups
of more than `ROUNDS` units lose several a round: they too leave one after another with exact
updates, but only those that were cheapest at the round's start are looked at. H is only as good as
the positions are many: from 2.4 positions an input the elimination of a language model's neurons
chose worse than scores of single units from 39 did. Layers of more than
`LARGEST` inputs, grouped and transposed convolutions and weights computed in the graph are not
looked at; a group that only such layers read is scored by the squares of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from pruna_ir.data import DataSource
from pruna_ir.passes.consumers import Reading, readings
from pruna_ir.passes.layer_inputs import Frontier, batches_of
from pruna_ir.passes.least_squares import Moments, enough, ridge
from pruna_ir.passes.linear_layers import Layer, layer_at, tail, why_no_matrix
from pruna_ir.passes.scored_members import Candidates, Parts, Scores
from pruna_ir.program import Program

ROUNDS = 256
"""In how many rounds a group is eliminated at most."""
_POOL = 64
"""How many of the cheapest units a round of several looks at, at least."""
LARGEST = 4608
"""The most inputs (channels times taps) of a layer whose columns are refitted."""
DAMPING = 0.01
"""What is added to H's diagonal, as a share of its mean."""
POSITIONS = 32
"""Positions of a sample from which H is taken, at least."""


@dataclass
class Columns:
    """A layer of a group as a matrix.

    Attributes:
        weight: [outputs, inputs] float64.
        moment: the second moment of its inputs, damped, [inputs, inputs] float64.
        table: the inputs of each unit, [units, per unit] int64.
    """

    weight: Tensor
    moment: Tensor
    table: Tensor

    @property
    def power(self) -> float:
        """The summed second moments of the outputs."""
        return float(((self.weight @ self.moment) * self.weight).sum())


def obs_greedy(candidates: Candidates) -> list[Parts]:
    """What the removal of each unit costs at its turn of a greedy elimination with refitting."""
    found = readings(candidates)
    layers = {
        reading.consumer.node: layer
        for each in found
        for reading in each
        if (layer := refittable(candidates.program, reading)) is not None
    }
    data = candidates.context.data
    assert data is not None, "importance.scores asks for data"
    seen = input_moments(candidates.program, layers, data, candidates.context.seed)
    return [[_eliminated(candidates.program, each, layers, seen)] for each in found]


def refittable(program: Program, reading: Reading) -> Layer | None:
    """The layer that reads a group, where its columns can be refitted."""
    layer = layer_at(program, reading.consumer.node)
    if layer is None or layer.input is not reading.consumer.source or why_no_matrix(layer):
        return None
    inputs = layer.matrix(program.tensor(str(layer.weight.target)).detach()).shape[-1]
    return layer if layer.groups == 1 and inputs <= LARGEST else None


def input_moments(
    program: Program, layers: Mapping[fx.Node, Layer], data: DataSource, seed: int
) -> dict[fx.Node, Moments]:
    """The mean and centred second moments of what each layer reads, from one run over the data."""
    frontier = Frontier(program, batches_of(program, data))
    found: dict[fx.Node, Moments] = {}
    for node in program.calls():
        if node not in layers:
            continue
        layer = layers[node]
        frontier.reach(node)
        inputs: list[Tensor] = frontier.values(layer.input)
        frontier.pass_by(node)
        outputs = frontier.values(node)
        moments = Moments()
        each = enough(POSITIONS, sum(map(len, inputs)))
        for batch, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            generator = torch.Generator().manual_seed(seed + batch)
            rows = y.numel() // y.shape[layer.channel_dim]
            chosen = torch.randperm(rows, generator=generator)[: each * len(x)]
            patches = layer.patches(x, chosen.to(x.device))
            moments.update(patches, patches.new_zeros(len(chosen), 1, 1))
        found[node] = moments
    return found


def columns_of(
    program: Program, reading: Reading, layer: Layer, seen: Moments, *, centred: bool
) -> Columns:
    """A layer that reads a group, as a matrix with the second moment of its inputs.

    Args:
        program: the program.
        reading: what the layer reads of the group.
        layer: the layer.
        seen: the moments of its inputs.
        centred: take the covariance: the mean is made up for by a bias.
    """
    weight = layer.matrix(program.tensor(str(layer.weight.target)).detach().double())[0].cpu()
    moment = seen.xx[0].cpu() / seen.count
    if not centred:
        moment = moment + torch.outer(seen.mean_x[0], seen.mean_x[0]).cpu()
    strength = ridge(moment.diagonal().mean()[None], DAMPING)
    moment = moment + strength * torch.eye(len(moment), dtype=torch.float64)
    taps = weight.shape[1] // reading.consumer.size
    table = torch.from_numpy(reading.table)[:, :, None] * taps + torch.arange(taps)
    return Columns(weight, moment, table.flatten(1))


def has_bias(program: Program, layer: Layer) -> bool:
    """Whether a bias, a batch norm or an addition behind a layer takes up a change of its mean."""
    behind = tail(program, layer.node, residual=False)
    return any(part is not None for part in (layer.bias, behind.norm, behind.addition))


def _eliminated(
    program: Program,
    found: Sequence[Reading],
    layers: Mapping[fx.Node, Layer],
    seen: Mapping[fx.Node, Moments],
) -> Scores:
    """The score of each unit of one group."""
    matrices = [
        columns_of(
            program, reading, layers[node], seen[node], centred=has_bias(program, layers[node])
        )
        for reading in found
        if (node := reading.consumer.node) in layers
    ]
    if matrices:
        return eliminate(matrices)
    # No layer can be refitted: the weights of what reads the group must do.
    total = np.zeros(found[0].units)
    for reading in found:
        columns = reading.consumer.columns(program).double()
        total += reading.per_unit(columns.square().sum(1).cpu().numpy())
    return total


def eliminate(matrices: Sequence[Columns]) -> Scores:
    """What each unit costs at its turn, as a share of the outputs' power; [units], float64.

    >>> twins = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    >>> layer = Columns(torch.tensor([[1.0, 1.0, 0.5]]).double(), twins + 1e-6 * torch.eye(3),
    ...                 torch.tensor([[0], [1], [2]]))
    >>> eliminate([layer]).round(3).tolist()        # one twin costs nothing, the other much
    [0.0, 0.941, 0.059]
    """
    units = len(matrices[0].table)
    power = sum(columns.power for columns in matrices)
    states = [
        _State(c.weight.clone(), torch.linalg.inv(c.moment), c.table) for c in matrices
    ]  # fmt: skip
    rounds = min(units, ROUNDS)
    left = torch.arange(units)
    order: list[int] = []
    costs: list[float] = []
    for round_ in range(rounds):
        count = math.ceil(len(left) / (rounds - round_))
        places, found = _cheapest(states, left, count)
        order += left[places].tolist()
        costs += found
        for state in states:
            _remove(state, left[places])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[places] = False
        left = left[stays]
    return _rising(order, costs, power)


@dataclass
class _State:
    """A layer in the course of an elimination; the columns of units that are gone are void.

    Attributes:
        weight: refitted, [outputs, inputs].
        inverse: of the second moment of the inputs that are left, [inputs, inputs].
        table: the inputs of each unit, [units, per unit].
    """

    weight: Tensor
    inverse: Tensor
    table: Tensor

    def of(self, units: Tensor) -> _State:
        """The part of some units; updates of the part are those of the whole."""
        index = self.table[units].flatten()
        table = torch.arange(len(index)).reshape(len(units), -1)
        return _State(self.weight[:, index], self.inverse[index][:, index], table)


def _cheapest(
    states: Sequence[_State], left: Tensor, count: int
) -> tuple[Tensor, list[float]]:
    """The places in ``left`` of the next units that go, in order, and what each costs."""
    total = _costs(states, left)
    order = torch.argsort(total, stable=True)
    if count == 1:
        return order[:1], total[order[:1]].tolist()
    pool = order[: max(4 * count, _POOL)]
    parts = [state.of(left[pool]) for state in states]
    remaining, chosen, costs = torch.arange(len(pool)), [], []
    for _ in range(count):
        total = _costs(parts, remaining)
        at = int(total.argmin())
        chosen.append(int(remaining[at]))
        costs.append(float(total[at]))
        for part in parts:
            _remove(part, remaining[at : at + 1])
        remaining = torch.cat([remaining[:at], remaining[at + 1 :]])
    return pool[chosen], costs


def _rising(order: Sequence[int], costs: Sequence[float], power: float) -> Scores:
    """Costs as shares that rise along the order: a unit never scores less than one before it."""
    shares = np.maximum.accumulate(np.array(costs) / power if power > 0 else np.zeros(len(costs)))
    score = np.zeros(len(order))
    # Of equal shares too the unit that went earlier scores less.
    score[list(order)] = shares + np.arange(len(order)) * (
        1e-9 * (float(shares[-1]) or 1.0) / len(order)
    )
    return score


def _costs(states: Sequence[_State], units: Tensor) -> Tensor:
    """trace(W_u ((H^-1)_uu)^-1 W_u^T) of each unit, summed over the layers."""
    total = torch.zeros(len(units), dtype=torch.float64)
    for state in states:
        table = state.table[units]
        blocks = state.inverse[table[:, :, None], table[:, None, :]]
        own = state.weight[:, table].movedim(0, 2)  # [units, per unit, outputs]
        total += (own * torch.linalg.solve(blocks, own)).sum((1, 2)).clamp_min(0.0)
    return total


def _remove(state: _State, units: Tensor) -> None:
    """The rest refitted without some units, in place."""
    gone = state.table[units].flatten()
    weight, inverse = state.weight, state.inverse
    step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight -= weight[:, gone] @ step
    inverse -= inverse[:, gone] @ step

"""Elimination: units leave one after another, each time the one whose loss refitting mends best.

A layer y = W x that reads a group's channels, with H the covariance of x, is left with the squared
error per position (after all of its other columns are refitted to y)

    c(u) = trace(W_u ((H^-1)_uu)^-1 W_u^T)                    u: the columns of a unit

when unit u goes. Optimal Brain Surgeon removes the cheapest, updates and goes on:

    W <- W - W_u ((H^-1)_uu)^-1 (H^-1)_u:        H^-1 <- H^-1 - (H^-1)_:u ((H^-1)_uu)^-1 (H^-1)_u:

so that of two units that stand in for one another only one is cheap. Sources: Hassibi and Stork,
Optimal Brain Surgeon, NeurIPS 1992; for whole structures with updates, Kurtic, Frantar and
Alistarh, ZipLM, NeurIPS 2023, section 3.1. Columns of a convolution are whole patches.

The score of a unit is what its removal cost at its turn, as a share of the power of the layers'
outputs (their variance, summed), never less than that of a unit removed before it: the order of
the scores is the order of elimination, and as shares of an output they compare over groups.

Limits: groups of more than `ROUNDS` units lose several at a time. Layers of more than
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
from pruna_ir.passes.least_squares import Moments, ridge
from pruna_ir.passes.linear_layers import Layer, layer_at, why_no_matrix
from pruna_ir.passes.scored_members import Candidates, Parts, Scores
from pruna_ir.program import Program

ROUNDS = 128
"""In how many rounds a group is eliminated at most."""
LARGEST = 4608
"""The most inputs (channels times taps) of a layer whose columns are refitted."""
DAMPING = 0.01
"""What is added to H's diagonal, as a share of its mean."""
POSITIONS = 32
"""Positions of a sample from which H is taken."""


@dataclass
class Columns:
    """A layer of a group as a matrix.

    Attributes:
        weight: [outputs, inputs] float64.
        covariance: of its inputs, damped, [inputs, inputs] float64.
        table: the inputs of each unit, [units, per unit] int64.
    """

    weight: Tensor
    covariance: Tensor
    table: Tensor

    @property
    def power(self) -> float:
        """The summed variance of the outputs."""
        return float(((self.weight @ self.covariance) * self.weight).sum())


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
        frontier.reach(node)
        moments = Moments()
        for batch, x in enumerate(frontier.values(layers[node].input)):
            rows = _rows(layers[node], frontier.evaluate(node, batch))
            generator = torch.Generator().manual_seed(seed + batch)
            chosen = torch.randperm(rows, generator=generator)[: POSITIONS * len(x)]
            patches = layers[node].patches(x, chosen.to(x.device))
            moments.update(patches, patches.new_zeros(len(chosen), 1, 1))
        found[node] = moments
    return found


def _rows(layer: Layer, y: Tensor) -> int:
    return y.numel() // y.shape[layer.channel_dim]


def columns_of(program: Program, reading: Reading, layer: Layer, seen: Moments) -> Columns:
    """A layer that reads a group, as a matrix with the covariance of its inputs."""
    weight = layer.matrix(program.tensor(str(layer.weight.target)).detach().double())[0].cpu()
    covariance = seen.xx[0].cpu() / seen.count
    strength = ridge(covariance.diagonal().mean()[None], DAMPING)
    covariance = covariance + strength * torch.eye(len(covariance), dtype=torch.float64)
    taps = weight.shape[1] // reading.consumer.size
    table = torch.from_numpy(reading.table)[:, :, None] * taps + torch.arange(taps)
    return Columns(weight, covariance, table.flatten(1))


def _eliminated(
    program: Program,
    found: Sequence[Reading],
    layers: Mapping[fx.Node, Layer],
    seen: Mapping[fx.Node, Moments],
) -> Scores:
    """The score of each unit of one group."""
    matrices = [
        columns_of(program, reading, layers[node], seen[node])
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
    weights = [columns.weight.clone() for columns in matrices]
    inverses = [torch.linalg.inv(columns.covariance) for columns in matrices]
    left = torch.arange(units)
    score = np.zeros(units)
    floor = 0.0
    for round_ in range(min(units, ROUNDS)):
        total = torch.zeros(len(left), dtype=torch.float64)
        for columns, weight, inverse in zip(matrices, weights, inverses, strict=True):
            total += _costs(weight, inverse, columns.table[left])
        count = math.ceil(len(left) / (min(units, ROUNDS) - round_))
        order = torch.argsort(total, stable=True)[:count]
        for at in order.tolist():
            floor = max(floor, float(total[at]) / power if power > 0 else 0.0)
            score[int(left[at])] = floor
        for columns, weight, inverse in zip(matrices, weights, inverses, strict=True):
            _remove(weight, inverse, columns.table[left[order]].flatten())
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[order] = False
        left = left[stays]
    return score


def _costs(weight: Tensor, inverse: Tensor, table: Tensor) -> Tensor:
    """trace(W_u ((H^-1)_uu)^-1 W_u^T) for each row u of the table."""
    blocks = inverse[table[:, :, None], table[:, None, :]]
    own = weight[:, table].movedim(0, 2)  # [units, per unit, outputs]
    costs: Tensor = (own * torch.linalg.solve(blocks, own)).sum((1, 2))
    return costs.clamp_min(0.0)


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """The rest refitted without some inputs, in place."""
    step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight -= weight[:, gone] @ step
    inverse -= inverse[:, gone] @ step
    weight[:, gone] = 0.0
    inverse[gone] = 0.0
    inverse[:, gone] = 0.0
    inverse[gone, gone] = 1.0

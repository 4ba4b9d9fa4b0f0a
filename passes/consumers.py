"""Consumers: the contractions that read a unit's channels, where its removal is felt.

A consumer computes y = W x: a convolution (not depthwise), a linear layer, a matrix product with a
constant operand. Removing a unit zeroes the columns W[:, c] of the channels c of x that belong to
it. Whose channel c is comes from the coupling of x, so that columns of flattened images, of heads
that share keys and values, and of weights computed in the graph are found alike.

Limits: einsum, recurrent layers and products of two activations are no consumers here; a
depthwise convolution passes its channels on and is none either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.coupling import Coupling, Value
from pruna_ir.passes.scored_members import Candidates, Scores
from pruna_ir.program import Program, computed_nodes

aten = torch.ops.aten

Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Consumer:
    """One contraction of activations with a constant weight.

    Attributes:
        node: the call.
        source: the activations x.
        axis: the dimension of x that is summed over, counted from the end (negative).
        weight: the node of the weight.
        weight_axis: the dimension of the weight that is summed over.
        groups: the groups of a convolution.
        size: the number of input channels.
    """

    node: fx.Node
    source: fx.Node
    axis: int
    weight: fx.Node
    weight_axis: int
    groups: int
    size: int

    @property
    def key(self) -> str:
        """What names x and its dimension, equal for consumers that read the same channels."""
        return f"{self.source.name}[{self.axis}]"

    def columns(self, program: Program) -> torch.Tensor:
        """The entries of the weight that each input channel meets, [channels, entries]."""
        weight = constant(program, self.weight)
        if self.groups > 1 and self.weight_axis == 1:
            # [out, in / groups, taps]: a channel meets the rows of its own group.
            local = weight.shape[1]
            parts = weight.reshape(self.groups, -1, local, *weight.shape[2:])
            return parts.movedim(2, 1).reshape(self.groups * local, -1)
        return weight.movedim(self.weight_axis, 0).reshape(self.size, -1)


def constant(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on parameters alone."""
    if node.op == "get_attr":
        return program.tensor(str(node.target)).detach()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: constant(program, n))
    with torch.no_grad():
        value: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return value


# -- finding them --------------------------------------------------------------------------------

# Data operand, weight operand, dimension of x from the end, dimension of the weight from the end.
_PRODUCTS: dict[Any, tuple[tuple[str, str, int, int], ...]] = {
    aten.linear.default: (("input", "weight", -1, -1),),
    aten.addmm.default: (("mat1", "mat2", -1, -2), ("mat2", "mat1", -2, -1)),
    aten.mm.default: (("self", "mat2", -1, -2), ("mat2", "self", -2, -1)),
    aten.matmul.default: (("self", "other", -1, -2), ("other", "self", -2, -1)),
}
_CONVS = {
    getattr(aten, name).default if not padding else getattr(aten, name).padding
    for name in ("conv1d", "conv2d", "conv3d")
    for padding in (False, True)
} | {
    aten.convolution.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}  # fmt: skip


def consumers(program: Program) -> list[Consumer]:
    """Every consumer of a program, in its order."""
    computed = computed_nodes(program)
    return [
        found
        for node in program.calls()
        for found in _matches(node)
        if found.source in computed and found.weight not in computed
    ]


def _matches(node: fx.Node) -> Iterator[Consumer]:
    if node.target in _CONVS:
        yield from _convolution(node)
    elif node.target in _PRODUCTS:
        bound = bind_arguments(node)
        for data, weight, axis, weight_axis in _PRODUCTS[node.target]:
            yield from _product(node, bound[data], bound[weight], axis, weight_axis)


def _product(
    node: fx.Node, x: fx.Node, weight: fx.Node, axis: int, weight_axis: int
) -> Iterator[Consumer]:
    shape = weight.meta["val"].shape
    if len(shape) == 2 and x.meta["val"].dim() >= 2:
        yield Consumer(node, x, axis, weight, weight_axis % 2, 1, int(shape[weight_axis]))


def _convolution(node: fx.Node) -> Iterator[Consumer]:
    bound = bind_arguments(node)
    shape = [int(size) for size in bound["weight"].meta["val"].shape]
    groups = int(bound["groups"])
    transposed = bool(bound.get("transposed")) or "transpose" in str(node.target)
    size = shape[0] if transposed else shape[1] * groups
    if groups == 1 or size > groups:
        dim = 1 - len(shape)
        yield Consumer(
            node, bound["input"], dim, bound["weight"], 0 if transposed else 1, groups, size
        )


# -- whose channels they are ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """What one consumer reads of one group.

    Attributes:
        consumer: the contraction.
        channels: the input channels that belong to the group.
        unit: for each of them, the place of its unit in the group.
        units: the number of units of the group.
    """

    consumer: Consumer
    channels: Ids
    unit: Ids
    units: int

    def per_unit(self, each: Scores) -> Scores:
        """The sum over each unit's channels of one number a channel of x, [units]."""
        sums = np.bincount(self.unit, each[self.channels], self.units)
        return sums.astype(np.float64, copy=False)

    @cached_property
    def table(self) -> Ids:
        """The channels of each unit, [units, channels per unit]."""
        order = np.argsort(self.unit, kind="stable")
        return np.asarray(self.channels[order].reshape(self.units, -1))


def readings(candidates: Candidates, found: list[Consumer] | None = None) -> list[list[Reading]]:
    """For each group, what every consumer reads of it."""
    coupling, groups = candidates.coupling, candidates.groups
    group_of = np.full(len(coupling.solved.frozen), -1, np.int64)
    place = np.zeros_like(group_of)
    for number, group in enumerate(groups):
        group_of[group.units] = number
        place[group.units] = np.arange(len(group.units))
    result: list[list[Reading]] = [[] for _ in groups]
    for consumer in consumers(candidates.program) if found is None else found:
        for units in channel_units(coupling, consumer):
            for number in np.unique(group_of[units]):
                if number < 0:
                    continue
                channels = np.flatnonzero(group_of[units] == number)
                reading = Reading(
                    consumer, channels, place[units[channels]], len(groups[number].units)
                )
                if _whole(reading):
                    result[number].append(reading)
    return result


def unread(candidates: Candidates) -> list[str]:
    """For every group, why no consumer says anything of it; empty where one does."""
    return [
        "" if found else "no linear layer, convolution or product reads its channels"
        for found in readings(candidates)
    ]


def distinct(found: list[Reading]) -> list[Reading]:
    """Readings of different channels: an input that several consumers read counts once."""
    return list({(r.consumer.key, r.unit.tobytes()): r for r in found}.values())


def _whole(reading: Reading) -> bool:
    """Whether every unit has channels here, and all have as many."""
    counts = np.bincount(reading.unit, minlength=reading.units)
    return bool((counts == counts[0]).all())


def channel_units(coupling: Coupling, consumer: Consumer) -> list[Ids]:
    """The unit of every input channel; several where a channel belongs to several units.

    With factored dimensions a channel may lie in a unit by its head and in another by its index
    inside of the head: each is one array of [channels].
    """
    value = coupling.values.get(consumer.source.name)
    if not isinstance(value, Value):
        return []
    factors = value.dims[consumer.axis % len(value.dims)]
    found = []
    for block in value.blocks:
        here = [k for k, factor in enumerate(block.factors) if factor in factors]
        if not here:
            continue
        units = coupling.solved.unit[block.ids]
        others = tuple(k for k in range(units.ndim) if k not in here)
        line = units[tuple(slice(None) if k in here else slice(0, 1) for k in range(units.ndim))]
        if (units != line).any():
            # Along the other dimensions the unit changes: it is not these channels that go.
            continue
        named = [block.factors[k] for k in here]
        shaped = line.squeeze(others).transpose(
            [named.index(factor) for factor in factors if factor in named]
        )
        index = tuple(slice(None) if factor in named else None for factor in factors)
        full = np.broadcast_to(shaped[index], [factor.size for factor in factors])
        found.append(np.ascontiguousarray(full.reshape(-1)))
    return found



"""Channel coupling: which indices of which parameter dimensions must go together.

Every floating-point tensor of a program gets ids for the indices of its dimensions; the rules of
the operators (`pruna_ir.coupling.table`) say which ids are the same channel; connected components
are the *units*, removed as a whole or not at all. Units with equal members (as many indices of
the same dimensions) form a *group*, such as the 64 channels between two convolutions or the 12
heads of an attention layer.

What may not be removed is frozen with a reason: inputs and outputs of the program, dimensions
that an operator reads by index, everything that an operator without a rule touches.

Cost: a few numpy operations per node and one connected-components run a round; near-linear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.collector import paused_collector
from pruna_ir.coupling.links import ATTENTION, Links, Reason, Units
from pruna_ir.coupling.plan import RemovalPlan
from pruna_ir.coupling.rule import Result, Site
from pruna_ir.coupling.table import rule_of
from pruna_ir.coupling.value import Block, Extent, Ids, Mask, Value, factors_of
from pruna_ir.errors import InvalidIRError, UsageError
from pruna_ir.program import Program, source_line
from pruna_ir.registry import unknown


@dataclass(frozen=True, eq=False)
class Member:
    """One tensor dimension that loses indices with a group's units.

    Attributes:
        tensor: the tensor's name in the program.
        dim: the dimension.
        indices: [units, indices per unit], in the order of the group's units.
        produced: whether these are outputs of the layer that the tensor is the weight of.
    """

    tensor: str
    dim: int
    indices: Ids
    produced: bool


@dataclass(frozen=True, eq=False)
class Group:
    """Units with members of equal structure.

    Attributes:
        units: unit numbers, in the order of the channels that they stand for.
        members: the dimensions that lose indices.
        reason: why the units must stay; None where they may go.
    """

    units: Ids
    members: tuple[Member, ...]
    reason: Reason | None

    @property
    def name(self) -> str:
        """The first tensor that produces the channels, or the first that has them."""
        found = [m for m in self.members if m.produced] or self.members
        return f"{found[0].tensor}[{found[0].dim}]"


@dataclass(frozen=True, eq=False)
class Coupling:
    """The result of the analysis of one program.

    Attributes:
        tensors: tensor name -> ids of each dimension (None where it has no channels).
        values: node name -> the value(s) of the node, for rewriting.
        solved: the units of all ids.
        blocks: the ids that index each tensor's channels, with the node's name; removal must
            leave something of each.
    """

    tensors: Mapping[str, tuple[Ids | None, ...]]
    values: Mapping[str, Result]
    solved: Units
    blocks: tuple[tuple[str, Ids], ...] = field(repr=False)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order in which their first tensor is read."""
        return _groups(self)

    def plan(self, units: Iterable[int]) -> RemovalPlan:
        """The plan that removes these units, and nothing else."""
        gone = np.zeros(len(self.solved.frozen), np.bool_)
        gone[np.fromiter(units, np.int64)] = True
        removed: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, dim, indices in self.lost(gone):
            removed.setdefault(name, {})[dim] = tuple(indices.tolist())
        return RemovalPlan(removed)

    def lost(self, gone: Mask) -> Iterator[tuple[str, int, Ids]]:
        """The (tensor, dimension, indices) that go with units, for dimensions that lose any.

        Args:
            gone: per unit, whether it is removed.
        """
        of_id = gone[self.solved.unit]
        for name, dims in self.tensors.items():
            for dim, ids in enumerate(dims):
                if ids is not None and (indices := np.flatnonzero(of_id[ids])).size:
                    yield name, dim, indices

    def emptied(self, gone: Mask) -> list[tuple[str, Ids]]:
        """The nodes (with the units of their channels) of which removal would leave nothing.

        Args:
            gone: per unit, whether it is removed.
        """
        of_id = gone[self.solved.unit]
        # Only blocks that lose all three of these can lose all.
        suspects = np.flatnonzero(of_id[self._probes].all(1))
        return [
            (node, np.unique(self.solved.unit[ids]))
            for node, ids in map(self.blocks.__getitem__, suspects)
            if of_id[ids].all()
        ]

    @cached_property
    def _probes(self) -> Ids:
        """The first, middle and last id of each block, [blocks, 3]."""
        probes = [(ids[0], ids[len(ids) // 2], ids[-1]) for _, ids in self.blocks]
        return np.array(probes, np.int64).reshape(-1, 3)


@paused_collector()
def couple(program: Program, attention: str = "heads") -> Coupling:
    """Analyse a program.

    Args:
        program: the program.
        attention: what attention loses: ``heads`` (of grouped queries: whole groups with their
            key and value head), ``queries`` (query heads alone, as many of every group) or
            ``size`` (indices of the size of a head, the same of every head).

    Raises:
        UsageError: ``attention`` is none of these.
        InvalidIRError: the program writes into tensors (run ``canonicalize`` first), or a
            third party's rule returned a value of another shape than its operator.
    """
    if attention not in ATTENTION:
        raise UsageError(unknown("attention granularity", attention, ATTENTION))
    links = Links(attention)
    stored = program.tensors()
    tensors = _tensor_ids(stored, links)
    parameters = {name: _parameter(tensor, tensors.get(name)) for name, tensor in stored.items()}
    values: dict[fx.Node, Result] = {}
    for node in program.graph.nodes:
        value = _value(program, node, values, links, parameters)
        if value is not None:
            values[node] = value
    blocks = _keep_rectangular(values, links)
    names = {node.name: value for node, value in values.items()}
    return Coupling(tensors, names, links.solve(), blocks)


def _tensor_ids(
    stored: Mapping[str, torch.Tensor], links: Links
) -> dict[str, tuple[Ids | None, ...]]:
    """Ids for every dimension of every floating-point tensor; tied tensors share theirs."""
    known: dict[Any, tuple[Ids | None, ...]] = {}
    tensors = {}
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            continue
        key = _identity(tensor)
        if key not in known:
            known[key] = tuple(links.fresh(s) if s > 1 else None for s in tensor.shape)
        tensors[name] = known[key]
    return tensors


def _identity(tensor: torch.Tensor) -> Any:
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _value(
    program: Program,
    node: fx.Node,
    values: dict[fx.Node, Result],
    links: Links,
    parameters: Mapping[str, Value],
) -> Result | None:
    if node.op == "get_attr":
        return parameters[str(node.target)]
    if node.op == "output":
        _freeze_outputs(program, values, links)
        return None
    meta = node.meta.get("val")
    if not isinstance(meta, (torch.Tensor, tuple, list)):
        _freeze_read_sizes(node, values, links)
        return None
    if node.op == "placeholder":
        return Value.untracked(meta.shape) if isinstance(meta, torch.Tensor) else None
    if node.target is operator.getitem:
        source = values[node.args[0]]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, tuple) else None  # type: ignore[index]
    return _called(node, values, links)


def _parameter(tensor: torch.Tensor, ids: tuple[Ids | None, ...] | None) -> Value:
    dims = tuple(factors_of(size) for size in tensor.shape)
    if ids is None:
        return Value(dims)
    blocks = tuple(
        Block(dim, given) for dim, given in zip(dims, ids, strict=True) if given is not None
    )
    return Value(dims, blocks)


def _freeze_outputs(program: Program, values: Mapping[fx.Node, Result], links: Links) -> None:
    for node, spec in zip(program.results(), program.outputs, strict=True):
        value = values.get(node)
        if isinstance(value, Value):
            reason = Reason(
                node.name, str(node.target), source_line(node), f"program output {spec.name}"
            )
            for block in value.blocks:
                links.freeze(block.ids, reason)


_TYPE_CHECK = torch.ops.aten._assert_tensor_metadata.default
"""What ``torch.export`` puts before casts."""


def _freeze_read_sizes(node: fx.Node, values: dict[fx.Node, Result], links: Links) -> None:
    """A size that the graph reads must stay what it is."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    site = Site.of(node, values, links)
    if node.target is _TYPE_CHECK and site.arg("size") is None and site.arg("stride") is None:
        return
    for value in site.operands():
        dims = [site.axis("dim", len(value.dims))] if "dim" in site.arguments else range(
            len(value.dims)
        )
        site.because("reads their number").whole_dims(value, dims)


def _called(node: fx.Node, values: dict[fx.Node, Result], links: Links) -> Result:
    site = Site.of(node, values, links)
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        raise InvalidIRError(
            f"{node.name}: {node.target} writes into its operand; run canonicalize before pruning"
        )
    rule = rule_of(node.target)
    operands = site.operands()
    tracked = any(value.blocks for value in operands)
    if not tracked and (rule is None or (operands and not rule.creates)):
        return site.untracked()
    if rule is None:
        for value in operands:
            site.because(_without_rule(node)).freeze(value)
        return site.untracked()
    result = rule.couple(site)
    _check_shape(site, result)
    return result


def _without_rule(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "pruna":
        return "is fused already; prune before operators are fused"
    return "has no coupling rule"


def _check_shape(site: Site, value: Result) -> None:
    metas = site.node.meta["val"]
    if isinstance(value, Value):
        _check_sizes(site, value, site.shape() if isinstance(metas, torch.Tensor) else ())
        return
    for number, (one, meta) in enumerate(zip(value, metas, strict=True)):
        _check_sizes(site, one, site.shape(number) if isinstance(meta, torch.Tensor) else ())


def _check_sizes(site: Site, value: Value, expected: tuple[Extent, ...]) -> None:
    if value.sizes() != expected:
        raise InvalidIRError(
            f"the coupling rule of {site.node.target} gives {site.node.name} the shape "
            f"{list(value.sizes())}, but it is {list(expected)}; the rule is wrong"
        )


def _keep_rectangular(
    values: Mapping[fx.Node, Result], links: Links
) -> tuple[tuple[str, Ids], ...]:
    """Products for the blocks that span dimensions; returns every block's node and ids."""
    seen: set[tuple[int, ...]] = set()
    blocks: list[tuple[str, Ids]] = []
    for node, result in values.items():
        for value in result if isinstance(result, tuple) else (result,):
            for block in value.blocks:
                key = id(block), *_owners(value, block)
                if key in seen:
                    continue
                seen.add(key)
                grouped = _by_dimension(block, key[1:])
                if grouped.ndim > 1:
                    links.product(grouped)
                if block.ids.size:
                    blocks.append((node.name, block.ids.ravel()))
    return tuple(blocks)


def _owners(value: Value, block: Block) -> tuple[int, ...]:
    """The dimension that each of a block's factors belongs to."""
    if len(block.factors) == 1:
        return (0,)
    owner = {factor: k for k, dim in enumerate(value.dims) for factor in dim}
    return tuple(owner[factor] for factor in block.factors)


def _by_dimension(block: Block, owners: tuple[int, ...]) -> Ids:
    """The ids of a block with one axis a dimension."""
    if len(owners) == 1:
        return block.ids
    order = sorted(range(len(owners)), key=lambda k: owners[k])
    ids = block.ids.transpose(order)
    sizes: dict[int, int] = {}
    for k in order:
        sizes[owners[k]] = sizes.get(owners[k], 1) * block.ids.shape[k]
    return ids.reshape(list(sizes.values()))


# -- groups ------------------------------------------------------------------------------------


def _groups(coupling: Coupling) -> tuple[Group, ...]:
    solved = coupling.solved
    places = [
        (name, dim, ids, solved.unit[ids])
        for name, dims in coupling.tensors.items()
        for dim, ids in enumerate(dims)
        if ids is not None
    ]
    group = _numbers(solved, [unit for *_, unit in places])
    members: dict[int, list[Member]] = {}
    order: dict[int, Ids] = {}
    known: dict[bytes, list[tuple[int, Ids]]] = {}
    for name, dim, ids, unit in places:
        # A layer's weight, norm and readers have the same units in the same places.
        same = unit.tobytes()
        if same not in known:
            known[same] = list(_aligned(unit, group, order))
        for number, indices in known[same]:
            produced = bool(solved.produced[ids[indices[0, 0]]])
            members.setdefault(number, []).append(Member(name, dim, indices, produced))
    return tuple(
        Group(units, tuple(members[number]), _reason(solved, units))
        for number, units in order.items()
    )


def _numbers(solved: Units, places: list[Ids]) -> Ids:
    """The group of every unit: equal where reason and members are; -1 for mere extents."""
    # A fixed random number a member (and a reason): their sums, of 128 bits, tell multisets apart.
    draw = np.random.default_rng(0)
    numbers = draw.integers(1, 2**63, size=(len(places), 2), dtype=np.uint64)
    reasons = draw.integers(1, 2**63, size=(len(solved.reasons) + 1, 2), dtype=np.uint64)
    halves = [np.ascontiguousarray(half) for half in reasons[solved.reason].T]
    if places:
        sizes = [len(unit) for unit in places]
        units = np.concatenate(places)
        for half, number in zip(halves, numbers.T, strict=True):
            np.add.at(half, units, np.repeat(number, sizes))
    signature = np.stack(halves, axis=1)
    kept = np.flatnonzero(~solved.frozen | (solved.reason >= 0))
    kept = kept[np.lexsort((signature[kept, 1], signature[kept, 0]))]
    new = (np.diff(signature[kept], axis=0, prepend=0) != 0).any(axis=1)
    group = np.full(len(solved.frozen), -1, np.int64)
    group[kept] = np.cumsum(new)
    return group


def _aligned(unit: Ids, group: Ids, order: dict[int, Ids]) -> Iterator[tuple[int, Ids]]:
    """For each group along one dimension: (group, indices [units, count]).

    Units come in the order in which the group's first dimension has them (``order``).
    """
    places = np.lexsort((unit, group[unit]))
    grouped = group[unit[places]]
    starts = np.flatnonzero(np.diff(grouped, prepend=-2))
    for start, stop in zip(starts, [*starts[1:], places.size], strict=True):
        number = int(grouped[start])
        if number < 0:
            continue
        # By unit, each as often as the others: their signatures are equal.
        indices = places[start:stop]
        units = unit[indices]
        count = int(np.searchsorted(units, units[0], side="right"))
        table, units = indices.reshape(-1, count), units[::count]
        if number not in order:
            first = np.argsort(table[:, 0])
            order[number] = units[first]
        yield number, table[np.searchsorted(units, order[number])]


def _reason(solved: Units, units: Ids) -> Reason | None:
    index = int(solved.reason[units[0]])
    return solved.reasons[index] if index >= 0 else None

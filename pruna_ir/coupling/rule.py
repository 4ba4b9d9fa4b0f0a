"""Rule: what an operator says of its channels, and how its arguments follow their removal.

A rule has three parts: ``couple`` links the ids of operands and result, ``resize`` fixes literal
arguments (sizes, split points, groups) after channels are gone, and ``masked`` tells the oracle
(`pruna_ir.masked_reference`) what the operator computes where some elements are dead. ATen rules
leave ``masked`` out: the oracle knows ATen by itself. A third party registers a rule for its
operator in the entry-point group ``pruna_ir.coupling_rules`` under the operator's qualified name:

    [project.entry-points."pruna_ir.coupling_rules"]
    "acme::swish" = "acme.coupling:SWISH"          # SWISH = pruna_ir.coupling.ELEMENTWISE
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.coupling.algebra import Algebra
from pruna_ir.coupling.links import Links
from pruna_ir.coupling.value import Extent, Factor, Mask, Value, extent, factors_of, product
from pruna_ir.errors import PassError
from pruna_ir.transform import Rewrite

Result = Value | tuple[Value, ...]
"""What an operator returns: one value, or one for each returned tensor."""


@dataclass(frozen=True)
class Site:
    """One call under analysis: its arguments by schema name, operands as values."""

    node: fx.Node
    arguments: Mapping[str, Any]
    values: Mapping[fx.Node, Result]
    algebra: Algebra
    _sizes: tuple[Extent, ...] = ()
    """The sizes of the only result; reading them from a fake tensor is slow."""

    @staticmethod
    def of(node: fx.Node, values: Mapping[fx.Node, Result], links: Links) -> Site:
        """The site of a call."""
        meta = node.meta.get("val")
        sizes = tuple(map(extent, meta.shape)) if isinstance(meta, torch.Tensor) else ()
        return Site(node, bind_arguments(node), values, Algebra(links, node), sizes)

    @property
    def links(self) -> Links:
        """Where rules record connections."""
        return self.algebra.links

    def arg(self, name: str) -> Any:
        """An argument by schema name; None where the operator has none of that name."""
        return self.arguments.get(name)

    def value(self, name: str) -> Value:
        """The value of a tensor argument.

        Raises:
            KeyError: the argument is absent.
        """
        value = self.maybe(name)
        if value is None:
            raise KeyError(f"{self.node.name} has no tensor argument {name}")
        return value

    def maybe(self, name: str) -> Value | None:
        """The value of a tensor argument; None where it is absent."""
        source = self.arguments.get(name)
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        return value if isinstance(value, Value) else None

    def operands(self) -> list[Value]:
        """The values of all tensor arguments, lists included, in schema order."""
        found: list[Value] = []
        for argument in self.arguments.values():
            items = argument if isinstance(argument, (list, tuple)) else (argument,)
            for item in items:
                if isinstance(item, fx.Node):
                    value = self.values.get(item)
                    if isinstance(value, Value):
                        found.append(value)
        return found

    def tensors(self, name: str) -> list[Value]:
        """The values of a tensor-list argument."""
        values = [self.values[item] for item in self.arguments[name]]
        return [value for value in values if isinstance(value, Value)]

    def shape(self, output: int | None = None) -> tuple[Extent, ...]:
        """The sizes of the result (of one of several)."""
        if output is None:
            return self._sizes
        return tuple(map(extent, self.node.meta["val"][output].shape))

    def axis(self, name: str, rank: int) -> int:
        """A dimension argument, counted from the front."""
        return int(self.arguments[name]) % max(rank, 1)

    def axes(self, name: str, rank: int) -> list[int]:
        """A dimension-list argument, counted from the front; all dimensions where it is empty."""
        given = self.arguments.get(name)
        if given is None or given == []:
            return list(range(rank))
        items = given if isinstance(given, (list, tuple)) else [given]
        return [int(item) % max(rank, 1) for item in items]

    def untracked(self) -> Result:
        """Results without ids, of the shapes that the node has."""
        meta = self.node.meta["val"]
        if isinstance(meta, torch.Tensor):
            return Value(tuple(map(factors_of, self._sizes)))
        return tuple(
            Value.untracked(item.shape if isinstance(item, torch.Tensor) else ()) for item in meta
        )

    def because(self, text: str) -> Algebra:
        """The algebra with a reason of the rule's own."""
        return self.algebra.because(text)

    def mark_rows(self, weight: Value, dim: int) -> None:
        """Mark the ids of a weight's output dimension as channels that it produces."""
        for block in weight.blocks:
            if block.touches(weight.dims[dim]):
                self.links.rows(block.ids)

    def per_head(self, value: Value, dim: int) -> Value:
        """The value with joint ids of a summed dimension and batch dimensions on one of them.

        Whole heads go together unless the size of a head is what is pruned (`Links.attention`).
        """
        for block in value.blocks:
            summed = [f for f in block.factors if f in value.dims[dim]]
            if not summed or len(summed) == len(block.factors):
                continue
            if self.links.attention == "size":
                heads = [f for f in block.factors if f not in summed]
                value = self.because("keeps its heads").whole(value, heads)
            else:
                self.links.tie(block.ids, block.axes(summed))
        return value

    def apart(self, a: Value, b: Value, batch: Collection[Factor]) -> tuple[Value, Value]:
        """Query heads that share keys or values, where they are what is pruned.

        Where ``b`` repeats its heads along a batch factor, only that factor is pruned: the
        other ids of both operands stay.
        """
        if self.links.attention != "queries":
            return a, b
        for mine, theirs in ((a, b), (b, a)):
            times = [
                block.factors[0]
                for block in mine.blocks
                if len(block.factors) == 1
                and block.factors[0] in batch
                and self.links.is_soft(block.ids)
                and any(block.factors[0] in o.factors for o in theirs.blocks)
            ]
            if times:
                stays = self.because("is shared by several query heads")
                kept = [f for f in (*a.factors(), *b.factors()) if f not in times]
                return stays.whole(a, kept), stays.whole(b, kept)
        return a, b


@dataclass(frozen=True)
class Edit:
    """One call under removal: which indices survive, and how to change its arguments."""

    rw: Rewrite
    node: fx.Node
    arguments: Mapping[str, Any]
    values: dict[str, Result]
    alive: Mask
    """Per id, whether it survives."""

    def arg(self, name: str) -> Any:
        """An argument by schema name; None where the operator has none of that name."""
        return self.arguments.get(name)

    def value(self, name: str) -> Value:
        """The value, before removal, of a tensor argument."""
        value = self.values[self.arguments[name].name]
        if not isinstance(value, Value):
            raise PassError(f"{self.node.name}: argument {name} is no tensor")
        return value

    def result(self, output: int | None = None) -> Value:
        """The value, before removal, of the result (of one of several)."""
        value = self.values[self.node.name]
        if isinstance(value, tuple):
            return value[output or 0]
        return value

    def kept(self, value: Value, dim: int) -> Mask:
        """Which indices of a static dimension survive."""
        return kept_indices(value, dim, self.alive)

    def counts(self, value: Value, dim: int) -> tuple[int, int]:
        """The static part of a dimension's size before and after."""
        return kept_counts(value, dim, self.alive)

    def update(self, **arguments: Any) -> None:
        """Change arguments by schema name."""
        self.rw.update(self.node, **arguments)

    def replace(self, new: fx.Node) -> None:
        """Put another node in this one's place."""
        self.values[new.name] = self.values[self.node.name]
        self.rw.replace(self.node, new)

    def resized(self, sizes: Sequence[Any], offset: int = 0) -> list[Any]:
        """Size arguments of the result's dimensions (from ``offset`` on), adapted where needed.

        Symbolic sizes that contain channels (``batch * heads``) are recomputed in the graph.
        """
        value, new = self.result(), []
        for dim, size in enumerate(sizes, start=offset):
            before, after = self.counts(value, dim)
            if before == after or (size == -1 and not _fixed(value, dim)):
                new.append(size)
            elif isinstance(size, fx.Node):
                new.append(self._scaled(size, before, after))
            else:
                new.append(after)
        return new

    def _scaled(self, size: fx.Node, before: int, after: int) -> fx.Node:
        rest = self.rw.insert_function(
            operator.floordiv, size, before, before=self.node, like=self.node
        )
        return self.rw.insert_function(
            operator.mul, rest, after, before=self.node, like=self.node
        )


def _fixed(value: Value, dim: int) -> bool:
    return all(isinstance(factor.size, int) for factor in value.dims[dim])


def kept_indices(value: Value, dim: int, alive: Mask) -> Mask:
    """Which indices of a static dimension survive, as a flat bool array of its size."""
    factors = value.dims[dim]
    kept = np.ones([factor.size for factor in factors], np.bool_)
    for block in value.blocks:
        if block.touches(factors):
            others = tuple(k for k, f in enumerate(block.factors) if f not in factors)
            here = [f for f in block.factors if f in factors]
            line = np.asarray(alive[block.ids].any(axis=others))
            order = [here.index(f) for f in factors if f in here]
            index = tuple(slice(None) if f in here else None for f in factors)
            kept &= line.transpose(order)[index]
    return kept.reshape(-1)


def kept_counts(value: Value, dim: int, alive: Mask) -> tuple[int, int]:
    """The static part of a dimension's size, before and after removal."""
    factors = value.dims[dim]
    before = int(product(f.size for f in factors if isinstance(f.size, int)))
    after, covered = before, 1
    for block in value.blocks:
        if block.touches(factors):
            line = alive[block.ids]
            others = tuple([k for k, f in enumerate(block.factors) if f not in factors])
            if others:
                line = np.logical_or.reduce(line, axis=others)
            covered *= line.size
            after = after // line.size * int(np.count_nonzero(line))
    return before, after


@dataclass(frozen=True)
class Rule:
    """How an operator couples channels.

    Attributes:
        couple: links ids at a `Site` and returns the value(s) of the result.
        resize: fixes literal arguments after removal; None where there are none to fix.
        masked: for operators that the oracle does not know, ``"elementwise"`` or a function
            ``masked(**arguments)`` of the call's arguments by schema name, whose tensors are
            `pruna_ir.masked_operators.Masked`, as is its result.
        creates: whether the result has channels where there are operands but none has any, as
            the elements that ``expand`` repeats; ``couple`` is not asked there otherwise.
    """

    couple: Callable[[Site], Result]
    resize: Callable[[Edit], None] | None = None
    masked: Any = None
    creates: bool = False

"""Links: what rules say about ids, collected in bulk, and the units that follow.

Rules *connect* ids (they must go together), *freeze* ids (they must stay, for a reason) and put
*products* on joint blocks. A joint block spans several dimensions of a tensor, and what survives
of a tensor is a rectangle: along a product, removal may depend on the index of one axis only.
Which one is decided when everything else is known:

1. connected components of all connections (`components`);
2. a product whose components vary along one axis at most is settled: that axis it is, and ids of
   its readers on the other axes freeze;
3. where nothing else can be settled, an open product takes the outermost axis along which it
   varies and that a reader has, or else the innermost along which it varies. That connects its ids
   with equal index there (channel shuffle: a channel of every group goes together), and the
   components are computed again.

Every step is a few numpy operations a block; the number of rounds is small and bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pruna_ir.coupling.value import Ids, Mask


@dataclass(frozen=True)
class Reason:
    """Why channels must stay: what reads them, where it is, and what it needs."""

    node: str
    operator: str
    source: str
    """The user's source line; empty where unknown."""
    text: str

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.text} [{self.node} = {self.operator}{where}]"


@dataclass(frozen=True, eq=False)
class Product:
    """A joint block of which at most one axis may decide what is removed.

    Attributes:
        ids: one axis a dimension (or factor).
        readers: other ids over some of these axes, which must agree with the block.
        reason: why a reader's ids freeze when another axis decides.
    """

    ids: Ids
    readers: tuple[tuple[tuple[int, ...], Ids], ...]
    reason: Reason | None


ATTENTION = ("heads", "queries", "size")
"""What attention loses: whole heads (of grouped queries: whole groups), query heads alone (the
same ones of every group), or the same indices of every head's size."""


@dataclass
class Links:
    """The collected statements of all rules about one program's ids.

    Attributes:
        attention: one of `ATTENTION`.
        count: the number of ids.
        reasons: why ids stay.
    """

    attention: str = "heads"
    count: int = 0
    reasons: list[Reason] = field(default_factory=list)
    _edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    _frozen: list[tuple[Ids, int]] = field(default_factory=list)
    _products: list[Product] = field(default_factory=list)
    _rows: list[Ids] = field(default_factory=list)
    _soft: list[tuple[int, int]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Ids:
        """New ids, one an element."""
        size = math.prod(shape)
        ids = np.arange(self.count, self.count + size, dtype=np.int64).reshape(shape)
        self.count += size
        return ids

    def fresh_soft(self, size: int) -> Ids:
        """New ids for a dimension whose elements are all alike (expand, zeros)."""
        ids = self.fresh(size)
        self._soft.append((int(ids[0]), int(ids[0]) + size))
        return ids

    def is_soft(self, ids: Ids) -> bool:
        """Whether a block's ids come from `fresh_soft`."""
        first, last = int(ids.flat[0]), int(ids.flat[-1])
        return any(low <= first < high and low <= last < high for low, high in self._soft)

    def connect(self, a: Ids, b: Ids) -> None:
        """Ids at equal (broadcast) places go together."""
        if a.shape != b.shape:
            shape = np.broadcast(a, b).shape
            a, b = _repeated(a, shape), _repeated(b, shape)
        self._edges.append((a.ravel(), b.ravel()))

    def connect_all(self, arrays: Iterable[Ids]) -> None:
        """All ids of all arrays are one unit."""
        flat = np.concatenate([array.ravel() for array in arrays])
        if flat.size:
            self.connect(flat[:1], flat)

    def tie(self, ids: Ids, axes: Sequence[int]) -> None:
        """Ids that differ only in their index along these axes go together."""
        first = tuple(slice(0, 1) if k in axes else slice(None) for k in range(ids.ndim))
        self.connect(ids[first], ids)

    def freeze(self, ids: Ids, reason: Reason | None) -> None:
        """Ids stay; a reason of None stands for extents that nobody would call channels."""
        if reason is None:
            self._frozen.append((ids.ravel(), -1))
            return
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        self._frozen.append((ids.ravel(), len(self.reasons) - 1))

    def product(
        self,
        ids: Ids,
        readers: Sequence[tuple[tuple[int, ...], Ids]] = (),
        reason: Reason | None = None,
    ) -> None:
        """At most one axis of ``ids`` may decide what is removed."""
        self._products.append(Product(ids, tuple(readers), reason))

    def rows(self, ids: Ids) -> None:
        """Ids of the outputs of a layer: the filters that produce channels."""
        self._rows.append(ids.ravel())

    def solve(self) -> Units:
        """The units that follow from everything collected."""
        labels, frozen = self._components(np.arange(self.count))
        waiting = self._products
        while waiting:
            waiting, changed = self._settle(waiting, labels, frozen)
            if not changed and waiting:
                # Those that others read go first: their choice may settle the rest.
                self._choose([p for p in waiting if p.readers] or waiting, labels, frozen)
                changed = True
            if changed:
                labels, frozen = self._components(labels)
        return self._units(labels, frozen)

    def _components(self, labels: Ids) -> tuple[Ids, Mask]:
        """The component of every id, given those before the connections made since."""
        left = labels[_joined(a for a, _ in self._edges)]
        right = labels[_joined(b for _, b in self._edges)]
        # They are in the labels from here on.
        self._edges.clear()
        merged = components(int(labels.max(initial=-1)) + 1, left, right)
        found = merged[labels]
        frozen = np.zeros(int(merged.max(initial=-1)) + 1, np.bool_)
        for ids, _ in self._frozen:
            frozen[found[ids]] = True
        return found, frozen

    def _settle(
        self, products: list[Product], labels: Ids, frozen: Mask
    ) -> tuple[list[Product], bool]:
        """Close the products that have one deciding axis; returns the open ones."""
        still_open, changed = [], False
        for product, axes in zip(products, _all_varying(products, labels, frozen), strict=True):
            if len(axes) > 1:
                still_open.append(product)
            elif product.readers:
                self._bind(product, axes[0] if axes else None)
                changed = True
        return still_open, changed

    def _bind(self, product: Product, axis: int | None) -> None:
        for axes, ids in product.readers:
            if axis is None:
                self.connect_all([product.ids, ids])
            elif axis in axes:
                others = tuple(k for k in range(ids.ndim) if axes[k] != axis)
                self.tie(ids, others)
                self.connect(_line(ids, axes.index(axis)), _line(product.ids, axis))
            else:
                self.freeze(ids, product.reason)

    def _choose(self, products: list[Product], labels: Ids, frozen: Mask) -> None:
        """Let one axis of each open product decide; of those that share units, of the first."""
        touched = np.zeros(len(frozen), np.bool_)
        for product in products:
            states = _states(product.ids, labels, frozen)
            units = states[states >= 0]
            if touched[units].any():
                continue
            touched[units] = True
            axis = self._preferred(product, _varying(states))
            self.tie(product.ids, [k for k in range(product.ids.ndim) if k != axis])

    def _preferred(self, product: Product, varying: list[int]) -> int:
        """The outermost varying axis that readers with channels of their own have (heads rather
        than their size); the innermost varying one where there is none."""
        read = {
            axis for axes, ids in product.readers for axis in axes if not self.is_soft(ids)
        }
        candidates = [k for k in varying if k in read]
        return candidates[0] if candidates else varying[-1]

    def _units(self, labels: Ids, frozen: Mask) -> Units:
        reason = np.full(len(frozen), -1, np.int64)
        for ids, index in reversed(self._frozen):
            if index >= 0:
                reason[labels[ids]] = index
        produced = np.zeros(self.count, np.bool_)
        for ids in self._rows:
            produced[ids] = True
        return Units(labels, frozen, reason, tuple(self.reasons), produced)


def components(count: int, left: Ids, right: Ids) -> Ids:
    """The connected component of each of ``count`` nodes, numbered by their first nodes.

    Every root that has a smaller neighbour is hung under the smallest; paths are then shortened
    to their roots, and edges inside of a component dropped, until none is left (Shiloach and
    Vishkin, J. Algorithms 3, 1982). Each round is a few numpy operations.

    Args:
        count: the number of nodes.
        left: one end of every edge.
        right: the other.

    >>> components(5, np.array([0, 3]), np.array([2, 4]))
    array([0, 1, 0, 2, 2])
    """
    parent = np.arange(count)
    while left.size:
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while (parent != (up := parent[parent])).any():
            parent = up
        left, right = parent[left], parent[right]
        apart = left != right
        left, right = left[apart], right[apart]
    return (np.cumsum(parent == np.arange(count)) - 1)[parent]


def _joined(parts: Iterable[Ids]) -> Ids:
    """Arrays of ids end to end."""
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _repeated(ids: Ids, shape: tuple[int, ...]) -> Ids:
    """The ids in a larger shape; ``np.broadcast_to`` takes five times as long for a few ids."""
    result = np.empty(shape, ids.dtype)
    result[...] = ids
    return result


def _line(ids: Ids, axis: int) -> Ids:
    """The ids along one axis at index 0 of the others."""
    return ids[tuple(slice(None) if k == axis else 0 for k in range(ids.ndim))]


def _states(ids: Ids, labels: Ids, frozen: Mask) -> Ids:
    """The unit of each id; -1 for all that stay, which need not be told apart."""
    units = labels[ids]
    return np.where(frozen[units], -1, units)


def _varying(states: Ids) -> list[int]:
    """The axes along which states differ."""
    return [k for k, varies in enumerate(_vary(states[None])) if varies[0]]


def _vary(states: Ids) -> list[Mask]:
    """For each axis after the first: whether the states along it differ, [len(states)]."""
    first = [(slice(None),) * k + (slice(1),) for k in range(1, states.ndim)]
    return [(states != states[line]).reshape(len(states), -1).any(1) for line in first]


def _all_varying(products: list[Product], labels: Ids, frozen: Mask) -> list[list[int]]:
    """`_varying` for the states of each product; those of one shape are compared together."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, product in enumerate(products):
        shapes.setdefault(product.ids.shape, []).append(number)
    found: list[list[int]] = [[] for _ in products]
    for numbers in shapes.values():
        ids = np.stack([products[number].ids for number in numbers])
        for axis, varies in enumerate(_vary(_states(ids, labels, frozen))):
            for place in np.flatnonzero(varies):
                found[numbers[place]].append(axis)
    return found


@dataclass(frozen=True, eq=False)
class Units:
    """The result: which ids go together, which stay, and why.

    Attributes:
        unit: the unit of every id.
        frozen: per unit, whether it must stay.
        reason: per unit, an index into ``reasons``; -1 where it may go or needs no reason.
        reasons: all reasons, in program order.
        produced: per id, whether it numbers an output of a layer's weight.
    """

    unit: Ids
    frozen: Mask
    reason: Ids
    reasons: tuple[Reason, ...]
    produced: Mask

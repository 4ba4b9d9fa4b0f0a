"""Values: what the analysis knows of a tensor, as channel ids on factored dimensions.

A dimension is a list of *factors* whose sizes multiply to its size, outermost first; a dimension
of size 1 has none. ``reshape`` only regroups factors, so a merge of dimensions followed by the
split back is exact, and a symbolic batch may share a dimension with heads (``[batch * heads]``).

A *block* gives ids to the indices of some factors: an int64 array with one axis a factor. An
element of the tensor survives where its id in every block survives. Factors outside of all blocks
are *untracked*: nothing is ever removed there (batch, sequence, space, the channels of an input).
Each factor lies in one block at most. Factors are compared by identity, so permuting dimensions
leaves the blocks as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Ids = np.ndarray[Any, np.dtype[np.int64]]
"""Channel ids."""

Mask = np.ndarray[Any, np.dtype[np.bool_]]

Extent = Any
"""A size: an ``int``, or the sympy expression behind a ``torch.SymInt``."""


def extent(size: int | torch.SymInt) -> Extent:
    """A tensor's size as an int where it is static, as an expression where it is symbolic."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def quotient(a: Extent, b: Extent) -> Extent | None:
    """``a / b`` where that is a whole number for every value of the symbols; None otherwise."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(a, int):
        return None
    ratio = (a / b).cancel()
    if ratio.as_numer_denom()[1] != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def product(sizes: Iterable[Extent]) -> Extent:
    """The product of sizes."""
    total: Extent = 1
    for size in sizes:
        # Products of expressions are slow; most dimensions are one factor.
        total = size if isinstance(total, int) and total == 1 else total * size
    return total


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a dimension; two factors are the same only where they are one object."""

    size: Extent


@dataclass(frozen=True, eq=False)
class Block:
    """Ids for the indices of some factors: ``ids.shape`` is the factors' sizes."""

    factors: tuple[Factor, ...]
    ids: Ids

    def axes(self, factors: Iterable[Factor]) -> tuple[int, ...]:
        """The axes of these factors."""
        return tuple(self.factors.index(factor) for factor in factors)

    def touches(self, factors: Iterable[Factor]) -> bool:
        """Whether the block covers one of the factors."""
        own = self.factors
        for factor in factors:  # noqa: SIM110 - called for every block of every operand
            if factor in own:
                return True
        return False


@dataclass(frozen=True, eq=False)
class Value:
    """The factors of each dimension of a tensor, and the blocks of ids over them."""

    dims: tuple[tuple[Factor, ...], ...]
    blocks: tuple[Block, ...] = ()

    @staticmethod
    def untracked(shape: Sequence[int | torch.SymInt]) -> Value:
        """A tensor of this shape without ids."""
        return Value(tuple(factors_of(extent(size)) for size in shape))

    def factors(self) -> tuple[Factor, ...]:
        """All factors, outermost first."""
        return tuple([factor for dim in self.dims for factor in dim])

    def tracked(self, dim: int) -> bool:
        """Whether a dimension carries ids."""
        return any(block.touches(self.dims[dim]) for block in self.blocks)

    def sizes(self) -> tuple[Extent, ...]:
        """The size of every dimension."""
        return tuple(
            [
                dim[0].size if len(dim) == 1 else product(factor.size for factor in dim)
                for dim in self.dims
            ]
        )

    def with_dims(self, dims: Iterable[tuple[Factor, ...]]) -> Value:
        """The same factors in other dimensions; blocks of vanished factors must be gone."""
        return Value(tuple(dims), self.blocks)

    def split(self, parts: Mapping[Factor, tuple[Factor, ...]]) -> Value:
        """Factors replaced by finer ones (or by others of the same size)."""
        finer = {factor: new for factor, new in parts.items() if new != (factor,)}
        if not finer:
            return self
        dims = tuple([_split_factors(dim, finer) for dim in self.dims])
        return Value(dims, tuple([_split_block(block, finer) for block in self.blocks]))

    def renamed(self) -> Value:
        """The same value on factors of its own."""
        return self.split({factor: (Factor(factor.size),) for factor in self.factors()})


def factors_of(size: Extent) -> tuple[Factor, ...]:
    """The factors of an untracked dimension of this size."""
    return () if isinstance(size, int) and size == 1 else (Factor(size),)


def _split_block(block: Block, parts: Mapping[Factor, tuple[Factor, ...]]) -> Block:
    factors = _split_factors(block.factors, parts)
    if factors is block.factors:
        return block
    return Block(factors, block.ids.reshape([factor.size for factor in factors]))


def _split_factors(
    factors: tuple[Factor, ...], parts: Mapping[Factor, tuple[Factor, ...]]
) -> tuple[Factor, ...]:
    """Factors with some replaced; the same object where none is."""
    for factor in factors:
        if factor in parts:
            return tuple([part for f in factors for part in parts.get(f, (f,))])
    return factors


def common_parts(
    a: Sequence[Factor], b: Sequence[Factor]
) -> tuple[dict[Factor, tuple[Factor, ...]], dict[Factor, tuple[Factor, ...]]] | None:
    """Splits of two factor lists of equal product into one common list of (shared) factors.

    A factor of ``a`` that needs no split stays itself. None where sizes such as 2 * 3 and 3 * 2
    have no common refinement.
    """
    splits_a: dict[Factor, tuple[Factor, ...]] = {}
    splits_b: dict[Factor, tuple[Factor, ...]] = {}
    queue_a, queue_b = list(a), list(b)
    left_a = left_b = None
    while queue_a or queue_b:
        if not (queue_a and queue_b):
            return None
        left_a = queue_a[0].size if left_a is None else left_a
        left_b = queue_b[0].size if left_b is None else left_b
        taken = _step(left_a, left_b)
        if taken is None:
            return None
        part, rest_a, rest_b = taken
        shared = queue_a[0] if part == left_a == queue_a[0].size else Factor(part)
        left_a, left_b = rest_a, rest_b
        splits_a[queue_a[0]] = (*splits_a.get(queue_a[0], ()), shared)
        splits_b[queue_b[0]] = (*splits_b.get(queue_b[0], ()), shared)
        if left_a == 1:
            queue_a.pop(0)
            left_a = None
        if left_b == 1:
            queue_b.pop(0)
            left_b = None
    return splits_a, splits_b


def _step(left_a: Extent, left_b: Extent) -> tuple[Extent, Extent, Extent] | None:
    """The size of the next common factor, and what remains of both sides."""
    if left_a == left_b:
        return left_a, 1, 1
    if (rest := quotient(left_b, left_a)) is not None:
        return left_a, 1, rest
    if (rest := quotient(left_a, left_b)) is not None:
        return left_b, rest, 1
    return None

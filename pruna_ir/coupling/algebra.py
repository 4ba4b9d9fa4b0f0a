"""The algebra of values that rules are written in: regroup, align, meet, keep whole, contract.

Everything that two tensors say of each other goes through `meet`. Where both track the same
factors their ids are connected. Where one tracks a joint block (heads x head size) and the other
only one of its factors (a norm's weight on the head size), a `links.Product` leaves open which of
the two decides. Where one does not track a factor, nothing can be removed along it: joint ids are
tied along it, other ids freeze.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from pruna_ir.coupling.links import Links, Reason
from pruna_ir.coupling.value import (
    Block,
    Extent,
    Factor,
    Ids,
    Value,
    common_parts,
    factors_of,
    product,
    quotient,
)
from pruna_ir.program import source_line


def _operands_fix(node: fx.Node) -> str:
    inputs = [operand.name for operand in node.all_input_nodes if operand.op == "placeholder"]
    if inputs:
        return f"program input {inputs[0]} fixes them"
    return "an operand without removable channels fixes them"


@dataclass(frozen=True)
class Algebra:
    """Operations on values at one node: they record links, with the node as the reason.

    Attributes:
        links: where they are recorded.
        node: the node; None where nobody needs a reason.
        text: what the node needs; empty for what its operands tell.
    """

    links: Links
    node: fx.Node | None
    text: str = ""

    @property
    def reason(self) -> Reason | None:
        """Why channels must stay; few are asked for."""
        node = self.node
        if node is None:
            return None
        text = self.text or _operands_fix(node)
        return Reason(node.name, str(node.target), source_line(node), text)

    def because(self, text: str) -> Algebra:
        """The same operations for another reason at the same node."""
        return Algebra(self.links, self.node, text)

    # -- keeping -----------------------------------------------------------------------------

    def whole(self, value: Value, factors: Collection[Factor]) -> Value:
        """The value with these factors untracked, because nothing may be removed along them."""
        blocks = []
        for block in value.blocks:
            if not block.touches(factors):
                blocks.append(block)
            elif rest := self._tied(block, factors):
                blocks.append(rest)
        return Value(value.dims, tuple(blocks))

    def whole_dims(self, value: Value, dims: Iterable[int]) -> Value:
        """`whole` for all factors of some dimensions."""
        return self.whole(value, [factor for dim in dims for factor in value.dims[dim]])

    def _tied(self, block: Block, factors: Collection[Factor]) -> Block | None:
        """A block tied along factors, as a block on its others; frozen where there are none."""
        axes = [k for k, factor in enumerate(block.factors) if factor in factors]
        if len(axes) == len(block.factors):
            self.links.freeze(block.ids, self.reason)
            return None
        self.links.tie(block.ids, axes)
        rest = tuple(f for f in block.factors if f not in factors)
        index = tuple(0 if k in axes else slice(None) for k in range(block.ids.ndim))
        return Block(rest, block.ids[index])

    def freeze(self, value: Value) -> None:
        """All channels of a value stay."""
        for block in value.blocks:
            self.links.freeze(block.ids, self.reason)

    # -- regrouping --------------------------------------------------------------------------

    def fuse(self, value: Value, run: Sequence[Factor]) -> tuple[Value, Factor | None]:
        """The value with adjacent factors of one dimension made one; None for an empty run."""
        if not run:
            return value, None
        if len(run) == 1:
            return value, run[0]
        fused = Factor(product(factor.size for factor in run))
        touching = [block for block in value.blocks if block.touches(run)]
        blocks = [block for block in value.blocks if not block.touches(run)]
        if touching and not isinstance(fused.size, int):
            reason = self.because("a dynamic dimension is interleaved with its channels")
            for block in touching:
                if rest := reason._tied(block, run):
                    blocks.append(rest)
        elif touching:
            blocks.append(self._fused_block(touching, run, fused))
        dims = tuple(_with_run(dim, run, fused) for dim in value.dims)
        return Value(dims, tuple(blocks)), fused

    def _fused_block(self, touching: list[Block], run: Sequence[Factor], fused: Factor) -> Block:
        if len(touching) > 1:
            self.links.connect_all(block.ids for block in touching)
        others = tuple(f for block in touching for f in block.factors if f not in run)
        order = (*others, *run)
        ids = _broadcast(touching[0], order)
        return Block((*others, fused), ids.reshape([*(f.size for f in others), fused.size]))

    def single(self, value: Value, dim: int) -> tuple[Value, Factor | None]:
        """The value with one factor (None where the size is 1) for a dimension."""
        return self.fuse(value, value.dims[dim])

    def regroup(self, value: Value, sizes: Sequence[Extent]) -> Value:
        """The value reshaped (row major) to other sizes."""
        targets = [factors_of(size) for size in sizes]
        wanted = [factor for dim in targets for factor in dim]
        value, wanted_parts = self._refined(value, wanted)
        dims = [
            tuple(part for factor in dim for part in wanted_parts[factor]) for dim in targets
        ]
        return Value(tuple(dims), value.blocks)

    def _refined(
        self, value: Value, wanted: list[Factor]
    ) -> tuple[Value, dict[Factor, tuple[Factor, ...]]]:
        """The value with its factors split so that each wanted factor is a list of them."""
        whole = common_parts(value.factors(), wanted)
        if whole is not None:
            return value.split(whole[0]), whole[1]
        parts: dict[Factor, tuple[Factor, ...]] = {}
        for mine, theirs in _segments(value.factors(), wanted):
            found = common_parts(mine, theirs)
            if found is None:
                value = value.with_dims((value.factors(),))
                value, fused = self.fuse(value, mine)
                found = common_parts([fused] if fused else [], theirs)
            if found is None:
                untracked = self.because("a dynamic dimension is regrouped with its channels")
                value = _replaced(untracked.whole(value, mine), mine, theirs)
                found = {}, {factor: (factor,) for factor in theirs}
            value = value.split(found[0])
            parts |= found[1]
        return value, parts

    # -- several operands --------------------------------------------------------------------

    def align(
        self, a: Value, a_dims: Sequence[int], b: Value, b_dims: Sequence[int]
    ) -> tuple[Value, Value]:
        """Both values with one list of shared factors on each pair of dimensions.

        A dimension of size 1 shares nothing. Pairs must otherwise have equal sizes.
        """
        renamed: dict[Factor, tuple[Factor, ...]] = {}
        of_a, of_b = set(a.factors()), set(b.factors())
        for x, y in zip(a_dims, b_dims, strict=True):
            mine, theirs = a.dims[x], b.dims[y]
            if not mine or not theirs or mine == theirs:
                continue
            apart = of_b.isdisjoint(mine) and of_a.isdisjoint(theirs)
            if apart and len(mine) == len(theirs) == 1 and mine[0].size == theirs[0].size:
                renamed[theirs[0]] = mine
            else:
                a, b = self._aligned(a, x, b, y, apart=apart)
                of_a, of_b = set(a.factors()), set(b.factors())
        return a, b.split(renamed)

    def _aligned(
        self, a: Value, x: int, b: Value, y: int, *, apart: bool
    ) -> tuple[Value, Value]:
        """Both values with the same factors on dimension ``x`` of one and ``y`` of the other."""
        if not apart:
            a = a.split({f: (Factor(f.size),) for f in a.dims[x]})
            b = b.split({f: (Factor(f.size),) for f in b.dims[y]})
        parts = common_parts(a.dims[x], b.dims[y])
        if parts is None:
            a, _ = self.single(a, x)
            b, _ = self.single(b, y)
            parts = common_parts(a.dims[x], b.dims[y])
        if parts is None:
            a, b = self.whole_dims(a, [x]), self.whole_dims(b, [y])
            return a, b.with_dims(a.dims[x] if k == y else d for k, d in enumerate(b.dims))
        return a.split(parts[0]), b.split(parts[1])

    def meet(self, a: Value, b: Value, shared: Collection[Factor]) -> tuple[Block, ...]:
        """The blocks of a result that both values index alike on the shared factors."""
        result: list[Block] = []
        for mine, theirs in _overlapping(a.blocks, b.blocks):
            result += self._meet(mine, theirs, shared)
        return tuple(result)

    def _meet(
        self, mine: list[Block], theirs: list[Block], shared: Collection[Factor]
    ) -> list[Block]:
        """Blocks that overlap: those of one value with those of another."""
        mine = self._narrow(mine, theirs, shared)
        theirs = self._narrow(theirs, mine, shared)
        if not mine or not theirs:
            return mine + theirs
        if len(mine) == len(theirs) == 1 and set(mine[0].factors) == set(theirs[0].factors):
            ids = theirs[0].ids.transpose(theirs[0].axes(mine[0].factors))
            self.links.connect(mine[0].ids, ids)
            # Ids that stand for repeats of one element say nothing of the channels they meet.
            return [Block(mine[0].factors, ids)] if self.links.is_soft(mine[0].ids) else mine
        every = mine + theirs
        cover = max(every, key=lambda block: len(block.factors))
        others = [block for block in every if block is not cover]
        if any(set(block.factors) - set(cover.factors) for block in others):
            return self._conflict(every, mine, theirs, shared)
        readers = [(cover.axes(block.factors), block.ids) for block in others]
        reason = self.because("is shared along another dimension that channels are removed from")
        self.links.product(cover.ids, readers, reason.reason)
        return [cover]

    def _untrack(self, mine: list[Block], theirs: list[Block], gone: list[Block]) -> None:
        for blocks in (mine, theirs):
            blocks[:] = [block for block in blocks if block not in gone]

    def _narrow(
        self, blocks: list[Block], others: list[Block], shared: Collection[Factor]
    ) -> list[Block]:
        """The blocks tied along the shared factors that the other value does not track."""
        known = {factor for block in others for factor in block.factors}
        result = []
        for block in blocks:
            missing = [f for f in block.factors if f in shared and f not in known]
            if not missing:
                result.append(block)
            elif self.links.is_soft(block.ids) and len(missing) == len(block.factors):
                self.links.freeze(block.ids, None)
            elif rest := self._tied(block, missing):
                result.append(rest)
        return result

    def _conflict(
        self,
        every: list[Block],
        mine: list[Block],
        theirs: list[Block],
        shared: Collection[Factor],
    ) -> list[Block]:
        """Blocks of which none covers the others, as in ``[heads, a] x [heads, b]``.

        What all of them have (heads) goes whole, or stays where the size of heads is pruned;
        blocks with nothing in common become one unit.
        """
        soft = [block for block in every if self.links.is_soft(block.ids)]
        if soft:
            for block in soft:
                self.links.freeze(block.ids, None)
            self._untrack(mine, theirs, soft)
            return self._meet(mine, theirs, shared)
        if common := [f for f in every[0].factors if all(f in b.factors for b in every)]:
            return self._in_common(every, common)
        self.links.connect_all(block.ids for block in every)
        factors = tuple(dict.fromkeys(f for block in every for f in block.factors))
        return [Block(factors, _broadcast(every[0], factors))]

    def _in_common(self, every: list[Block], common: list[Factor]) -> list[Block]:
        if self.links.attention == "size":
            rests = (self._tied(block, common) for block in every)
            return [rest for rest in rests if rest]
        found = []
        for block in every:
            rest = self._tied(block, [f for f in block.factors if f not in common])
            assert rest is not None, "a block keeps what it has in common"
            found.append(rest.ids.transpose(rest.axes(common)))
        for ids in found[1:]:
            self.links.connect(found[0], ids)
        return [Block(tuple(common), found[0])]

    def elementwise(self, values: Sequence[Value]) -> Value:
        """The result of an elementwise operator with broadcasting."""
        result = values[0]
        for value in values[1:]:
            result = self._broadcast_pair(result, value)
        return result

    def _broadcast_pair(self, a: Value, b: Value) -> Value:
        rank = max(len(a.dims), len(b.dims))
        b = _apart(a := _of_rank(a, rank), _of_rank(b, rank))
        a, b = self.align(a, range(rank), b, range(rank))
        shared = {f for x, y in zip(a.dims, b.dims, strict=True) if x == y for f in x}
        dims = tuple(x or y for x, y in zip(a.dims, b.dims, strict=True))
        return Value(dims, self.meet(a, b, shared))

    def meet_dims(
        self, a: Value, a_dims: Sequence[int], b: Value, b_dims: Sequence[int]
    ) -> tuple[Value, Value]:
        """Align pairs of dimensions and link their ids; returns both values, aligned.

        Both keep their own blocks, whose ids are linked.
        """
        a, b = self.align(a, a_dims, b, b_dims)
        shared = {
            f for x, y in zip(a_dims, b_dims, strict=True) if a.dims[x] == b.dims[y]
            for f in a.dims[x]
        }
        self.meet(a, b, shared)
        return a, b

    # -- contraction -------------------------------------------------------------------------

    def contract(self, a: Value, b: Value, sums: Sequence[tuple[int, int]]) -> Value:
        """The sum of products over pairs of dimensions, for a layer: ``b`` is its weight.

        The result has the other dimensions of ``a``, then those of ``b``.
        """
        b = b.renamed()
        a_sums, b_sums = [x for x, _ in sums], [y for _, y in sums]
        a, b = self.align(a, a_sums, b, b_sums)
        shared = {factor for x in a_sums for factor in a.dims[x]}
        rest = tuple(d for k, d in enumerate(b.dims) if k not in b_sums)
        both = Value(a.dims + rest, self.meet(a, b, shared))
        return self.contracted(both, a_sums)

    def contracted(self, value: Value, dims: Sequence[int], *, heads: bool = False) -> Value:
        """The value summed over dimensions, which disappear.

        A joint block leaves the ids of its remaining factors: fresh ones that a product binds to
        it, or with ``heads`` its own, tied along what is summed over.
        """
        gone = [factor for dim in dims for factor in value.dims[dim]]
        kept = tuple(d for k, d in enumerate(value.dims) if k not in set(dims))
        blocks = []
        for block in value.blocks:
            if not block.touches(gone):
                blocks.append(block)
            elif all(factor in gone for factor in block.factors):
                continue
            elif heads:
                rest = self._tied(block, gone)
                blocks += [rest] if rest else []
            else:
                blocks.append(self._projection(block, gone))
        return Value(kept, tuple(blocks))

    def _projection(self, block: Block, gone: Collection[Factor]) -> Block:
        rest = tuple(f for f in block.factors if f not in gone)
        ids = self.links.fresh(*(f.size for f in rest))
        reason = self.because("its channels are summed over together with another dimension")
        self.links.product(block.ids, [(block.axes(rest), ids)], reason.reason)
        return Block(rest, ids)


def _of_rank(value: Value, rank: int) -> Value:
    """The value with dimensions of size 1 in front of its own."""
    missing = rank - len(value.dims)
    return Value(((),) * missing + value.dims, value.blocks) if missing else value


def _apart(a: Value, b: Value) -> Value:
    """``b`` with factors of its own on the dimensions that ``a`` broadcasts."""
    repeated = [f for x, y in zip(a.dims, b.dims, strict=True) if not x for f in y]
    if not repeated:
        return b
    used = set(a.factors())
    clash = [factor for factor in repeated if factor in used]
    return b.split({factor: (Factor(factor.size),) for factor in clash})


def _with_run(
    dim: tuple[Factor, ...], run: Sequence[Factor], fused: Factor
) -> tuple[Factor, ...]:
    """A dimension with a run of its factors replaced."""
    if run[0] not in dim:
        return dim
    start = dim.index(run[0])
    return (*dim[:start], fused, *dim[start + len(run) :])


def _replaced(value: Value, run: Sequence[Factor], new: Sequence[Factor]) -> Value:
    """The value, as one dimension, with an untracked run of factors replaced by others."""
    every = value.factors()
    start = every.index(run[0]) if run else len(every)
    return Value(((*every[:start], *new, *every[start + len(run) :]),), value.blocks)


def _broadcast(block: Block, order: Sequence[Factor]) -> Ids:
    """The block's ids repeated over all factors of ``order``."""
    present = [factor for factor in order if factor in block.factors]
    ids = block.ids.transpose(block.axes(present))
    index = tuple(slice(None) if factor in block.factors else None for factor in order)
    return np.broadcast_to(ids[index], [factor.size for factor in order])


def _segments(
    a: Sequence[Factor], b: Sequence[Factor]
) -> list[tuple[list[Factor], list[Factor]]]:
    """The shortest runs of both lists whose sizes have equal products."""
    segments = []
    start_a = start_b = end_a = end_b = 0
    size_a: Extent = 1
    size_b: Extent = 1
    while end_a < len(a) or end_b < len(b):
        if end_a == start_a or (end_a < len(a) and _smaller(size_a, size_b)):
            if end_a == len(a):
                break
            size_a, end_a = size_a * a[end_a].size, end_a + 1
        elif end_b < len(b):
            size_b, end_b = size_b * b[end_b].size, end_b + 1
        else:
            size_a, end_a = size_a * a[end_a].size, end_a + 1
        if size_a == size_b:
            segments.append((list(a[start_a:end_a]), list(b[start_b:end_b])))
            start_a, start_b, size_a, size_b = end_a, end_b, 1, 1
    if start_a < len(a) or start_b < len(b):
        segments.append((list(a[start_a:]), list(b[start_b:])))
    return segments


def _smaller(a: Extent, b: Extent) -> bool:
    """Whether the run of size a must grow before that of size b."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return quotient(b, a) is not None


def _overlapping(
    mine: Sequence[Block], theirs: Sequence[Block]
) -> list[tuple[list[Block], list[Block]]]:
    """The blocks of two values in groups that share factors."""
    groups: list[tuple[set[Factor], list[Block], list[Block]]] = []
    for side, blocks in enumerate((mine, theirs)):
        for block in blocks:
            factors = set(block.factors)
            joined: tuple[list[Block], list[Block]] = ([], [])
            joined[side].append(block)
            kept = []
            for group in groups:
                if group[0] & factors:
                    factors |= group[0]
                    joined[0][:0] = group[1]
                    joined[1][:0] = group[2]
                else:
                    kept.append(group)
            groups = [*kept, (factors, *joined)]
    return [(a, b) for _, a, b in groups]

"""Rules of operators that take tensors apart and put them together: slice, split, concat, index.

Each does to the ids what the operator does to the elements. Where the parts lie is recomputed
after removal from the indices that survive; parts may lose different numbers of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import fx

from pruna_ir.coupling.rule import Edit, Result, Rule, Site
from pruna_ir.coupling.value import Block, Factor, Ids, Mask, Value, common_parts

aten = torch.ops.aten

# -- parts of a dimension ------------------------------------------------------------------


def _take(site: Site, value: Value, dim: int, index: Ids) -> Value:
    """The value with the given indices of a static dimension."""
    value, factor = site.algebra.single(value, dim)
    size = len(index)
    new = () if size == 1 else (Factor(size),)
    dims = tuple(new if k == dim else d for k, d in enumerate(value.dims))
    if factor is None:
        return Value(dims, value.blocks)
    if size == 0:
        # Nothing of the dimension is left, but the others keep their channels.
        rest = site.algebra.contracted(value, [dim])
        return rest.with_dims((*rest.dims[:dim], new, *rest.dims[dim:]))
    blocks = []
    for block in value.blocks:
        axis = block.factors.index(factor) if factor in block.factors else -1
        taken = block if axis < 0 else _taken(site, block, axis, index, new)
        if taken is not None:
            blocks.append(taken)
    return Value(dims, tuple(blocks))


def _taken(
    site: Site, block: Block, axis: int, index: Ids, new: tuple[Factor, ...]
) -> Block | None:
    ids = block.ids.take(index, axis=axis)
    factors = (*block.factors[:axis], *new, *block.factors[axis + 1 :])
    if not factors:
        # A single channel is read out of its dimension, so it must stay.
        site.because("reads one of them by its index").links.freeze(
            ids, site.because("reads one of them by its index").reason
        )
        return None
    return Block(factors, ids if new else ids.squeeze(axis))


def _bounds(site_arg: Callable[[str], object], size: int) -> range:
    def bound(name: str, default: int) -> int:
        given = site_arg(name)
        return default if given is None else int(given)  # type: ignore[call-overload]

    start, stop, _ = slice(bound("start", 0), bound("end", size)).indices(size)
    return range(start, max(start, stop), bound("step", 1))


def _slice(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    size = value.sizes()[dim]
    dynamic = any(isinstance(site.arg(name), fx.Node) for name in ("start", "end"))
    if dynamic or not isinstance(size, int):
        if isinstance(site.shape()[dim], type(size)) and site.shape()[dim] == size:
            return value
        value = site.because("cuts it at a place that is computed").whole_dims(value, [dim])
        new = Value.untracked([1] * len(value.dims)).dims, site.untracked()
        assert isinstance(new[1], Value)
        dims = tuple(new[1].dims[dim] if k == dim else d for k, d in enumerate(value.dims))
        return Value(dims, value.blocks)
    if len(_bounds(site.arg, size)) == size:
        return value
    return _take(site, value, dim, np.array(_bounds(site.arg, size), np.int64))


def _resize_slice(edit: Edit) -> None:
    value = edit.value("self")
    dim = int(edit.arg("dim")) % len(value.dims)
    if not value.tracked(dim):
        return
    kept = edit.kept(value, dim)
    _read(edit, dim, _places(kept, _bounds(edit.arg, kept.size)))


def _places(kept: Mask, index: Sequence[int]) -> Ids:
    """Where the survivors among the given indices stand after removal."""
    rank = np.cumsum(kept) - 1
    wanted = np.asarray(index, np.int64)
    return rank[wanted[kept[wanted]]].astype(np.int64)


def _read(edit: Edit, dim: int, places: Ids) -> None:
    """Let a slice or index node read the given places, as a slice where they are contiguous."""
    if len(places) and (np.diff(places) == 1).all():
        arguments = {"start": int(places[0]), "end": int(places[-1]) + 1, "step": 1}
        if edit.node.target is aten.slice.Tensor:
            edit.update(**arguments)
            return
        new = edit.rw.insert(
            aten.slice.Tensor, before=edit.node, like=edit.node, self=edit.arg("self"), dim=dim,
            **arguments,
        )  # fmt: skip
    else:
        index = edit.rw.constant(torch.from_numpy(places), "kept_index", before=edit.node)
        new = edit.rw.insert(
            aten.index_select.default, before=edit.node, like=edit.node, self=edit.arg("self"),
            dim=dim, index=index,
        )  # fmt: skip
    edit.replace(new)


def _narrow(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    start, length = site.arg("start"), site.arg("length")
    if isinstance(start, fx.Node) or isinstance(length, fx.Node):
        site.because("cuts it at a place that is computed").freeze(value)
        return site.untracked()
    return _take(site, value, dim, np.arange(start, start + length, dtype=np.int64))


def _resize_narrow(edit: Edit) -> None:
    value = edit.value("self")
    dim = int(edit.arg("dim")) % len(value.dims)
    start = int(edit.arg("start"))
    places = _places(edit.kept(value, dim), range(start, start + int(edit.arg("length"))))
    edit.update(start=int(places[0]), length=len(places))


def _select(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    size, index = value.sizes()[dim], site.arg("index")
    if not value.tracked(dim):
        return value.with_dims(d for k, d in enumerate(value.dims) if k != dim)
    if isinstance(index, fx.Node) or not isinstance(size, int):
        site.because("selects an index that is computed").freeze(value)
        return site.untracked()
    taken = _take(site, value, dim, np.array([index % size], np.int64))
    return taken.with_dims(d for k, d in enumerate(taken.dims) if k != dim)


def _resize_select(edit: Edit) -> None:
    value = edit.value("self")
    dim = int(edit.arg("dim")) % len(value.dims)
    if value.tracked(dim):
        kept = edit.kept(value, dim)
        index = int(edit.arg("index")) % kept.size
        edit.update(index=int(_places(kept, [index])[0]))


def _index_select(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    whole = site.because("looks them up by an index").whole_dims(value, [dim])
    dims = tuple(
        Value.untracked(site.node.meta["val"].shape).dims[dim] if k == dim else d
        for k, d in enumerate(whole.dims)
    )
    return Value(dims, whole.blocks)


def _index(site: Site) -> Result:
    """Advanced indexing: indexed dimensions stay whole, the others keep their channels."""
    value = site.value("self")
    given = site.arg("indices")
    indexed = [k for k, index in enumerate(given) if index is not None]
    result = site.untracked()
    assert isinstance(result, Value)
    contiguous = indexed == list(range(indexed[0], indexed[-1] + 1))
    whole = site.because("looks them up by an index").whole_dims(value, indexed)
    if not contiguous:
        site.because("looks them up by an index").freeze(whole)
        return result
    added = len(result.dims) - (len(value.dims) - len(indexed))
    front = indexed[0]
    dims = (
        whole.dims[:front] + result.dims[front : front + added] + whole.dims[indexed[-1] + 1 :]
    )
    return Value(dims, whole.blocks)


def _gather(site: Site) -> Result:
    """An index for every element of the result: the gathered dimension stays whole, the others
    keep their channels where the index is as large."""
    value, index = site.value("self"), site.value("index")
    dim = site.axis("dim", len(value.dims))
    cut = [k for k, (a, b) in enumerate(zip(value.sizes(), index.sizes(), strict=True)) if a != b]
    stays = sorted({dim, *cut})
    by_index = site.because("gathers them by an index")
    value, index = by_index.whole_dims(value, stays), by_index.whole_dims(index, stays)
    rest = value.with_dims(() if k in stays else d for k, d in enumerate(value.dims))
    return site.algebra.elementwise([rest, index])  # an index repeated for all has soft ids: last


# -- splitting -----------------------------------------------------------------------------


def _split(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    if not value.tracked(dim):
        outputs = site.untracked()
        assert isinstance(outputs, tuple)
        return tuple(
            Value(
                tuple(o.dims[dim] if k == dim else d for k, d in enumerate(value.dims)),
                value.blocks,
            )
            for o in outputs
        )
    results, start = [], 0
    for output in range(len(site.node.meta["val"])):
        length = int(site.shape(output)[dim])
        results.append(_take(site, value, dim, np.arange(start, start + length, dtype=np.int64)))
        start += length
    return tuple(results)


def _resize_split(edit: Edit) -> None:
    """Any split becomes one with explicit sizes: parts may lose different numbers of channels."""
    value = edit.value("self")
    dim = int(edit.arg("dim")) % len(value.dims)
    if not value.tracked(dim):
        return
    old = [int(part.shape[dim]) for part in edit.node.meta["val"]]
    kept = edit.kept(value, dim)
    sizes = [int(part.sum()) for part in np.split(kept, np.cumsum(old)[:-1])]
    new = edit.rw.insert(
        aten.split_with_sizes.default, before=edit.node, like=edit.node, self=edit.arg("self"),
        split_sizes=old, dim=dim,
    )  # fmt: skip
    edit.replace(new)
    edit.rw.update(new, split_sizes=sizes)


def _unbind(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    results = []
    for index in range(len(site.node.meta["val"])):
        taken = (
            _take(site, value, dim, np.array([index], np.int64)) if value.tracked(dim) else value
        )
        results.append(taken.with_dims(d for k, d in enumerate(taken.dims) if k != dim))
    return tuple(results)


# -- joining -------------------------------------------------------------------------------


def _cat(site: Site) -> Result:
    values = [v for v in site.tensors("tensors") if v.sizes() != (0,)]
    dim = site.axis("dim", len(values[0].dims))
    values = [v for v in values if v.sizes()[dim] != 0] or values[:1]
    others = [k for k in range(len(values[0].dims)) if k != dim]
    sizes = [value.sizes()[dim] for value in values]
    tracked = any(value.tracked(dim) for value in values)
    if tracked and not all(isinstance(size, int) for size in sizes):
        algebra = site.because("joins them along a dimension of dynamic size")
        values = [algebra.whole_dims(value, [dim]) for value in values]
        tracked = False
    values = [site.algebra.single(value, dim)[0] for value in values]
    if tracked:
        values = [_with_ids(site, value, dim) for value in values]
    rest = _rest(site, values, dim, others)
    joined = Value.untracked(site.node.meta["val"].shape).dims[dim]
    dims = tuple(joined if k == dim else d for k, d in enumerate(rest.dims))
    if not tracked:
        return Value(dims, rest.blocks)
    return Value(dims, _joined_blocks(site, values, rest, dim, joined))


def _with_ids(site: Site, value: Value, dim: int) -> Value:
    """The value with ids on ``dim``: ids that stay where it has none."""
    size = int(value.sizes()[dim])
    if value.tracked(dim) or size == 0:
        return value
    ids = site.links.fresh(size)
    site.links.freeze(ids, site.because("is joined with them").reason)
    factors = value.dims[dim] or (Factor(1),)
    dims = tuple(factors if k == dim else d for k, d in enumerate(value.dims))
    return Value(dims, (*value.blocks, Block(factors, ids)))


def _rest(site: Site, values: list[Value], dim: int, others: list[int]) -> Value:
    """What the operands share on the other dimensions, all on the first one's factors."""
    for k in range(1, len(values)):
        values[0], values[k] = site.algebra.align(
            values[0], others, _own_factor(values[k], dim), others
        )
    for k in range(1, len(values)):
        values[k] = _onto(values[k], values[0], others)
    first = values[0]
    shared = {f for d in others for f in first.dims[d]}
    blocks = tuple(b for b in first.blocks if all(f in shared for f in b.factors))
    for value in values[1:]:
        mine = tuple(b for b in value.blocks if all(f in shared for f in b.factors))
        blocks = site.algebra.meet(Value(first.dims, blocks), Value(first.dims, mine), shared)
    return Value(first.dims, blocks)


def _own_factor(value: Value, dim: int) -> Value:
    return value.split({f: (Factor(f.size),) for f in value.dims[dim]})


def _onto(value: Value, first: Value, others: list[int]) -> Value:
    """The value on the factors of the first operand, which are as fine as any operand's."""
    value = value.renamed()
    translated: dict[Factor, tuple[Factor, ...]] = {}
    for d in others:
        parts = common_parts(first.dims[d], value.dims[d])
        assert parts is not None, "aligned operands have a common refinement"
        origin = {shared: mine for mine, (shared,) in parts[0].items()}
        translated |= {f: tuple(origin[s] for s in split) for f, split in parts[1].items()}
    return value.split(translated)


def _joined_blocks(
    site: Site, values: list[Value], rest: Value, dim: int, joined: tuple[Factor, ...]
) -> tuple[Block, ...]:
    parts = []
    for value in values:
        if not value.dims[dim]:
            continue
        (factor,) = value.dims[dim]
        parts += [(b, factor) for b in value.blocks if factor in b.factors]
    cross = {f for block, factor in parts for f in block.factors if f is not factor}
    if any(set(b.factors) - {factor} != cross for b, factor in parts):
        for block, _ in parts:
            site.because("joins parts that are structured differently").links.freeze(
                block.ids, site.because("joins parts that are structured differently").reason
            )
        return rest.blocks
    order = sorted(cross, key=lambda f: rest.factors().index(f))
    arrays = [b.ids.transpose(b.axes([*order, factor])) for b, factor in parts]
    block = Block((*order, *joined), np.concatenate(arrays, axis=-1))
    kept = tuple(b for b in rest.blocks if not b.touches(order))
    return (*kept, block)


def _stack(site: Site) -> Result:
    """Stacked tensors lose the same channels; none of the tensors goes away."""
    value = site.algebra.elementwise(site.tensors("tensors"))
    dim = site.axis("dim", len(value.dims) + 1)
    count = len(site.arg("tensors"))
    new = () if count == 1 else (Factor(count),)
    return value.with_dims((*value.dims[:dim], new, *value.dims[dim:]))


RULES: dict[str, Rule] = {
    "aten::slice": Rule(_slice, _resize_slice),
    "aten::narrow": Rule(_narrow, _resize_narrow),
    "aten::select": Rule(_select, _resize_select),
    "aten::index_select": Rule(_index_select),
    "aten::index": Rule(_index),
    "aten::gather": Rule(_gather),
    **{
        f"aten::{name}": Rule(_split, _resize_split)
        for name in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split")
    },
    "aten::unbind": Rule(_unbind),
    "aten::cat": Rule(_cat),
    "aten::concat": Rule(_cat),
    "aten::stack": Rule(_stack),
}

"""Rules of operators that give elements another place: reshape, permute, expand, repeat, pad.

Each does to the ids what the operator does to the elements; literal sizes are recomputed after
removal from the indices that survive.
"""

from __future__ import annotations

import numpy as np

from pruna_ir.coupling.rule import Edit, Result, Rule, Site
from pruna_ir.coupling.value import Block, Factor, Value, extent

# -- the same elements in another shape ----------------------------------------------------


def _reshape(site: Site) -> Result:
    return site.algebra.regroup(site.value("self"), site.shape())


def _resize_reshape(edit: Edit) -> None:
    name = "shape" if "shape" in edit.arguments else "size"
    edit.update(**{name: edit.resized(edit.arg(name))})


def _resize_unflatten(edit: Edit) -> None:
    rank = len(edit.value("self").dims)
    edit.update(sizes=edit.resized(edit.arg("sizes"), offset=int(edit.arg("dim")) % rank))


def _permute(site: Site) -> Result:
    value = site.value("self")
    order = [int(d) % len(value.dims) for d in site.arg("dims")]
    return value.with_dims(value.dims[d] for d in order)


def _transpose(site: Site) -> Result:
    value = site.value("self")
    rank = len(value.dims)
    names = ("dim0", "dim1") if "dim0" in site.arguments else ("axis0", "axis1")
    a, b = (site.axis(name, rank) for name in names)
    dims = list(value.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return value.with_dims(dims)


def _t(site: Site) -> Result:
    value = site.value("self")
    return value.with_dims(reversed(value.dims))


def _movedim(site: Site) -> Result:
    value = site.value("self")
    rank = len(value.dims)
    source, target = site.axes("source", rank), site.axes("destination", rank)
    order = [d for d in range(rank) if d not in source]
    for to, origin in sorted(zip(target, source, strict=True)):
        order.insert(to, origin)
    return value.with_dims(value.dims[d] for d in order)


# -- squeezing and repeating ---------------------------------------------------------------


def _squeeze(site: Site) -> Result:
    value = site.value("self")
    rank = len(value.dims)
    given = site.axes("dim", rank) if "dim" in site.arguments else range(rank)
    gone = {d for d in given if value.dims[d] == ()}
    return value.with_dims(d for k, d in enumerate(value.dims) if k not in gone)


def _unsqueeze(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims) + 1)
    return value.with_dims((*value.dims[:dim], (), *value.dims[dim:]))


def _expand(site: Site) -> Result:
    value, shape = site.value("self"), site.shape()
    dims = ((),) * (len(shape) - len(value.dims)) + value.dims
    new, blocks = [], list(value.blocks)
    for dim, size in zip(dims, shape, strict=True):
        if dim or (isinstance(size, int) and size == 1):
            new.append(dim)
            continue
        factor = Factor(size)
        new.append((factor,))
        if isinstance(size, int):
            blocks.append(Block((factor,), site.links.fresh_soft(size)))
    return Value(tuple(new), tuple(blocks))


def _resize_expand(edit: Edit) -> None:
    edit.update(size=edit.resized(edit.arg("size")))


def _repeat(site: Site) -> Result:
    """``repeat``: each dimension becomes [times, size]."""
    value = site.value("self")
    times = site.arg("repeats" if "repeats" in site.arguments else "dims")
    rank = max(len(times), len(value.dims))
    dims = ((),) * (rank - len(value.dims)) + value.dims
    counts = [1] * (rank - len(times)) + list(times)
    result = site.untracked()
    assert isinstance(result, Value)
    new = []
    for dim, count, whole in zip(dims, counts, result.dims, strict=True):
        if isinstance(count, int):
            new.append(dim if count == 1 else (Factor(count), *dim))
        else:
            new.append(whole if not dim else (Factor(extent(count.meta["val"])), *dim))
    return Value(tuple(new), value.blocks)


def _repeat_interleave(site: Site) -> Result:
    value, times = site.value("self"), site.arg("repeats")
    if site.arg("dim") is None or not isinstance(times, int):
        site.because("repeats them by a computed count").freeze(value)
        return site.untracked()
    dim = site.axis("dim", len(value.dims))
    new = () if times == 1 else (Factor(times),)
    return value.with_dims((*d, *new) if k == dim else d for k, d in enumerate(value.dims))


# -- padding and shuffles ------------------------------------------------------------------


def _pad(site: Site) -> Result:
    value, pads = site.value("self"), list(site.arg("pad"))
    rank = len(value.dims)
    constant = site.arg("mode") in (None, "constant")
    result = site.untracked()
    assert isinstance(result, Value)
    for k in range(len(pads) // 2):
        dim, before, after = rank - 1 - k, pads[2 * k], pads[2 * k + 1]
        if before == 0 and after == 0:
            continue
        grows = isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0
        if not (value.tracked(dim) and constant and grows):
            value = site.because("pads them").whole_dims(value, [dim])
            dims = tuple(result.dims[dim] if j == dim else d for j, d in enumerate(value.dims))
            value = Value(dims, value.blocks)
        else:
            value = _padded(site, value, dim, before, after)
    return value


def _padded(site: Site, value: Value, dim: int, before: int, after: int) -> Value:
    """A channel dimension padded with constants, which may go like any channel."""
    value, factor = site.algebra.single(value, dim)
    assert factor is not None
    new = Factor(factor.size + before + after)
    blocks = []
    for block in value.blocks:
        if factor not in block.factors:
            blocks.append(block)
            continue
        axis = block.factors.index(factor)
        shape = list(block.ids.shape)
        head = site.links.fresh(*shape[:axis], before, *shape[axis + 1 :])
        tail = site.links.fresh(*shape[:axis], after, *shape[axis + 1 :])
        ids = np.concatenate([head, block.ids, tail], axis=axis)
        blocks.append(Block(tuple(new if f is factor else f for f in block.factors), ids))
    dims = tuple((new,) if k == dim else d for k, d in enumerate(value.dims))
    return Value(dims, tuple(blocks))


def _resize_pad(edit: Edit) -> None:
    value, result, pads = edit.value("self"), edit.result(), list(edit.arg("pad"))
    rank = len(value.dims)
    for k in range(len(pads) // 2):
        dim = rank - 1 - k
        if result.tracked(dim) and pads[2 * k : 2 * k + 2] != [0, 0]:
            kept = edit.kept(result, dim)
            end = kept.size - pads[2 * k + 1]
            pads[2 * k : 2 * k + 2] = [int(kept[: pads[2 * k]].sum()), int(kept[end:].sum())]
    edit.update(pad=pads)


def _channel_shuffle(site: Site) -> Result:
    value = site.value("self")
    groups, channels = int(site.arg("groups")), value.sizes()[1]
    sizes = value.sizes()
    split = site.algebra.regroup(value, (sizes[0], groups, channels // groups, *sizes[2:]))
    order = (0, 2, 1, *range(3, len(split.dims)))
    joint_blocks(site, split, (1, 2))
    swapped = split.with_dims(split.dims[d] for d in order)
    return site.algebra.regroup(swapped, site.shape())


def joint_blocks(site: Site, value: Value, dims: tuple[int, int]) -> None:
    """Keep two dimensions rectangular though no tensor of the graph has them apart."""
    factors = [*value.dims[dims[0]], *value.dims[dims[1]]]
    for block in value.blocks:
        if block.touches(value.dims[dims[0]]) and block.touches(value.dims[dims[1]]):
            order = [f for f in factors if f in block.factors]
            rest = [f for f in block.factors if f not in order]
            site.links.product(block.ids.transpose(block.axes([*order, *rest])))


def _pixel_shuffle(site: Site) -> Result:
    value, r = site.value("self"), int(site.arg("upscale_factor"))
    rank, sizes, out = len(value.dims), value.sizes(), site.shape()
    lead = rank - 3
    fine = (*sizes[:lead], out[lead], r, r, *sizes[lead + 1 :])
    split = site.algebra.regroup(value, fine)
    # The r * r channels of one result channel become its pixels: they go together.
    split = site.because("become pixels").whole_dims(split, [lead + 1, lead + 2])
    result = site.untracked()
    assert isinstance(result, Value)
    return Value((*split.dims[: lead + 1], *result.dims[lead + 1 :]), split.blocks)


RULES: dict[str, Rule] = {
    **{
        f"aten::{name}": Rule(_reshape, _resize_reshape)
        for name in ("reshape", "view", "_unsafe_view")
    },
    **{f"aten::{name}": Rule(_reshape) for name in ("flatten", "reshape_as", "view_as", "ravel")},
    "aten::unflatten": Rule(_reshape, _resize_unflatten),
    "aten::permute": Rule(_permute),
    "aten::transpose": Rule(_transpose),
    "aten::swapaxes": Rule(_transpose),
    "aten::t": Rule(_t),
    "aten::numpy_T": Rule(_t),
    "aten::movedim": Rule(_movedim),
    "aten::squeeze": Rule(_squeeze),
    "aten::unsqueeze": Rule(_unsqueeze),
    "aten::expand": Rule(_expand, _resize_expand, creates=True),
    "aten::repeat": Rule(_repeat),
    "aten::tile": Rule(_repeat),
    "aten::repeat_interleave": Rule(_repeat_interleave),
    "aten::pad": Rule(_pad, _resize_pad),
    "aten::constant_pad_nd": Rule(_pad, _resize_pad),
    "aten::channel_shuffle": Rule(_channel_shuffle),
    "aten::native_channel_shuffle": Rule(_channel_shuffle),
    "aten::pixel_shuffle": Rule(_pixel_shuffle),
}

"""Rules of layers: convolutions, matrix products, attention, embeddings and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.coupling.algebra import Algebra
from pruna_ir.coupling.rule import Edit, Result, Rule, Site
from pruna_ir.coupling.value import Block, Factor, Ids, Mask, Value

aten = torch.ops.aten

# -- bias -------------------------------------------------------------------------


def _with_bias(site: Site, name: str, result: Value, dim: int) -> Value:
    """The result after a vector was added along one of its dimensions."""
    bias = site.maybe(name)
    if bias is None or not bias.dims:
        return result
    result, _ = site.algebra.meet_dims(result, [dim], bias.renamed(), [0])
    return result


# -- convolutions --------------------------------------------------------------------------


def _conv(site: Site) -> Result:
    x, weight = site.value("input"), site.value("weight")
    spatial = len(weight.dims) - 2
    if not isinstance(site.arg("groups"), int):
        dynamic = site.because("are convolved in a dynamic number of groups")
        for operand in site.operands():
            dynamic.freeze(operand)
        return site.untracked()
    transposed = bool(site.arg("transposed")) or "transpose" in str(site.node.target)
    lead = len(x.dims) - spatial - 1
    passed = [] if transposed else _passed(site, weight.sizes()[2:])
    passed += [] if transposed else _filtered(site, x, weight)
    sliding = [lead + 1 + k for k in range(spatial) if k not in passed]
    x = site.because("slides over them").whole_dims(x, sliding)
    weight = _silent(site).whole_dims(weight, range(2, 2 + spatial))
    groups = int(site.arg("groups"))
    if groups == 1:
        sums = (lead, 0 if transposed else 1)
        site.mark_rows(weight, 1 if transposed else 0)
        flat_x = x.with_dims(x.dims[: lead + 1])
        flat_w = weight.with_dims(weight.dims[:2])
        product = site.algebra.contract(flat_x, flat_w, [sums])
        channels, blocks = product.dims[-1], product.blocks
    else:
        site.mark_rows(weight, 0)
        site.mark_rows(weight, 1 if transposed else 0)
        channels, blocks = _grouped(site, x, weight, lead, groups, transposed=transposed)
    result = site.untracked()
    assert isinstance(result, Value)
    places = [
        x.dims[lead + 1 + k] if k in passed else result.dims[lead + 1 + k] for k in range(spatial)
    ]
    value = Value((*x.dims[:lead], channels, *places), blocks)
    return _with_bias(site, "bias", value, lead)


def _passed(site: Site, kernel: Sequence[Any]) -> list[int]:
    """The spatial dimensions along which a kernel of one element moves nothing."""

    def each(name: str) -> list[int]:
        given = site.arg(name)
        if isinstance(given, str):
            return [0] * len(kernel)
        return list(given) * (len(kernel) if len(given) == 1 else 1)

    settings = zip(kernel, each("stride"), each("padding"), strict=True)
    return [k for k, setting in enumerate(settings) if setting == (1, 1, 0)]


def _filtered(site: Site, x: Value, weight: Value) -> list[int]:
    """The dimension along which a filter of one channel runs over channels (ECA), if any.

    Neighbours are those of the unpruned program: removed ones count as zeros (`_resize_conv`).
    """
    if site.node.target is not aten.conv1d.default or weight.sizes()[:2] != (1, 1):
        return []
    single = [block for block in x.blocks if block.touches(x.dims[-1])]
    alone = all(set(block.factors) <= set(x.dims[-1]) for block in single)
    stays = list(site.arg("stride")) == [1] and site.shape()[-1:] == x.sizes()[-1:]
    return [0] if single and alone and stays else []


def _silent(site: Site) -> Algebra:
    return Algebra(site.links, None)


def _grouped(
    site: Site, x: Value, weight: Value, lead: int, groups: int, *, transposed: bool
) -> tuple[tuple[Factor, ...], tuple[Block, ...]]:
    """A grouped convolution: [groups, in / groups] meets [groups, out / groups].

    Depthwise (one input channel a group): a group is a channel, and ``groups`` shrinks.
    Otherwise each group loses the same local channels, and ``groups`` stays.
    """
    weight = weight.renamed()
    inputs = x.sizes()[lead] // groups
    rows = weight.sizes()[0]
    x = _split_dim(site, x, lead, groups, inputs)
    weight = _split_dim(site, weight, 0, groups, rows // groups)
    if inputs == 1:
        several = site.because("is one of several outputs of a group")
        weight = several.whole_dims(weight, [1, 2])
        x, weight = site.algebra.meet_dims(x, [lead], weight, [0])
        both = site.algebra.meet(x, weight, set(x.dims[lead]))
        return (*weight.dims[0], *weight.dims[2 if transposed else 1]), both
    equal = site.because("belongs to a group that must keep its size")
    x, weight = equal.whole_dims(x, [lead]), equal.whole_dims(weight, [0])
    out_dim, in_dim = (2, 1) if transposed else (1, 2)
    x, weight = site.algebra.meet_dims(x, [lead + 1], weight, [in_dim])
    channels = weight.dims[out_dim]
    # A weight computed in the graph may have ids that span both of its channel dimensions.
    summed = site.algebra.contracted(weight, [in_dim])
    w_rest = tuple(b for b in summed.blocks if b.touches(channels))
    return (Factor(groups), *channels), site.algebra.contracted(x, [lead + 1]).blocks + w_rest


def _split_dim(site: Site, value: Value, dim: int, outer: int, inner: int) -> Value:
    """The value with one dimension seen as two."""
    sizes = value.sizes()
    part = Value((value.dims[dim],), value.blocks)
    part = site.algebra.regroup(part, (outer, inner)) if sizes[dim] != 1 else Value(((), ()), ())
    # Regrouping may have split or fused factors that other dimensions do not share.
    return Value((*value.dims[:dim], *part.dims, *value.dims[dim + 1 :]), part.blocks)


def _resize_conv(edit: Edit) -> None:
    groups = int(edit.arg("groups"))
    x = edit.value("input")
    weight = edit.value("weight")
    if groups == 1:
        last = len(x.dims) - 1
        if weight.sizes()[2:] != (1,) and x.tracked(last) and not edit.kept(x, last).all():
            _filter_in_place(edit, edit.kept(x, last))
        return
    lead = len(x.dims) - len(weight.dims) + 1
    before, after = edit.counts(x, lead)
    if before == groups:
        edit.update(groups=after)


def _filter_in_place(edit: Edit, kept: Mask) -> None:
    """Filter along channels with zeros in the places of those that are gone.

    y = conv1d(x)    -->    y = conv1d([x, 0][places])[kept]
    """
    count = int(kept.sum())
    places = np.where(kept, np.cumsum(kept) - 1, count)
    known = {"before": edit.node, "like": edit.node}
    zero = edit.rw.insert(
        aten.constant_pad_nd.default, self=edit.arg("input"), pad=[0, 1], value=0.0, **known
    )

    def read(source: fx.Node, index: Ids) -> fx.Node:
        tensor = edit.rw.constant(torch.from_numpy(index), "kept_index", before=edit.node)
        return edit.rw.insert(
            aten.index_select.default, self=source, dim=-1, index=tensor, **known
        )

    arguments = {**edit.arguments, "input": read(zero, places)}
    whole = edit.rw.insert(aten.conv1d.default, **arguments, **known)
    edit.replace(read(whole, np.flatnonzero(kept)))


# -- matrix products -----------------------------------------------------------------------


def _linear(site: Site) -> Result:
    x, weight = site.value("input"), site.value("weight")
    site.mark_rows(weight, 0)
    last = len(x.dims) - 1
    result = site.algebra.contract(x, weight, [(last, len(weight.dims) - 1)])
    return _with_bias(site, "bias", result, last)


def _matmul(site: Site) -> Result:
    a, b = site.operands()
    return _product(site, a, b)


def _product(site: Site, a: Value, b: Value) -> Value:
    """``a @ b`` with broadcasting: [..., m, k] @ [..., k, n]."""
    vector_a, vector_b = len(a.dims) == 1, len(b.dims) == 1
    a = a.with_dims(((), *a.dims)) if vector_a else a
    b = b.with_dims((*b.dims, ())) if vector_b else b
    _rows_of_product(site, a, b)
    b = b.renamed()
    rank = max(len(a.dims), len(b.dims))
    a = a.with_dims(((),) * (rank - len(a.dims)) + a.dims)
    b = b.with_dims(((),) * (rank - len(b.dims)) + b.dims)
    batch = range(rank - 2)
    a, b = site.algebra.align(a, [*batch, rank - 1], b, [*batch, rank - 2])
    if rank > 2:
        a, b = site.per_head(a, rank - 1), site.per_head(b, rank - 2)
        a, b = site.apart(a, b, {f for k in batch for f in a.dims[k] if a.dims[k] == b.dims[k]})
    pairs = [(a.dims[k], b.dims[k]) for k in batch] + [(a.dims[-1], b.dims[-2])]
    shared = {f for x, y in pairs if x == y for f in x}
    blocks = site.algebra.meet(a, b, shared)
    dims = (*((x or y) for x, y in pairs[:-1]), a.dims[-2], b.dims[-1], a.dims[-1])
    result = site.algebra.contracted(Value(dims, blocks), [rank], heads=True)
    gone = {rank - 2} if vector_a else set()
    gone |= {rank - 1} if vector_b else set()
    return result.with_dims(d for k, d in enumerate(result.dims) if k not in gone)


def _rows_of_product(site: Site, a: Value, b: Value) -> None:
    """A parameter that is multiplied produces channels on its other dimension."""
    for value, dim, node in ((a, -2, "self"), (b, -1, "other"), (b, -1, "mat2")):
        source = site.arg(node)
        if isinstance(source, fx.Node) and _constant(source):
            site.mark_rows(value, dim)


def _constant(node: fx.Node) -> bool:
    """A parameter, or a view of parameters."""
    return node.op == "get_attr" or bool(
        node.all_input_nodes and all(n.op == "get_attr" for n in node.all_input_nodes)
    )


def _addmm(site: Site) -> Result:
    a, b = (
        (site.value("mat1"), site.value("mat2"))
        if "mat1" in site.arguments
        else (site.value("batch1"), site.value("batch2"))
    )
    if "mat1" in site.arguments:
        site.mark_rows(b, 1)
        result = site.algebra.contract(a, b, [(1, 0)])
    else:
        result = _product(site, a, b)
    return site.algebra.elementwise([result, site.value("self").renamed()])


def _product_of_groups(site: Site) -> Result:
    """Each row times the matrix of its group, as experts: [rows, k] and [groups, k, n]."""
    x, weight = site.value("input"), site.value("weight")
    site.mark_rows(weight, 2)
    x = site.because("are grouped by an index").whole_dims(x, [0])
    weight = site.because("is picked by an index").whole_dims(weight, [0])
    return site.algebra.contract(x, weight.with_dims(weight.dims[1:]), [(1, 0)])


def _embedding(site: Site) -> Result:
    weight = site.value("weight").renamed()
    site.mark_rows(weight, 1)
    weight = site.because("looks them up by an index").whole_dims(weight, [0])
    indices = site.value("indices").renamed()
    site.because("is used as an index").freeze(indices)
    return Value((*indices.dims, weight.dims[1]), weight.blocks)


# -- attention -----------------------------------------------------------------------------


def _sdpa(site: Site) -> Result:
    """softmax(q k^T * scale + mask) v: a head of q, k and v is one unit.

    A head size that is tracked without heads (single-head attention) is contracted as it is;
    the scale then becomes a literal, since its default would follow the smaller size.
    """
    q, k = site.value("query"), site.value("key").renamed()
    v, rank = site.value("value").renamed(), len(site.value("query").dims)
    if site.arg("enable_gqa"):
        times = q.sizes()[rank - 3] // k.sizes()[rank - 3]
        k, v = _repeat_heads(site, k, times), _repeat_heads(site, v, times)
    q, k, v = (site.per_head(value, rank - 1) for value in (q, k, v))
    over = site.because("attention is computed along them")
    k, v = over.whole_dims(k, [rank - 2]), over.whole_dims(v, [rank - 2])
    scores = _product(site, q, k.with_dims((*k.dims[:-2], k.dims[-1], k.dims[-2])))
    if (mask := site.maybe("attn_mask")) is not None:
        scores = site.algebra.elementwise([scores, mask.renamed()])
    scores = over.whole_dims(scores, [len(scores.dims) - 1])
    return _product(site, scores, v)


def _repeat_heads(site: Site, value: Value, times: int) -> Value:
    """Keys or values with each head repeated for the query heads that it serves."""
    dim = len(value.dims) - 3
    new = () if times == 1 else (Factor(times),)
    dims = [(*d, *new) if j == dim else d for j, d in enumerate(value.dims)]
    if times == 1 or site.links.attention != "queries":
        return value.with_dims(dims)
    return Value(tuple(dims), (*value.blocks, Block(new, site.links.fresh_soft(times))))


def _resize_sdpa(edit: Edit) -> None:
    query = edit.value("query")
    before, after = edit.counts(query, len(query.dims) - 1)
    if before != after and edit.arg("scale") is None:
        edit.update(scale=1.0 / math.sqrt(before))


# -- norms ---------------------------------------------------------------------------------


def _batch_norm(site: Site) -> Result:
    """One scale, shift, mean and variance a channel of dimension 1."""
    value = site.value("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        parameter = site.maybe(name)
        if parameter is not None:
            value, _ = site.algebra.meet_dims(value, [1], parameter.renamed(), [0])
    return _first_of(site, value)


def _first_of(site: Site, value: Value) -> Result:
    """The value as the (first) result; further results are statistics nobody prunes."""
    outputs = site.untracked()
    return value if isinstance(outputs, Value) else (value, *outputs[1:])


def _layer_norm(site: Site) -> Result:
    """Mean and variance over the last dimensions are those of the survivors."""
    value = site.value("input")
    count = len(site.arg("normalized_shape"))
    dims = range(len(value.dims) - count, len(value.dims))
    for name in ("weight", "bias"):
        parameter = site.maybe(name)
        if parameter is not None:
            value, _ = site.algebra.meet_dims(value, dims, parameter.renamed(), range(count))
    return _first_of(site, value)


def _resize_layer_norm(edit: Edit) -> None:
    value = edit.value("input")
    shape = edit.arg("normalized_shape")
    offset = len(value.dims) - len(shape)
    edit.update(normalized_shape=edit.resized(shape, offset=offset))


def _group_norm(site: Site) -> Result:
    """Every group loses the same local channels, and the number of groups stays; groups of one
    channel go with it."""
    value = site.value("input")
    groups = int(site.arg("num_groups" if "num_groups" in site.arguments else "group"))
    for name in ("weight", "bias"):
        parameter = site.maybe(name)
        if parameter is not None:
            value, _ = site.algebra.meet_dims(value, [1], parameter.renamed(), [0])
    channels = value.sizes()[1]
    if groups in (1, channels) or not value.tracked(1):
        return _first_of(site, value)
    split = _split_dim(site, value, 1, groups, channels // groups)
    equal = site.because("belongs to a group that must keep its size")
    for block in split.blocks:
        axes = [k for k, f in enumerate(block.factors) if f in split.dims[1]]
        if axes and len(axes) == len(block.factors):
            site.links.freeze(block.ids, equal.reason)
        elif axes:
            site.links.tie(block.ids, axes)
    merged = split.with_dims((split.dims[0], (*split.dims[1], *split.dims[2]), *split.dims[3:]))
    return _first_of(site, merged)


def _resize_group_norm(edit: Edit) -> None:
    """One group a channel: groups go with their channels."""
    name = "num_groups" if "num_groups" in edit.arguments else "group"
    before, after = edit.counts(edit.value("input"), 1)
    if before == edit.arg(name) and before != 1:
        edit.update(**{name: after})


def _prelu(site: Site) -> Result:
    value, weight = site.value("self"), site.value("weight").renamed()
    dim = 1 if len(value.dims) > 1 else 0
    value, _ = site.algebra.meet_dims(value, [dim], weight, [0])
    return value


def _per_channel(site: Site) -> Result:
    """``pruna::fake_quant``: scale and zero point belong to the channels of ``axis``."""
    value = site.operands()[0]
    axis = site.arg("axis")
    for name in ("scale", "zero_point"):
        parameter = site.maybe(name)
        if parameter is not None and parameter.dims and axis is not None:
            dim = int(axis) % len(value.dims)
            value, _ = site.algebra.meet_dims(value, [dim], parameter.renamed(), [0])
    return value


_CONVS = (
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)

RULES: dict[str, Rule] = {
    **{f"aten::{name}": Rule(_conv, _resize_conv) for name in _CONVS.split()},
    "aten::linear": Rule(_linear),
    **{f"aten::{name}": Rule(_matmul) for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot")},
    "aten::addmm": Rule(_addmm),
    "aten::baddbmm": Rule(_addmm),
    "transformers::grouped_mm_fallback": Rule(_product_of_groups),
    "aten::embedding": Rule(_embedding),
    "aten::scaled_dot_product_attention": Rule(_sdpa, _resize_sdpa),
    "aten::batch_norm": Rule(_batch_norm),
    "aten::instance_norm": Rule(_batch_norm),
    "aten::_native_batch_norm_legit_no_training": Rule(_batch_norm),
    "aten::layer_norm": Rule(_layer_norm, _resize_layer_norm),
    "aten::native_layer_norm": Rule(_layer_norm, _resize_layer_norm),
    "aten::rms_norm": Rule(_layer_norm, _resize_layer_norm),
    "aten::group_norm": Rule(_group_norm, _resize_group_norm),
    "aten::prelu": Rule(_prelu),
    "pruna::fake_quant": Rule(_per_channel),
}

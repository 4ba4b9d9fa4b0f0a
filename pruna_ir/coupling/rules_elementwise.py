"""Rules of elementwise operators, creations, reductions, softmax and windows over space."""

from __future__ import annotations

import operator

import numpy as np

from pruna_ir.coupling.rule import Edit, Result, Rule, Site
from pruna_ir.coupling.value import Block, Extent, Factor, Value, factors_of


def _elementwise(site: Site) -> Result:
    """All operands and the result share their (broadcast) channels."""
    return site.algebra.elementwise(site.operands())


def _value_and_mask(site: Site) -> Result:
    """``native_dropout``: the value and which of its elements were kept."""
    value = site.operands()[0]
    return value, value


def _unary(site: Site) -> Result:
    """The result has the channels of the first operand, whatever the others are."""
    return site.operands()[0]


def soft(site: Site, shape: tuple[Extent, ...]) -> Value:
    """A tensor of equal elements: its static sizes follow whatever it meets."""
    dims, blocks = [], []
    for size in shape:
        factors = factors_of(size)
        dims.append(factors)
        if factors and isinstance(size, int) and size > 0:
            blocks.append(Block(factors, site.links.fresh_soft(size)))
    return Value(tuple(dims), tuple(blocks))


def _created(site: Site) -> Result:
    return soft(site, site.shape())


def _resize_created(edit: Edit) -> None:
    edit.update(size=edit.resized(edit.arg("size")))


def _reduce(site: Site) -> Result:
    """Statistics over channels are statistics over those that survive."""
    value = site.operands()[0]
    rank = len(value.dims)
    dims = site.axes("dim", rank) if "dim" in site.arguments else list(range(rank))
    reduced = site.algebra.contracted(value, dims)
    if site.arg("keepdim"):
        kept = iter(reduced.dims)
        return Value(tuple(() if k in dims else next(kept) for k in range(rank)), reduced.blocks)
    return reduced


def _reduce_twice(site: Site) -> Result:
    """Two statistics over the same channels."""
    result = _reduce(site)
    assert isinstance(result, Value)
    return result, result


def _extremum(site: Site) -> Result:
    """``max`` and ``min``: of two tensors, or statistics where nobody reads the places."""
    if site.maybe("other") is not None:
        return _elementwise(site)
    if "dim" not in site.arguments:
        return _reduce(site)
    places = [u for u in site.node.users if u.target is operator.getitem and u.args[1] == 1]
    return _whole_dim(site) if any(p.users for p in places) else _reduce_twice(site)


def _whole_dim(site: Site) -> Result:
    """The operator mixes the indices of ``dim``, or returns them: none may vanish."""
    value = site.operands()[0]
    algebra = site.because("is computed along them")
    rank = len(value.dims)
    dims = site.axes("dims" if "dims" in site.arguments else "dim", rank)
    value = algebra.whole_dims(value, dims)
    return _same_shape_or_dropped(site, value, dims)


def _same_shape_or_dropped(site: Site, value: Value, dims: list[int]) -> Result:
    """Each result either keeps the operand's shape, changes ``dims`` only, or drops them."""
    outputs = site.untracked()
    single = isinstance(outputs, Value)
    results = []
    for output in (outputs,) if isinstance(outputs, Value) else outputs:
        if len(output.dims) == len(value.dims):
            shape = [output.dims[k] if k in dims else d for k, d in enumerate(value.dims)]
        else:
            shape = [d for k, d in enumerate(value.dims) if k not in dims]
        results.append(Value(tuple(shape), value.blocks))
    return results[0] if single else tuple(results)


def _window(spatial: int) -> Rule:
    """A window operator over the last dimensions: the others keep their channels."""

    def couple(site: Site) -> Result:
        value = site.operands()[0]
        rank = len(value.dims)
        dims = range(rank - spatial, rank)
        value = site.because("slides over them").whole_dims(value, dims)
        outputs = site.untracked()
        results = tuple(
            Value(value.dims[: rank - spatial] + output.dims[rank - spatial :], value.blocks)
            for output in ((outputs,) if isinstance(outputs, Value) else outputs)
        )
        return results[0] if isinstance(outputs, Value) else results

    return Rule(couple)


def _glu(site: Site) -> Result:
    value = site.value("self")
    dim = site.axis("dim", len(value.dims))
    half = value.split({})
    half, factor = site.algebra.single(half, dim)
    if factor is None:
        return site.untracked()
    rows = Factor(2), Factor(factor.size // 2)
    split = half.split({factor: rows})
    gone = Value(
        tuple(rows[1:] if k == dim else d for k, d in enumerate(split.dims)), split.blocks
    )
    # The gate and the gated half of a channel go together.
    blocks = []
    for block in gone.blocks:
        if rows[0] in block.factors:
            axis = block.factors.index(rows[0])
            site.links.tie(block.ids, [axis])
            rest = tuple(f for f in block.factors if f is not rows[0])
            blocks.append(Block(rest, np.take(block.ids, 0, axis=axis)))
        else:
            blocks.append(block)
    return Value(gone.dims, tuple(blocks))


ELEMENTWISE = Rule(_elementwise, masked="elementwise")
"""The rule of operators that compute each element from the elements at the same place."""

UNARY = Rule(_unary)
WHOLE_DIM = Rule(_whole_dim)
REDUCE = Rule(_reduce)
CREATED = Rule(_created, _resize_created, creates=True)

_ELEMENTWISE = (
    "hardswish dropout alpha_dropout feature_dropout feature_alpha_dropout clone "
    "contiguous alias detach lift_fresh_copy __and__ __or__ __xor__ bitwise_not where masked_fill "
    "expand_as copy zeros_like ones_like full_like empty_like rand_like nan_to_num hardsigmoid "
    "log_sigmoid _weight_norm fake_quantize_per_tensor_affine"
)
# Softmax, like a norm, is taken over the survivors.
_UNARY = "to _to_copy type_as fill softmax _softmax log_softmax _log_softmax"
_WHOLE = "cumsum cumprod sort topk argsort argmax argmin median flip roll diff"
_REDUCE = "mean sum amax amin var std linalg_vector_norm prod logsumexp any all"
_CREATED = "zeros ones full empty new_zeros new_ones new_full new_empty"
_WINDOW = {
    1: "max_pool1d max_pool1d_with_indices avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d "
       "upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d reflection_pad1d "
       "replication_pad1d",
    2: "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
       "upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_bicubic2d_aa "
       "_upsample_bilinear2d_aa reflection_pad2d replication_pad2d _adaptive_avg_pool2d "
       "_upsample_nearest_exact2d",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d "
       "_adaptive_avg_pool3d upsample_trilinear3d upsample_nearest3d _upsample_nearest_exact3d "
       "reflection_pad3d replication_pad3d",
}  # fmt: skip

RULES: dict[str, Rule] = {
    **{f"aten::{name}": ELEMENTWISE for name in _ELEMENTWISE.split()},
    **{f"aten::{name}": UNARY for name in _UNARY.split()},
    **{f"aten::{name}": WHOLE_DIM for name in _WHOLE.split()},
    **{f"aten::{name}": REDUCE for name in _REDUCE.split()},
    **{f"aten::{name}": CREATED for name in _CREATED.split()},
    **{
        f"aten::{name}": _window(spatial)
        for spatial, names in _WINDOW.items()
        for name in names.split()
    },
    "aten::max": Rule(_extremum),
    "aten::min": Rule(_extremum),
    "aten::native_dropout": Rule(_value_and_mask),
    "aten::var_mean": Rule(_reduce_twice),
    "aten::std_mean": Rule(_reduce_twice),
    "aten::glu": Rule(_glu),
}

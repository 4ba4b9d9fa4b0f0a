"""Translations of core ATen operators that TVM's importer lacks or gets wrong, each exact.

    amax, amin      max, min over dimensions
    linear          matmul with the transposed weight, in the dtype of the operands
    matmul, mm, bmm, addmm
                    in the dtype of the operands: the importer's give float32 for all
    scaled_dot_product_attention
                    products and a softmax over rows; rows without a key give zeros
    any             max over booleans as int8
    cumsum, cumprod in the dtype of the result: the importer's adds booleans as booleans, and its
                    negative axes are refused later on
    min.dim         values and the indices of the first minimum
    prod.dim_int    product over one dimension
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from pruna_ir.backends.tvm_reductions import rows_call, softmax
from pruna_ir.call import bind_arguments

Translation = Callable[[fx.Node, Any], Any]


def _operand(importer: Any, node: Any) -> Any:
    from tvm import relax

    value = importer.env[node]
    return value if isinstance(value, relax.Expr) else relax.const(value.numpy())


def _extreme(name: str) -> Translation:
    def translate(node: fx.Node, importer: Any) -> Any:
        from tvm import relax

        bound = bind_arguments(node)
        reduce = getattr(relax.op, name)
        axes = list(bound["dim"]) or None
        x = _operand(importer, bound["self"])
        return importer.block_builder.emit(reduce(x, axes, bool(bound["keepdim"])))

    return translate


def _any(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    x = _operand(importer, bind_arguments(node)["self"])
    zero = relax.const(0, x.ty.dtype.dtype) if str(x.ty.dtype.dtype) != "bool" else None
    truth = x if zero is None else importer.block_builder.emit(relax.op.not_equal(x, zero))
    largest = relax.op.max(relax.op.astype(truth, "int8"))
    return importer.block_builder.emit(relax.op.astype(largest, "bool"))


def _min_dim(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    x, axis, keep = _operand(importer, bound["self"]), int(bound["dim"]), bool(bound["keepdim"])
    values = importer.block_builder.emit(relax.op.min(x, axis, keep))
    indices = importer.block_builder.emit(relax.op.argmin(x, axis, keep))
    return importer.block_builder.emit(relax.Tuple([values, indices]))


def _prod(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    x = _operand(importer, bound["self"])
    product = relax.op.prod(x, int(bound["dim"]), bool(bound["keepdim"]))
    return importer.block_builder.emit(product)


def _scan(name: str) -> Translation:
    def translate(node: fx.Node, importer: Any) -> Any:
        from tvm import relax

        bound = bind_arguments(node)
        result = node.meta["val"]
        dtype = str(result.dtype).removeprefix("torch.")
        x = relax.op.astype(_operand(importer, bound["self"]), dtype)
        scan = getattr(relax.op, name)
        x = importer.block_builder.emit(x)
        return importer.block_builder.emit(scan(x, int(bound["dim"]) % result.dim(), dtype))

    return translate


def _linear(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    emit = importer.block_builder.emit
    x, weight = _operand(importer, bound["input"]), _operand(importer, bound["weight"])
    product = emit(relax.op.matmul(x, emit(relax.op.permute_dims(weight))))
    if bound["bias"] is None:
        return product
    return emit(relax.op.add(product, _operand(importer, bound["bias"])))


def _matmul(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    operands = (_operand(importer, value) for value in bind_arguments(node).values())
    return importer.block_builder.emit(relax.op.matmul(*operands))


def _addmm(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    emit = importer.block_builder.emit
    bias, a, b = (_operand(importer, bound[name]) for name in ("self", "mat1", "mat2"))

    def scaled(x: Any, factor: float) -> Any:
        return x if factor == 1 else emit(x * relax.const(factor, x.ty.dtype.dtype))

    product = scaled(emit(relax.op.matmul(a, b)), bound["alpha"])
    if bound["beta"] == 0:  # torch does not read it then, NaN and all
        return product
    return emit(relax.op.add(product, scaled(bias, bound["beta"])))


def _attention(node: fx.Node, importer: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    emit = importer.block_builder.emit
    query, key, value = (_operand(importer, bound[name]) for name in ("query", "key", "value"))
    if bound["enable_gqa"]:
        key, value = _repeated(query, key, emit), _repeated(query, value, emit)
    shape = bound["query"].meta["val"].shape
    scale = shape[-1] ** -0.5 if bound["scale"] is None else float(bound["scale"])
    # both by the root, as torch does: neither product overflows before the other
    root = relax.const(math.sqrt(scale), query.ty.dtype.dtype)
    axes = list(range(key.ty.ndim))
    swapped = emit(relax.op.permute_dims(key, [*axes[:-2], axes[-1], axes[-2]]))
    scores = emit(relax.op.matmul(emit(query * root), emit(swapped * root)))
    scores = _masked(node, importer, scores)
    return emit(relax.op.matmul(_shares(importer, scores), value))


def _repeated(query: Any, x: Any, emit: Callable[[Any], Any]) -> Any:
    """Keys or values of one head for each of the queries' heads."""
    from tvm import relax

    axis = x.ty.ndim - 3
    return emit(relax.op.repeat(x, int(query.ty.shape[axis]) // int(x.ty.shape[axis]), axis))


def _masked(node: fx.Node, importer: Any, scores: Any) -> Any:
    from tvm import relax

    bound = bind_arguments(node)
    emit = importer.block_builder.emit
    mask, lowest = bound["attn_mask"], relax.const(float("-inf"), scores.ty.dtype.dtype)
    if bound["is_causal"]:
        ones = emit(relax.op.ones(relax.ShapeExpr(list(scores.ty.shape)[-2:]), "int8"))
        allowed = emit(relax.op.astype(emit(relax.op.tril(ones)), "bool"))
        return emit(relax.op.where(allowed, scores, lowest))
    if mask is None:
        return scores
    given = _operand(importer, mask)
    if mask.meta["val"].dtype == torch.bool:
        return emit(relax.op.where(given, scores, lowest))
    return emit(relax.op.add(scores, given))


def _shares(importer: Any, scores: Any) -> Any:
    """Softmax over the last dimension, where a row of -inf gives zeros."""
    return importer.block_builder.emit(
        rows_call(importer.block_builder, partial(softmax, masked=True), scores, name="softmax")
    )


OPERATORS: Mapping[str, Translation] = {
    "addmm.default": _addmm,
    "amax.default": _extreme("max"),
    "amin.default": _extreme("min"),
    "any.default": _any,
    "bmm.default": _matmul,
    "cumprod.default": _scan("cumprod"),
    "cumsum.default": _scan("cumsum"),
    "linear.default": _linear,
    "matmul.default": _matmul,
    "min.dim": _min_dim,
    "mm.default": _matmul,
    "prod.dim_int": _prod,
    "scaled_dot_product_attention.default": _attention,
}
"""What to hand to TVM's importer, by operator overload."""

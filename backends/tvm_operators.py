"""Translations of core ATen operators that TVM's importer lacks or gets wrong, each exact.

    amax, amin      max, min over dimensions
    any             max over booleans as int8
    cumsum, cumprod in the dtype of the result: the importer's adds booleans as booleans, and its
                    negative axes are refused later on
    min.dim         values and the indices of the first minimum
    prod.dim_int    product over one dimension
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

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


OPERATORS: Mapping[str, Translation] = {
    "amax.default": _extreme("max"),
    "amin.default": _extreme("min"),
    "any.default": _any,
    "cumprod.default": _scan("cumprod"),
    "cumsum.default": _scan("cumsum"),
    "min.dim": _min_dim,
    "prod.dim_int": _prod,
}
"""What to hand to TVM's importer, by operator overload."""

"""Matrix products of int8 weights on integers, where both operands come off a grid.

    y[.., i, j] = sum_k (q[.., i, k] - z) s * W[k, j] t[j]
      -->
    y[.., i, j] = (sum_k q[.., i, k] W[k, j] - z sum_k W[k, j]) * (s t[j])

with q unsigned bytes (see `pruna_ir.backends.tvm_bytes`), W signed ones whose zero points are 0,
and one s and z for all of q. Four products and their sum are one instruction
(`pruna_ir.backends.tvm_dot`), and the integers are exact. W is packed once, at load, to panels
[columns / panel, K / 4, panel] of words of four bytes along k, filled up with zeros; its column
sums, and the products of scales, are computed then too. Schedules and tiles are those of
`pruna_ir.backends.tvm_products`.

Limits: processors with AVX-512 VNNI; K of at most 65,000, for which 32 bits hold every sum; K and
N constants. Products to which this does not apply compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_bytes import Grid, constants, quantised_source, quantize
from pruna_ir.backends.tvm_dot import INT8, dot, word
from pruna_ir.backends.tvm_products import (
    PACK,
    PRODUCT_ATTRIBUTES,
    Registers,
    Tile,
    choose_tile,
    constant_size,
    packed_by,
    register_tiles,
)

_DEEPEST = 65000
"""255 * 127 * K stays below 2^31."""


@dataclass(frozen=True)
class _Columns:
    """The integers of a right operand.

    Attributes:
        values: int8 [N, K] where transposed, else [K, N].
        scale: float32, [N] or [].
        transposed: which of the two.
    """

    values: Any
    scale: Any
    transposed: bool


# -- matching ------------------------------------------------------------------------------------


def integer_form(rewriter: Any, call: Any) -> Any:
    """The integer form of a ``relax.matmul``; None where there is none.

    Args:
        rewriter: see `pruna_ir.backends.tvm_narrow_products`.
        call: the product.
    """
    left, right = call.args
    rows = quantised_source(rewriter.bindings.get(left), rewriter.bindings)
    columns = _right(rewriter, right)
    if rows is None or columns is None or left.ty.ndim < 2:
        return None
    depth, count = constant_size(right.ty.shape[0]), constant_size(call.ty.shape[-1])
    if not (0 < depth <= _DEEPEST and count):
        return None
    tile = choose_tile(constant_size(call.ty.shape[-2]), count, -(-depth // INT8.depth),
                       Registers.of_target())  # fmt: skip
    return _emitted(rewriter, *rows, columns, count, tile)


def _name(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


def _right(rewriter: Any, value: Any) -> _Columns | None:
    """A dequantised weight, which may be transposed, with zero points of 0."""
    made = rewriter.bindings.get(value)
    transposed = _name(made) == "relax.permute_dims"
    if transposed:
        made = rewriter.bindings.get(made.args[0])
    if _name(made) != "relax.dequantize" or made.ty.ndim != 2:
        return None
    integers, scale, points = made.args
    array = rewriter.parameters.get(integers)
    if array is None or array.dtype != np.int8 or not _is_zero(rewriter, points):
        return None
    along_columns = scale.ty.ndim == 0 or int(made.attrs.axis) % 2 == (0 if transposed else 1)
    return _Columns(integers, scale, transposed) if along_columns else None


def _is_zero(rewriter: Any, points: Any) -> bool:
    values = rewriter.parameters.get(points)
    if values is None and hasattr(points, "value"):
        values = points.value.numpy()
    return values is not None and not values.any()


# -- what it becomes -----------------------------------------------------------------------------


def _emitted(
    rewriter: Any, source: Any, grid: Grid, columns: _Columns, count: int, tile: Tile
) -> Any:
    from tvm import relax

    builder = rewriter.builder_
    weight, scale = rewriter.visit_expr(columns.values), rewriter.visit_expr(columns.scale)
    zero = relax.const(grid.numbers[1])
    packed = builder.call_te(
        pack_words, weight, tile.panel, columns.transposed, primfunc_name_hint=PACK
    )
    sums = builder.call_te(
        column_sums, weight, zero, columns.transposed, primfunc_name_hint="column_sums"
    )
    # in a tensor: a number would become a part of the function
    scale = relax.op.multiply(scale, relax.const(grid.numbers[0].reshape(1)))
    if columns.scale.ty.ndim == 0:
        scale = relax.op.broadcast_to(builder.emit(scale), relax.ShapeExpr([count]))
    weights = [builder.emit(value) for value in (packed, sums, scale)]
    return builder.call_te(
        integer_product(count, tile), _bytes(rewriter, source, grid), *weights,
        primfunc_name_hint="matmul_int8", primfunc_attrs=PRODUCT_ATTRIBUTES,
    )  # fmt: skip


def _bytes(rewriter: Any, source: Any, grid: Grid) -> Any:
    """A tensor on its grid, computed once for all products that read it."""
    key = (source, grid)
    if key not in rewriter.bytes:
        made = rewriter.builder_.call_te(
            quantize, rewriter.visit_expr(source), *constants(grid.inverse),
            primfunc_name_hint="quantize",
        )  # fmt: skip
        rewriter.bytes[key] = rewriter.builder_.emit(made)
    return rewriter.bytes[key]


def pack_words(weight: Any, panel: int, transposed: bool) -> Any:
    """``P[j // panel, k // 4, j % panel]``: the words of W[k, j] along k, filled up with zeros.

    Args:
        weight: int8 [N, K] where transposed, else [K, N].
        panel: columns of a panel.
        transposed: see above.
    """
    return packed_by(weight, panel, transposed, INT8.depth, word)


def column_sums(weight: Any, zero: Any, transposed: bool) -> Any:
    """``z sum_k W[k, j]`` as int32 [N], of int8 [N, K] where transposed, else [K, N]."""
    from tvm import te

    axis = 0 if transposed else 1
    k = te.reduce_axis((0, weight.shape[1 - axis]), name="k")
    total = te.compute(
        (weight.shape[axis],),
        lambda j: te.sum((weight[j, k] if transposed else weight[k, j]).astype("int32"), axis=k),
        name="column_sums",
    )
    return te.compute(total.shape, lambda j: total[j] * zero(), name="column_shift")


def integer_product(columns: int, tile: Tile) -> Callable[[Any, Any, Any, Any], Any]:
    """The product with packed words, column sums to take away and a scale a column, in float32."""

    def matmul(q: Any, packed: Any, sums: Any, scale: Any) -> Any:
        def written(held: Any, *at: Any) -> Any:
            whole = held(*at) - sums[at[-1]]
            return whole.astype("float32") * scale[at[-1]]

        return register_tiles(
            q, packed, columns, tile, INT8.depth, lambda a, p: dot(INT8, a, p), written
        )

    return matmul


__all__: Sequence[str] = ("column_sums", "integer_form", "integer_product", "pack_words")

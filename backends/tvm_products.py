"""Matrix products on CPUs: packed panels, register tiles, epilogues in the write-back.

    C[.., i, j] = sum_k A[.., i, k] * B[.., k, j]

B is packed to panels P[j // p, k, j % p] of p columns, a few vector registers wide and filled up
with zeros: once, at load, where B is made from weights alone, and before the product elsewhere. A
tile of r rows by one panel is held in registers over all of k, so that every step of k reads one
row of the panel and r numbers of A. What follows the product (bias, activation, residual) is
computed as the tile is written out.

The tile is chosen by rule: the least estimated time over the rows and panels that it makes, with
two multiply-adds and two loads a cycle, among those that fit into the registers. Rows that do not
fill the last tile are zeros in a copy of A.

Limits: products are in float32; K and N must be constants; M and the batch may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from math import prod
from typing import Any

from pruna_ir.backends.tvm_loops import extent

PRODUCT = "packed_product"
PACK = "product_pack"
_PAD, _CROP = "product_rows", "product_crop"
_TILE = "pruna.tile"
COPIES = (PACK, _PAD)
PRODUCT_ATTRIBUTES = {"op_pattern": 4}
"""TVM's mark of a function that element-wise readers are fused into."""
_UNKNOWN_ROWS = 6
"""Rows of a tile where the number of rows is not known: wide panels, little waste on few rows."""
_PANEL_ELEMENTS = 768 * 256
"""Float32 values of a panel that stays in a second-level cache of one megabyte beside its rows."""
_LATENCY = 4.0
"""Cycles between a multiply-add and the next that reads its result."""


@dataclass(frozen=True)
class Registers:
    """The vector registers of a processor.

    Attributes:
        lanes: float32 values in one.
        count: how many there are.
    """

    lanes: int
    count: int

    @staticmethod
    def of_target() -> Registers:
        """Those of the current TVM target."""
        import tvm

        has = tvm.target.codegen.llvm_cpu_has_features
        if has("avx512f"):
            return Registers(16, 32)
        return Registers(8, 16) if has("avx") else Registers(4, 16)


@dataclass(frozen=True)
class Tile:
    """What is held in registers: ``rows`` by ``vectors`` registers of ``lanes`` columns."""

    rows: int
    vectors: int
    lanes: int

    @property
    def panel(self) -> int:
        """Columns of one panel."""
        return self.vectors * self.lanes


@dataclass(frozen=True)
class Product:
    """The sizes of a product; `rows` is 0 where their number is not known.

    Attributes:
        batch: how many products a right-hand side of its own has each; 1 for a matrix.
    """

    rows: int
    columns: int
    depth: int
    batch: int = 1
    dtype: str = "float32"


def rule(product: Product, registers: Registers) -> Tile:
    """The tile that the rule chooses."""
    return choose_tile(product.rows, product.columns, product.depth, registers)


def choose_tile(rows: int, columns: int, depth: int, registers: Registers) -> Tile:
    """The tile of the least estimated time for a product of ``rows`` by ``columns``.

    The arguments are those of `ranked_tiles`.
    """
    return ranked_tiles(rows, columns, depth, registers)[0]


def ranked_tiles(rows: int, columns: int, depth: int, registers: Registers) -> list[Tile]:
    """Every tile that fits, the one of the least estimated time first.

    Args:
        rows: the number of rows; 0 where it is not known.
        columns: the number of columns.
        depth: the number of products that are added up.
        registers: what the tile must fit into.
    """

    def cycles(tile: Tile) -> float:
        tiles = -(-rows // tile.rows) if rows else 1 / tile.rows
        work, loads = tile.rows * tile.vectors, tile.rows + tile.vectors
        return tiles * -(-columns // tile.panel) * max(work / 2, loads / 2, _LATENCY)

    def loads(tile: Tile) -> float:
        return (tile.rows + tile.vectors) / (tile.rows * tile.vectors)

    most = min(rows, 16) if rows else _UNKNOWN_ROWS
    wide = max(1, min(8, -(-columns // registers.lanes)))
    tiles = [
        Tile(r, v, registers.lanes)
        for r in range(most if not rows else 1, most + 1)
        for v in range(1, wide + 1)
        if r * v + v + 1 < registers.count
        and (v == 1 or v * registers.lanes * depth <= _PANEL_ELEMENTS)
    ]
    return sorted(tiles, key=lambda tile: (cycles(tile), loads(tile)))


# -- relax to tensor expressions -----------------------------------------------------------------


def legalize_matmul(
    builder: Any, call: Any, choose: Callable[[Product, Registers], Tile] = rule
) -> Any:
    """The packed form of a ``relax.matmul``, or TVM's own where it does not apply."""
    import tvm

    a, b = call.args
    if not _is_plain(a, b):
        return tvm.ir.Op.get("relax.matmul").get_attr("FLegalize")(builder, call)
    rows, columns = constant_size(a.ty.shape[-2]), constant_size(b.ty.shape[-1])
    batch = prod(constant_size(size) or 1 for size in list(b.ty.shape)[:-2])
    product = Product(rows, columns, int(a.ty.shape[-1]), batch)
    tile = choose(product, Registers.of_target())
    if b.ty.ndim == 2:
        packed = builder.emit(builder.call_te(pack, b, tile.panel, primfunc_name_hint=PACK))
        return builder.call_te(
            packed_product(columns, tile), a, packed, primfunc_name_hint="matmul_packed"
        )
    return builder.call_te(batched_product(tile), a, b, primfunc_name_hint="matmul_batched")


def constant_size(size: Any) -> int:
    """A size; 0 where it is symbolic."""
    from tvm import tirx

    return int(size) if isinstance(size, (int, tirx.IntImm)) else 0


def _is_plain(a: Any, b: Any) -> bool:
    kinds = {str(getattr(v.ty.dtype, "dtype", v.ty.dtype)) for v in (a, b)}
    if kinds != {"float32"} or a.ty.ndim < 2 or b.ty.ndim < 2:
        return False
    return all(constant_size(size) for size in (a.ty.shape[-1], b.ty.shape[-2], b.ty.shape[-1]))


def pack(b: Any, panel: int) -> Any:
    """``P[.., j // panel, k, j % panel] = B[.., k, j]``, filled up with zeros."""
    from tvm import te, tirx

    *batch, k, n = b.shape
    columns = int(n)

    def element(*indices: Any) -> Any:
        *leading, block, row, lane = indices
        column = block * panel + lane
        if columns % panel == 0:
            return b(*leading, row, column)
        zero = tirx.const(0, b.dtype)
        return tirx.if_then_else(column < columns, b(*leading, row, column), zero)

    return te.compute((*batch, -(-columns // panel), k, panel), element, name=PACK)


def packed_product(columns: int, tile: Tile) -> Callable[[Any, Any], Any]:
    """The product with a packed matrix [panels, K, panel]."""

    def matmul(a: Any, packed: Any) -> Any:
        def right(_: Sequence[Any], k: Any, j: Any) -> Any:
            return packed[j // tile.panel, k, j % tile.panel]

        return _product(a, list(a.shape)[:-2], right, columns, tile)

    return matmul


def batched_product(tile: Tile) -> Callable[[Any, Any], Any]:
    """The product of matrices with batch dimensions, which broadcast."""

    def matmul(a: Any, b: Any) -> Any:
        packed = pack(b, tile.panel)
        batch = _broadcast(list(a.shape)[:-2], list(b.shape)[:-2])

        def right(leading: Sequence[Any], k: Any, j: Any) -> Any:
            own = _own(leading, list(b.shape)[:-2])
            return packed(*own, j // tile.panel, k, j % tile.panel)

        return _product(a, batch, right, int(b.shape[-1]), tile)

    return matmul


def packed_by(
    weight: Any,
    panel: int,
    transposed: bool,
    depth: int,
    word: Callable[[Sequence[Any]], Any],
) -> Any:
    """``P[j // panel, k // depth, j % panel]``: ``depth`` values along k as one word each.

    Args:
        weight: [N, K] where transposed, else [K, N]; filled up with zeros.
        panel: columns of a panel.
        transposed: see above.
        depth: values in a word.
        word: makes one of its values.
    """
    from tvm import te, tirx

    sizes = [int(size) for size in weight.shape]
    columns, rows = sizes if transposed else sizes[::-1]
    zero = tirx.const(0, weight.dtype)

    def value(row: Any, column: Any) -> Any:
        at = (column, row) if transposed else (row, column)
        inside = tirx.all(row < rows, column < columns)
        if rows % depth == 0 and columns % panel == 0:
            return weight(*at)
        return tirx.if_then_else(inside, weight(*at), zero)

    def element(block: Any, step: Any, lane: Any) -> Any:
        column = block * panel + lane
        return word([value(step * depth + place, column) for place in range(depth)])

    return te.compute((-(-columns // panel), -(-rows // depth), panel), element, name=PACK)


def _broadcast(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    length = max(len(a), len(b))
    left, right = [1] * (length - len(a)) + list(a), [1] * (length - len(b)) + list(b)
    return [y if constant_size(x) == 1 else x for x, y in zip(left, right, strict=True)]


def _own(leading: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    """The batch indices of one operand."""
    given = leading[len(leading) - len(sizes) :]
    return [0 if constant_size(size) == 1 else i for i, size in zip(given, sizes, strict=True)]


def _product(
    a: Any, batch: Sequence[Any], right: Callable[..., Any], columns: int, tile: Tile
) -> Any:
    from tvm import te, tirx

    *own_batch, m, depth = a.shape
    known = constant_size(m)
    # TVM can prove that m // r + 1 tiles cover a symbolic m, but not that its ceiling does.
    rows = -(-known // tile.rows) * tile.rows if known else (m // tile.rows + 1) * tile.rows
    wide = -(-columns // tile.panel) * tile.panel
    source = a
    if not known or rows != known:

        def padded(*indices: Any) -> Any:
            *_, i, _k = indices
            return tirx.if_then_else(i < m, a(*indices), tirx.const(0, a.dtype))

        source = te.compute((*own_batch, rows, depth), padded, name=_PAD)
    k = te.reduce_axis((0, depth), name="k")

    def element(*indices: Any) -> Any:
        *leading, i, j = indices
        left = source(*_own(leading, own_batch), i, k)
        return te.sum(left * right(leading, k, j), axis=k)

    held = te.compute(
        (*batch, rows, wide), element, name=PRODUCT, attrs={_TILE: astuple(tile)}
    )
    return te.compute((*batch, m, columns), lambda *at: held(*at), name=_CROP)


def register_tiles(
    a: Any,
    packed: Any,
    columns: int,
    tile: Tile,
    depth: int,
    products: Callable[[Any, Any], Any],
    written: Callable[..., Any],
) -> Any:
    """A product with packed words, each of ``depth`` values along k.

    Rows behind the last one, which fill its tile, repeat it.

    Args:
        a: [.., M, K]; a copy that is filled up with zeros, where ``depth`` does not divide K.
        packed: [panels, K / depth, panel].
        columns: how many there are.
        tile: what is held in registers.
        depth: values in a word.
        products: the sum of the products of a word's values with those of ``a`` from some on.
        written: what is written out, from the sums and the indices.
    """
    from tvm import te, tirx

    *batch, m, inner = a.shape
    known, steps = constant_size(m), int(packed.shape[1])
    rows = -(-known // tile.rows) * tile.rows if known else (m // tile.rows + 1) * tile.rows
    source = a
    if int(inner) % depth:

        def padded(*at: Any) -> Any:
            return tirx.if_then_else(at[-1] < inner, a(*at), tirx.const(0, a.dtype))

        source = te.compute((*batch, m, steps * depth), padded, name=_PAD)
    k = te.reduce_axis((0, steps), name="k")

    def element(*at: Any) -> Any:
        *leading, i, j = at
        row = i if known and rows == known else tirx.min(i, m - 1)
        values = source(*leading, row, k * depth)
        return te.sum(products(values, packed[j // tile.panel, k, j % tile.panel]), axis=k)

    wide = -(-columns // tile.panel) * tile.panel
    held = te.compute((*batch, rows, wide), element, name=PRODUCT, attrs={_TILE: astuple(tile)})
    return te.compute((*batch, m, columns), lambda *at: written(held, *at), name=_CROP)


# -- schedule ------------------------------------------------------------------------------------


def schedule_product(schedule: Any, block: Any) -> set[str]:
    """Tile a product, and compute its only reader, if there is one, as a tile is written out.

    Returns:
        the name of the reader, where it is no block of its own any more.
    """
    rows, vectors, lanes = (int(v) for v in schedule.get(block).annotations[_TILE])
    readers = schedule.get_consumers(block)
    *batch, i, j, k = schedule.get_loops(block)
    outer, wide, inner = schedule.split(j, [None, vectors, lanes])
    tiles, row = schedule.split(i, [None, rows])
    schedule.reorder(*batch, outer, tiles, k, row, wide, inner)
    held = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(held, tiles)
    merged = {schedule.get(reader).name_hint for reader in readers}
    if len(readers) != 1 or not _write_back(schedule, readers[0]):
        merged = set()
    schedule.parallel(schedule.fuse(*batch, outer, tiles))
    for loop in (row, wide):
        schedule.unroll(loop)
    schedule.vectorize(inner)
    first = schedule.get_loops(schedule.decompose_reduction(block, k))
    schedule.unroll(first[-3])
    schedule.unroll(first[-2])
    schedule.vectorize(first[-1])
    written = schedule.get_loops(held)
    schedule.vectorize(schedule.split(written[-1], [None, lanes])[-1])
    return merged


def _write_back(schedule: Any, reader: Any) -> bool:
    """Fold the reader into the copy out of the registers, where each element is read once."""
    from tvm import s_tir

    try:
        schedule.reverse_compute_inline(reader)
    except s_tir.ScheduleError:
        return False
    return True


def schedule_matmul(schedule: Any, block: Any) -> None:
    """A product that is not packed: rows in parallel, along the columns."""
    *batch, i, j, k = schedule.get_loops(block)
    schedule.reorder(*batch, i, k, j)
    schedule.parallel(schedule.fuse(*batch, i) if batch else i)
    schedule.decompose_reduction(block, k)


def schedule_copy(schedule: Any, block: Any) -> None:
    """Parallel and vectorised: a padded copy or a packed one."""
    *outer, last = schedule.get_loops(block)
    size = extent(schedule, last)
    schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
    if size > 1:
        lanes = next(v for v in (16, 8, 4, 2, 1) if size % v == 0)
        if lanes > 1:
            schedule.vectorize(schedule.split(last, [None, lanes])[-1])


__all__: Sequence[str] = (
    "COPIES", "PACK", "PRODUCT", "PRODUCT_ATTRIBUTES", "Product", "Registers", "Tile",
    "batched_product", "choose_tile", "constant_size", "legalize_matmul", "pack", "packed_by",
    "packed_product", "ranked_tiles", "register_tiles", "rule", "schedule_copy",
    "schedule_matmul", "schedule_product",
)  # fmt: skip

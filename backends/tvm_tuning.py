"""Tuning: which of the tiles that fit is the fastest here, by measuring each.

For each distinct convolution and product of a network, those with the most work first, the rule's
best candidates are compiled alone and timed in interleaved rounds. Operands rotate through copies
that together exceed the second-level caches, since the rest of a network drives them from there
too. Another tile than the rule's is taken only where it is faster by more than `MARGIN`; what the
budget does not reach keeps the rule's.

Limits: operators in float32 alone, each without its epilogue and, where the batch or the number of
rows is dynamic, for one; the threads are those of TVM's pool while tuning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from pruna_ir.backends import tvm_convolutions, tvm_products
from pruna_ir.backends.tvm_convolutions import Place
from pruna_ir.backends.tvm_loops import LANES
from pruna_ir.backends.tvm_processors import absent_features
from pruna_ir.backends.tvm_runtime import processor_features
from pruna_ir.backends.tvm_schedules import schedule_function
from pruna_ir.backends.tvm_tiles import Operator, Record, Tile, Tiles, described
from pruna_ir.errors import UsageError

MARGIN = 1.03
"""How much faster than the rule's a tile must be; less is noise."""
CANDIDATES = 6
"""How many tiles of the rule's ranking are measured."""
_ROUNDS = 30
_FEWEST = 5
_SHARE = 0.4
"""Of an operator's seconds, those that go into timing; compiling takes the rest."""
_ROTATED = 8 << 20
"""Bytes of operands to rotate through: several second-level caches of a core."""
_MOST_COPIES = 64


@dataclass(frozen=True)
class Kernel:
    """A compiled candidate.

    Attributes:
        run: takes operands and the result.
        shapes: of the operands and the result, in order.
    """

    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def tune(
    tiles: Tiles,
    target: Any,
    seconds: float,
    progress: Callable[[str, int, int], None],
    candidates: int = CANDIDATES,
) -> list[Record]:
    """Measure the tiles of what a build asked for.

    Args:
        tiles: what was asked for; what it has a record of is not measured again.
        target: what to compile for.
        seconds: after which no further operator is begun; the first one always is.
        progress: told what is measured, how many are done and how many there are.
        candidates: how many tiles of each to measure.

    Raises:
        UsageError: this machine cannot run the target's code.
    """
    _check_runs_here(target)
    start = time.perf_counter()
    order = sorted(_to_measure(tiles), key=lambda o: -_work(o) * tiles.calls[o])
    records: list[Record] = []
    for done, operator in enumerate(order):
        progress("tvm: tune", done, len(order))
        left = seconds - (time.perf_counter() - start)
        if records and left <= 0:
            break
        tried = tiles.candidates[operator][:candidates]
        kernels = [_kernel(operator, tile, target) for tile in tried]
        budget = _SHARE * max(left, 0.0) / (len(order) - done)
        records.append(_record(operator, tried, _measure(kernels, budget)))
    progress("tvm: tune", len(order), len(order))
    return records


def _to_measure(tiles: Tiles) -> list[Operator]:
    """The operators in float32 for which there is a choice and no record."""
    return [
        operator
        for operator in tiles.unmeasured()
        if operator.dtype == "float32" and len(tiles.candidates[operator]) > 1
    ]


def _check_runs_here(target: Any) -> None:
    if hidden := absent_features(target, processor_features()):
        raise UsageError(
            f"tuning measures on this machine, which cannot run code for {target}: it lacks "
            f"{', '.join(name[1:] for name in hidden)}; tune on such a machine and give its "
            "records"
        )


def _work(operator: Operator) -> int:
    """Multiplications of one call."""
    if isinstance(operator, tvm_products.Product):
        rows = max(operator.rows, 1)
        return rows * operator.columns * operator.depth * operator.batch
    constants = operator.convolution
    pixels = constants.size(0, operator.height) * constants.size(1, operator.width)
    each = constants.inputs // constants.groups * prod(constants.kernel)
    return pixels * constants.outputs * each


def _kernel(operator: Operator, tile: Tile, target: Any) -> Kernel:
    import tvm
    from tvm import te

    with target:
        if isinstance(operator, Place):
            assert isinstance(tile, tvm_convolutions.Tile)
            operands, result = _convolution(operator, tile)
        else:
            assert isinstance(tile, tvm_products.Tile)
            operands, result = _product(operator, tile)
        function, _ = schedule_function(te.create_prim_func([*operands, result]))
        compiled = tvm.compile(tvm.IRModule({"main": function}), target=target)
    shapes = tuple(tuple(int(v) for v in t.shape) for t in (*operands, result))
    return Kernel(compiled["main"], shapes)


def _convolution(place: Place, tile: tvm_convolutions.Tile) -> tuple[list[Any], Any]:
    """Data and packed weights of a convolution, and its result."""
    from tvm import te

    c, size = place.convolution, (place.height, place.width)
    plain = (1, c.inputs, *size)
    blocked = (1, -(-c.inputs // LANES), *size, LANES)
    data = te.placeholder(blocked if place.blocked else plain, name="data")
    weight = te.placeholder((c.outputs, c.inputs // c.groups, *c.kernel), name="weight")
    packed = te.placeholder(tvm_convolutions.pack(c, weight).shape, name="packed")
    return [data, packed], tvm_convolutions.convolve(c, 0, lambda *_: tile)(data, packed)


def _product(
    product: tvm_products.Product, tile: tvm_products.Tile
) -> tuple[list[Any], Any]:
    """The operands of a product, the right one packed where it is a matrix, and its result."""
    from tvm import te

    rows, n, k = max(product.rows, 1), product.columns, product.depth
    if product.batch == 1:
        a = te.placeholder((rows, k), name="a")
        packed = te.placeholder((-(-n // tile.panel), k, tile.panel), name="packed")
        return [a, packed], tvm_products.packed_product(n, tile)(a, packed)
    a = te.placeholder((product.batch, rows, k), name="a")
    b = te.placeholder((product.batch, k, n), name="b")
    return [a, b], tvm_products.batched_product(tile)(a, b)


def _measure(kernels: Sequence[Kernel], seconds: float) -> list[list[float]]:
    """Milliseconds of every kernel in interleaved rounds."""
    rotated = [_operands(kernel.shapes) for kernel in kernels]
    times: list[list[float]] = [[] for _ in kernels]
    start = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        if turn > _FEWEST and time.perf_counter() - start > seconds:
            break
        for kernel, copies, taken in zip(kernels, rotated, times, strict=True):
            operands = copies[turn % len(copies)]
            before = time.perf_counter()
            kernel.run(*operands)
            taken.append((time.perf_counter() - before) * 1e3)
    return [taken[1:] for taken in times]


def _operands(shapes: Sequence[tuple[int, ...]]) -> list[list[Any]]:
    """Random operands and room for results, as many times as fill the caches."""
    import tvm

    generator = np.random.default_rng(0)
    size = 4 * sum(prod(shape) for shape in shapes)
    arrays = [generator.standard_normal(shape, np.float32) for shape in shapes]
    copies = max(1, min(_MOST_COPIES, -(-_ROTATED // size)))
    return [[tvm.runtime.tensor(array) for array in arrays] for _ in range(copies)]


def _record(operator: Operator, tried: Sequence[Tile], times: Sequence[list[float]]) -> Record:
    """The fastest tile, where it is clearly faster than the rule's, which is the first."""
    medians = [statistics.median(taken) for taken in times]

    def gain(taken: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(times[0], taken, strict=True))

    best = min(range(len(tried)), key=medians.__getitem__)
    chosen = tried[best] if gain(times[best]) > MARGIN else tried[0]
    return Record(
        operator=described(operator),
        tile=asdict(chosen),
        rule=asdict(tried[0]),
        medians=[
            {"tile": asdict(tile), "milliseconds": round(median, 6)}
            for tile, median in zip(tried, medians, strict=True)
        ],
    )


__all__: Sequence[str] = ("CANDIDATES", "MARGIN", "Kernel", "tune")

"""Softmax and normalisation over the last dimension on CPUs, a row at a time.

    softmax     y = exp(x - max x) / sum exp(x - max x)
    layer norm  y = (x - m) / sqrt(v + eps) gamma + beta,  m = mean x,  v = mean (x - m)^2

A sum (or maximum) over a row is taken in vector lanes, lane l over x[l], x[l + 16], .., which are
then added as a tree together with the elements that fill no vector; LLVM may not reorder a
floating-point sum itself. All steps of a row are computed before the next row, rows in parallel.

Limits: float32; one constant last dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pruna_ir.backends.tvm_loops import LANES

ROWS = "row_result"
_PART = "row_lanes"
_FUSIBLE = 4
"""TVM's mark of a function that element-wise readers are fused into."""


# -- tensor expressions --------------------------------------------------------------------------


def softmax(x: Any, *, masked: bool = False) -> Any:
    """Softmax over the last dimension.

    Args:
        x: float32 [.., n], n constant.
        masked: a row of -inf alone gives zeros, as in attention, and not NaN.
    """
    from tvm import te, tirx

    n = int(x.shape[-1])
    largest = _over_rows(x, n, te.max, _larger)

    def power(*at: Any) -> Any:
        highest = largest(*at[:-1])
        if masked:
            none = highest == tirx.const(float("-inf"), x.dtype)
            highest = tirx.Select(none, tirx.const(0, x.dtype), highest)
        return tirx.exp(x(*at) - highest)

    powers = te.compute(x.shape, power, name="row_powers")
    total = _over_rows(powers, n, te.sum, _sum)

    def share(*at: Any) -> Any:
        whole = total(*at[:-1])
        if masked:
            zero = tirx.const(0, x.dtype)
            whole = tirx.Select(whole == zero, tirx.const(1, x.dtype), whole)
        return powers(*at) / whole

    return te.compute(x.shape, share, name=ROWS)


def layer_norm(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    """Layer normalisation over the last dimension; ``gamma`` and ``beta`` are [n]."""
    from tvm import te, tirx

    n = int(x.shape[-1])
    size, small = tirx.const(n, x.dtype), tirx.const(epsilon, x.dtype)
    total = _over_rows(x, n, te.sum, _sum)
    mean = te.compute(x.shape[:-1], lambda *at: total(*at) / size, name="row_mean")

    def square(*at: Any) -> Any:
        deviation = x(*at) - mean(*at[:-1])
        return deviation * deviation

    squares = _over_rows(square, n, te.sum, _sum, rows=x.shape[:-1])
    scale = te.compute(
        x.shape[:-1],
        lambda *at: tirx.const(1, x.dtype) / tirx.sqrt(squares(*at) / size + small),
        name="row_scale",
    )
    return te.compute(
        x.shape,
        lambda *at: (x(*at) - mean(*at[:-1])) * scale(*at[:-1]) * gamma(at[-1]) + beta(at[-1]),
        name=ROWS,
    )


def _sum(a: Any, b: Any) -> Any:
    return a + b


def _larger(a: Any, b: Any) -> Any:
    from tvm import tirx

    return tirx.max(a, b)


def _over_rows(
    x: Callable[..., Any],
    n: int,
    reduce: Callable[..., Any],
    combine: Callable[[Any, Any], Any],
    rows: Sequence[Any] = (),
) -> Any:
    """The reduction of every row [.., n] of an element-wise function: [..]."""
    from tvm import te

    rows = rows or x.shape[:-1]  # type: ignore[attr-defined]
    whole = n // LANES
    lanes = None
    if whole:
        step = te.reduce_axis((0, whole), name="step")
        lanes = te.compute(
            (*rows, LANES),
            lambda *at: reduce(x(*at[:-1], step * LANES + at[-1]), axis=step),
            name=_PART,
        )

    def total(*at: Any) -> Any:
        parts = [lanes(*at, lane) for lane in range(LANES)] if lanes is not None else []
        return _tree([*parts, *(x(*at, i) for i in range(whole * LANES, n))], combine)

    return te.compute(rows, total, name="row_total")


def _tree(values: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    while len(values) > 1:
        half = len(values) // 2
        pairs = [combine(values[i], values[i + half]) for i in range(half)]
        values = [*pairs, *values[2 * half :]]
    return values[0]


# -- relax ---------------------------------------------------------------------------------------


def legalize_softmax(builder: Any, call: Any) -> Any:
    """Rows for a softmax over the last dimension, TVM's own steps elsewhere."""
    import tvm

    x = call.args[0]
    axis = int(call.attrs.axis) % x.ty.ndim
    if not _has_rows(x) or axis != x.ty.ndim - 1:
        return tvm.ir.Op.get("relax.nn.softmax").get_attr("FLegalize")(builder, call)
    return rows_call(builder, softmax, x, name="softmax")


def legalize_layer_norm(builder: Any, call: Any) -> Any:
    """Rows for a layer norm over the last dimension, TVM's own steps elsewhere."""
    import tvm

    x, gamma, beta = call.args
    axes = [int(axis) % x.ty.ndim for axis in call.attrs.axes]
    affine = bool(call.attrs.center) and bool(call.attrs.scale)
    if not _has_rows(x) or axes != [x.ty.ndim - 1] or not affine:
        return tvm.ir.Op.get("relax.nn.layer_norm").get_attr("FLegalize")(builder, call)
    norm = partial(layer_norm, epsilon=float(call.attrs.epsilon))
    return rows_call(builder, norm, x, gamma, beta, name="layer_norm")


def rows_call(builder: Any, function: Callable[..., Any], *operands: Any, name: str) -> Any:
    """A call of a tensor expression on rows, which takes in element-wise readers alone."""
    return builder.call_te(
        function, *operands, primfunc_name_hint=name, primfunc_attrs={"op_pattern": _FUSIBLE}
    )


def _has_rows(x: Any) -> bool:
    from tvm import tirx

    dtype = str(getattr(x.ty.dtype, "dtype", x.ty.dtype))
    return (
        dtype == "float32" and x.ty.ndim >= 2 and isinstance(x.ty.shape[-1], (int, tirx.IntImm))
    )


# -- schedule ------------------------------------------------------------------------------------


def schedule_rows(schedule: Any, block: Any) -> None:
    """Compute every step before ``block`` within its loop over rows, and what follows with it."""
    for reader in schedule.get_consumers(block):
        schedule.reverse_compute_inline(reader)
    *outer, _ = schedule.get_loops(block)
    row = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
    root = schedule.get_sblock("root")
    steps = [
        step
        for step in reversed(schedule.get_child_blocks(root))
        if schedule.get(step).name_hint != ROWS
    ]
    for step in steps:
        schedule.compute_at(step, row, preserve_unit_loops=True)
    schedule.parallel(row)
    for step in steps:
        if schedule.get(step).name_hint.startswith(_PART):
            *_, lane, reduced = schedule.get_loops(step)
            schedule.reorder(reduced, lane)
            schedule.vectorize(lane)
            first = schedule.decompose_reduction(step, reduced)
            schedule.vectorize(schedule.get_loops(first)[-1])


__all__: Sequence[str] = (
    "ROWS", "layer_norm", "legalize_layer_norm", "legalize_softmax", "rows_call", "schedule_rows",
    "softmax",
)  # fmt: skip

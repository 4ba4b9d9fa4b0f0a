"""Plain CPU schedules, so that a TVM artifact is bearable: packed convolutions, tiled products.

TVM's own lowering leaves loops as they are written, which runs one multiplication at a time. Three
rules cover what matters:

    conv2d    weights are packed to [O/16, I, kh, kw, 16] (once, at load); a register tile holds
              up to 14 output columns of 16 channels, over all of I, kh and kw:
              acc[x, o] += data[n, i, y*s + kh*d, (x0 + x)*s + kw*d] * packed[O, i, kh, kw, o]
    matmul    C[.., i, j] = sum_k A[.., i, k] * B[.., k, j]: a panel of up to 64 columns at a time,
              so that B's panel stays in the cache while i runs
    the rest  element-wise steps inlined into each other, outer loops parallel

A function to which a rule does not apply keeps TVM's loops; the build names it.

Limits: grouped convolutions and other layouts keep TVM's loops; products are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

LANES = 16
"""Output channels in one vector register: 16 float32 of AVX-512, two registers of AVX2."""
_TILE = 14
_PANELS = (64, 48, 32, 16, 8)
_ACCUMULATE, _UNPACK, _PACK = "conv2d_packed", "conv2d_unpack", "conv2d_pack"
_REDUCTION = 2


# -- convolution ---------------------------------------------------------------------------------


def legalize_conv2d(builder: Any, call: Any) -> Any:
    """The packed form of a ``relax.nn.conv2d``, or TVM's own where it does not apply."""
    import tvm

    if not _is_plain(call):
        return tvm.ir.Op.get("relax.nn.conv2d").get_attr("FLegalize")(builder, call)
    data, weight = call.args
    packed = builder.emit(builder.call_te(_pack, weight, primfunc_name_hint=_PACK))
    return builder.call_te(
        _packed_conv2d(call.attrs, int(weight.ty.shape[0])),
        data,
        packed,
        primfunc_name_hint="conv2d",
    )


def _is_plain(call: Any) -> bool:
    from tvm import tirx

    attributes, (data, weight) = call.attrs, call.args
    layouts = (attributes.data_layout, attributes.kernel_layout, str(attributes.out_layout))
    sizes = [*list(data.ty.shape)[1:], *weight.ty.shape]
    return (
        int(attributes.groups) == 1
        and layouts in (("NCHW", "OIHW", "NCHW"), ("NCHW", "OIHW", ""))
        and all(isinstance(size, (int, tirx.IntImm)) for size in sizes)
    )


def _pack(weight: Any) -> Any:
    from tvm import te, tirx

    o, i, kh, kw = (int(size) for size in weight.shape)

    def element(block: Any, c: Any, y: Any, x: Any, lane: Any) -> Any:
        channel = block * LANES + lane
        if o % LANES == 0:
            return weight[channel, c, y, x]
        zero = tirx.const(0, weight.dtype)
        return tirx.if_then_else(channel < o, weight[channel, c, y, x], zero)

    return te.compute((-(-o // LANES), i, kh, kw, LANES), element, name=_PACK)


def _tile(width: int) -> int:
    """The tile of output columns that wastes the fewest, the largest of these."""
    return min(range(min(width, _TILE), 0, -1), key=lambda t: (-(-width // t) * t, -t))


def _packed_conv2d(attributes: Any, channels: int) -> Callable[[Any, Any], Any]:
    from tvm import te, tirx

    stride_y, stride_x = (int(v) for v in attributes.strides)
    top, left, bottom, right = (int(v) for v in attributes.padding)
    dilation_y, dilation_x = (int(v) for v in attributes.dilation)

    def conv2d(data: Any, packed: Any) -> Any:
        n, inputs = data.shape[0], int(data.shape[1])
        height, width = (int(v) for v in list(data.shape)[2:])
        blocks, _, kh, kw, _ = (int(v) for v in packed.shape)
        out_y = (height + top + bottom - (kh - 1) * dilation_y - 1) // stride_y + 1
        out_x = (width + left + right - (kw - 1) * dilation_x - 1) // stride_x + 1
        columns = -(-out_x // _tile(out_x)) * _tile(out_x)
        rows_read = max(height + top + bottom, (out_y - 1) * stride_y + (kh - 1) * dilation_y + 1)
        columns_read = (columns - 1) * stride_x + (kw - 1) * dilation_x + 1
        columns_read = max(columns_read, width + left + right)

        def padded(b: Any, c: Any, y: Any, x: Any) -> Any:
            inside = tirx.all(y >= top, y < height + top, x >= left, x < width + left)
            return tirx.if_then_else(
                inside, data[b, c, y - top, x - left], tirx.const(0, data.dtype)
            )

        source = te.compute((n, inputs, rows_read, columns_read), padded, name="pad")
        c = te.reduce_axis((0, inputs), name="c")
        ky, kx = te.reduce_axis((0, kh), name="ky"), te.reduce_axis((0, kw), name="kx")
        accumulated = te.compute(
            (n, blocks, out_y, columns, LANES),
            lambda b, o, y, x, lane: te.sum(
                source[b, c, y * stride_y + ky * dilation_y, x * stride_x + kx * dilation_x]
                * packed[o, c, ky, kx, lane],
                axis=[c, ky, kx],
            ),
            name=_ACCUMULATE,
        )
        return te.compute(
            (n, channels, out_y, out_x),
            lambda b, o, y, x: accumulated[b, o // LANES, y, x, o % LANES],
            name=_UNPACK,
        )

    return conv2d


def _schedule_conv2d(schedule: Any, block: Any) -> None:
    n, o, y, x, lane, c, ky, kx = schedule.get_loops(block)
    tile = _tile(_extent(schedule, x))
    outer, inner = schedule.split(x, [None, tile])
    schedule.reorder(n, o, y, outer, c, ky, kx, inner, lane)
    held = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(held, outer)
    schedule.parallel(schedule.fuse(n, o, y))
    _vectorize(schedule, block)
    schedule.vectorize(schedule.get_loops(held)[-1])
    _vectorize(schedule, schedule.decompose_reduction(block, c))


def _vectorize(schedule: Any, block: Any) -> None:
    """Vectorise the innermost loop and unroll the next.

    A reduction is treated so before it is decomposed: its update alone can not be.
    """
    schedule.unroll(schedule.get_loops(block)[-2])
    schedule.vectorize(schedule.get_loops(block)[-1])


# -- products ------------------------------------------------------------------------------------


def _schedule_matmul(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    *batch, i, j, k = loops
    width = _extent(schedule, j)
    panel = next((p for p in _PANELS if width and width % p == 0), 0)
    lanes = min(LANES, panel)
    if not panel:
        schedule.reorder(*batch, i, k, j)
        schedule.parallel(schedule.fuse(*batch, i) if batch else i)
        schedule.decompose_reduction(block, k)
        return
    outer, wide, inner = schedule.split(j, [None, panel // lanes, lanes])
    schedule.reorder(*batch, outer, i, k, wide, inner)
    held = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(held, i)
    if _extent(schedule, outer) == 1 and not batch:
        schedule.parallel(i)
    else:
        schedule.parallel(schedule.fuse(*batch, outer) if batch else outer)
    _vectorize(schedule, block)
    copied = schedule.split(schedule.get_loops(held)[-1], [None, lanes])
    schedule.vectorize(copied[-1])
    _vectorize(schedule, schedule.decompose_reduction(block, k))


# -- everything else -----------------------------------------------------------------------------


def _extent(schedule: Any, loop: Any) -> int:
    """A loop's constant extent; 0 where it is symbolic."""
    from tvm import tirx

    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else 0


def _is_reduction(schedule: Any, block: Any) -> bool:
    return any(int(v.iter_type) == _REDUCTION for v in schedule.get(block).iter_vars)


def _inline(schedule: Any, root: Any) -> None:
    """Inline element-wise steps into element-wise readers, up to the last one."""
    for block in schedule.get_child_blocks(root):
        readers = schedule.get_consumers(block)
        if not readers or _is_reduction(schedule, block):
            continue
        if not any(_is_reduction(schedule, reader) for reader in readers):
            schedule.compute_inline(block)


def _schedule_loops(schedule: Any, block: Any) -> None:
    """Run the leading loops in parallel; the innermost is LLVM's to vectorise."""
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if len(kinds) != len(loops) or not loops:
        return
    leading = next((i for i, kind in enumerate(kinds) if kind == _REDUCTION), len(kinds))
    keep = 1 if leading == len(kinds) else 0
    outer = loops[: max(leading - keep, 0)][:3]
    if outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


def _schedule_function(function: Any) -> Any:
    import tvm
    from tvm import s_tir

    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    root = schedule.get_sblock("root")
    _inline(schedule, root)
    for block in schedule.get_child_blocks(root):
        name = schedule.get(block).name_hint
        if name == _ACCUMULATE:
            _schedule_conv2d(schedule, block)
        elif name == "matmul" and len(schedule.get_loops(block)) >= 3:
            _schedule_matmul(schedule, block)
        else:
            _schedule_loops(schedule, block)
    return schedule.mod["main"]


def schedule_module(module: Any) -> tuple[Any, list[str]]:
    """The module with its loops scheduled, and the functions that keep TVM's loops.

    Args:
        module: a ``tvm.IRModule`` after fusion.
    """
    import tvm
    from tvm import s_tir, tirx

    scheduled: dict[Any, Any] = {}
    kept: list[str] = []
    for name, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        try:
            scheduled[name] = _schedule_function(function)
        except s_tir.ScheduleError:
            kept.append(name.name_hint)
    result = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for name, function in scheduled.items():
        result.update_func(name, function)
    return result, sorted(kept)


__all__: Sequence[str] = ("LANES", "legalize_conv2d", "schedule_module")

"""CPU schedules of convolutions.

Weights are packed to [O/16, I, kh, kw, 16] (once, at load); a register tile holds up to 14 output
columns of 16 channels, over all of I, kh and kw:

    acc[x, o] += data[n, i, y*s + kh*d, (x0 + x)*s + kw*d] * packed[O, i, kh, kw, o]

Limits: grouped convolutions and other layouts keep TVM's loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruna_ir.backends.tvm_loops import LANES, extent, vectorize

_TILE = 14
ACCUMULATE = "conv2d_packed"
_UNPACK, _PACK = "conv2d_unpack", "conv2d_pack"


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
            name=ACCUMULATE,
        )
        return te.compute(
            (n, channels, out_y, out_x),
            lambda b, o, y, x: accumulated[b, o // LANES, y, x, o % LANES],
            name=_UNPACK,
        )

    return conv2d


def schedule_conv2d(schedule: Any, block: Any) -> None:
    """Hold a tile of output columns in registers over the whole reduction."""
    n, o, y, x, lane, c, ky, kx = schedule.get_loops(block)
    tile = _tile(extent(schedule, x))
    outer, inner = schedule.split(x, [None, tile])
    schedule.reorder(n, o, y, outer, c, ky, kx, inner, lane)
    held = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(held, outer)
    schedule.parallel(schedule.fuse(n, o, y))
    vectorize(schedule, block)
    schedule.vectorize(schedule.get_loops(held)[-1])
    vectorize(schedule, schedule.decompose_reduction(block, c))

"""Blocked tensors: a Relax function whose convolutions run on [n, C/16, H, W, 16].

Every convolution of constant height, width and channels takes and gives blocked tensors; what lies
between (element-wise operators, poolings, means over height and width, concatenations of whole
blocks) is computed on them too:

    relu(conv2d(x) + b)  ->  unblock(relu(conv2d_blocked(block(x), pack(W)) + block(b)))

so that ``block`` and ``unblock`` remain at the ends of a network alone. The lanes behind the last
channel hold anything: nothing that is kept reads them.

A ``conv1d`` is a convolution of height one. Where the processor multiplies bytes, a convolution
whose operands are quantised reads bytes, which are blocked too, and one whose operands are rounded
to bfloat16 reads halves of floats: see `tvm_narrow_convolutions`.

Limits: a convolution on tensors of unknown height or width stays as it is; data of fewer than 16
channels is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pruna_ir.backends import tvm_bytes
from pruna_ir.backends.tvm_bfloat16 import rounded_source
from pruna_ir.backends.tvm_convolutions import (
    ATTRIBUTES,
    Convolution,
    Place,
    Tile,
    accumulators,
    convolve,
    rule,
)
from pruna_ir.backends.tvm_dot import BFLOAT16, INT8
from pruna_ir.backends.tvm_layouts import (
    Blocked,
    Halves,
    Quantised,
    as_blocked,
    as_bytes,
    is_blocked,
    is_quantised,
    unblocked,
)
from pruna_ir.backends.tvm_loops import LANES
from pruna_ir.backends.tvm_narrow_convolutions import narrow_convolution, packed
from pruna_ir.backends.tvm_rewriter import rewrite_main

_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "abs", "add", "astype", "ceil", "clip", "divide", "erf", "exp", "floor", "log",
        "maximum", "minimum", "multiply", "negative", "nn.gelu", "nn.gelu_tanh",
        "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.silu", "nn.softplus", "power", "round",
        "rsqrt", "sigmoid", "sqrt", "square", "subtract", "tanh",
    )
)
_POOLS: Mapping[str, str] = {"relax.nn.max_pool2d": "max", "relax.nn.avg_pool2d": "avg"}
_LAYOUT = f"NCHW{LANES}c"
_PLAIN = (("NCHW", "OIHW", "NCHW"), ("NCHW", "OIHW", ""))


def block_convolutions(
    module: Any,
    features: Callable[[str], bool],
    parameters: Mapping[str, np.ndarray[Any, Any]],
    choose: Callable[[Place, int], Tile] = rule,
) -> Any:
    """The module with its convolutions on blocked tensors.

    Args:
        module: a ``tvm.IRModule`` whose ``main`` is one dataflow block over Relax operators.
        features: whether the processor has an instruction set, by LLVM's name.
        parameters: the values of the last arguments of ``main``, in order.
        choose: the register tile of a convolution.
    """
    dots = frozenset(kind for kind in (INT8, BFLOAT16) if kind.is_covered(features))
    vectors = accumulators(features)
    state: dict[str, Any] = {"vectors": vectors, "dots": dots, "choose": choose}
    return rewrite_main(
        module, parameters, _replacement, state | {"blocked": {}, "quantised": {}, "bytes": {}}
    )


def _replacement(rewriter: Any, binding: Any) -> Any:
    """A value computed blocked, on bytes or as a product, as a plain tensor; None for others."""
    plain = _flat_convolution(rewriter, binding.value)
    if plain is None:
        plain = _on_bytes(rewriter, binding)
    made = None if plain is not None else _blocked_form(rewriter, binding.value)
    if made is None:
        return plain
    blocked = Blocked(rewriter.builder_.emit(made.value), made.channels)
    rewriter.blocked[binding.var] = blocked
    return unblocked(rewriter.builder_, blocked, binding.value.ty)


def _on_bytes(rewriter: Any, binding: Any) -> Any:
    """Note what a quantiser gives; a max pool of that, computed on bytes, as a plain tensor."""
    value, builder = binding.value, rewriter.builder_
    sizes = _sizes(value)
    if sizes is None:
        return None
    if (source := rounded_source(value, rewriter.bindings)) is not None:
        rewriter.quantised[binding.var] = Quantised(Halves(), source)
    if INT8 not in rewriter.dots:
        return None
    if found := tvm_bytes.quantised_source(value, rewriter.bindings):
        rewriter.quantised[binding.var] = Quantised(found[1], found[0])
    if getattr(getattr(value, "op", None), "name", "") != "relax.nn.max_pool2d":
        return None
    data = value.args[0]
    if not is_quantised(rewriter, data) or value.attrs.layout != "NCHW":
        return None
    if isinstance(rewriter.quantised[data].grid, Halves):
        return None
    pooled = builder.call_te(
        _pooling(value.attrs, "max"), as_bytes(rewriter, data), primfunc_name_hint="max_pool2d"
    )
    rewriter.quantised[binding.var] = Quantised(rewriter.quantised[data].grid)
    rewriter.bytes[binding.var] = Blocked(builder.emit(pooled), sizes[0])
    real = Blocked(as_blocked(rewriter, binding.var), sizes[0])
    return unblocked(builder, real, value.ty)


# -- operators -----------------------------------------------------------------------------------


def _blocked_form(rewriter: Any, call: Any) -> Blocked | None:
    """The call that computes a value blocked; None where it is to be computed as it is."""
    from tvm import relax

    name = getattr(getattr(call, "op", None), "name", "")
    if not isinstance(call, relax.Call) or _sizes(call) is None:
        return None
    if name == "relax.nn.conv2d":
        return _convolution(rewriter, call)
    if name in _ELEMENTWISE:
        return _elementwise(rewriter, call)
    if name in _POOLS:
        return _pool(rewriter, call, _POOLS[name])
    if name == "relax.concat":
        return _concatenation(rewriter, call)
    return _mean(rewriter, call) if name == "relax.mean" else None


def _sizes(value: Any) -> list[int] | None:
    """Channels, height and width of a tensor of rank 4; None where one is not constant."""
    from tvm import relax, tirx

    ty = value.ty
    if not isinstance(ty, relax.TensorType) or ty.ndim != 4 or ty.shape is None:
        return None
    sizes = list(ty.shape)[1:]
    if not all(isinstance(size, (int, tirx.IntImm)) for size in sizes):
        return None
    return [int(size) for size in sizes]


def _convolution(rewriter: Any, call: Any) -> Blocked | None:
    attributes, (data, weight) = call.attrs, call.args
    layouts = (attributes.data_layout, attributes.kernel_layout, str(attributes.out_layout))
    sizes, window = _sizes(data), _sizes(weight)
    if layouts not in _PLAIN or sizes is None or window is None:
        return None
    constants = Convolution(
        inputs=sizes[0],
        outputs=int(weight.ty.shape[0]),
        groups=int(attributes.groups),
        kernel=(window[1], window[2]),
        strides=_pair(attributes.strides),
        dilation=_pair(attributes.dilation),
        padding=tuple(int(v) for v in attributes.padding),  # type: ignore[arg-type]  # four
    )
    made = narrow_convolution(rewriter, constants, data, weight)
    if made is not None:
        return Blocked(made, constants.outputs)
    narrow = constants.inputs < LANES and not constants.is_depthwise
    plain = narrow and data not in rewriter.blocked
    source = rewriter.visit_expr(data) if plain else as_blocked(rewriter, data)
    builder = rewriter.builder_
    held = packed(builder, constants, rewriter.visit_expr(weight))
    made = builder.call_te(
        convolve(constants, rewriter.vectors, rewriter.choose),
        source,
        held,
        primfunc_name_hint="conv2d_depthwise" if constants.is_depthwise else "conv2d",
        primfunc_attrs=ATTRIBUTES,
    )
    return Blocked(made, constants.outputs)


def _flat_convolution(rewriter: Any, call: Any) -> Any:
    """A ``conv1d`` of constant sizes as a convolution of height one; None where it is no such."""
    from tvm import relax

    if getattr(getattr(call, "op", None), "name", "") != "relax.nn.conv1d":
        return None
    attributes, builder = call.attrs, rewriter.builder_
    if (attributes.data_layout, attributes.kernel_layout) != ("NCW", "OIW"):
        return None
    data, weight = (
        builder.emit(relax.op.expand_dims(rewriter.visit_expr(operand), 2))
        for operand in call.args
    )
    left, right = (int(v) for v in attributes.padding)
    flat = builder.normalize(
        relax.op.nn.conv2d(
            data, weight, (1, int(attributes.strides[0])), (0, left, 0, right),
            (1, int(attributes.dilation[0])), int(attributes.groups),
        )
    )  # fmt: skip
    made = _convolution(rewriter, flat) if _sizes(flat) is not None else None
    if made is None:
        return None
    blocked = Blocked(builder.emit(made.value), made.channels)
    return relax.op.squeeze(builder.emit(unblocked(builder, blocked, flat.ty)), [2])


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(v) for v in values)
    return first, second


def _elementwise(rewriter: Any, call: Any) -> Blocked | None:
    """An element-wise operator, one of whose operands is blocked already."""
    from tvm import relax

    tensors = [a for a in call.args if isinstance(a.ty, relax.TensorType) and a.ty.ndim > 0]
    if not any(is_blocked(rewriter, a) for a in tensors):
        return None
    sizes = _sizes(call)
    assert sizes is not None
    forms = [_operand(rewriter, a, sizes) if a in tensors else a for a in call.args]
    if any(form is None for form in forms):
        return None
    return Blocked(relax.Call(call.op, forms, call.attrs), sizes[0])


def _operand(rewriter: Any, value: Any, result: list[int]) -> Any:
    """An operand that broadcasts to a blocked result, blocked; None where it can not be."""
    from tvm import relax

    if value.ty.shape is None or not 3 <= value.ty.ndim <= 4:
        return None
    if value.ty.ndim == 3:
        shape = relax.ShapeExpr([1, *value.ty.shape])
        value = rewriter.builder_.emit(relax.op.reshape(rewriter.visit_expr(value), shape))
    sizes = _sizes(value)
    if sizes is None or sizes[0] != result[0]:
        return None
    return as_blocked(rewriter, value)


def _pool(rewriter: Any, call: Any, kind: str) -> Blocked | None:
    data, attributes = call.args[0], call.attrs
    if not is_blocked(rewriter, data) or attributes.layout != "NCHW":
        return None
    source = as_blocked(rewriter, data)
    made = rewriter.builder_.call_te(
        _pooling(attributes, kind), source, primfunc_name_hint=f"{kind}_pool2d"
    )
    return Blocked(made, int(data.ty.shape[1]))


def _pooling(attributes: Any, kind: str) -> Callable[[Any], Any]:
    from tvm import topi

    def pool(x: Any) -> Any:
        return topi.nn.pool2d(
            x,
            kernel=attributes.pool_size,
            stride=attributes.strides,
            dilation=attributes.dilation,
            padding=attributes.padding,
            pool_type=kind,
            ceil_mode=attributes.ceil_mode,
            layout=_LAYOUT,
            count_include_pad=bool(getattr(attributes, "count_include_pad", True)),
        )

    return pool


def _mean(rewriter: Any, call: Any) -> Blocked | None:
    from tvm import relax

    data, attributes = call.args[0], call.attrs
    axes = attributes.axis
    if not is_blocked(rewriter, data) or axes is None or not attributes.keepdims:
        return None
    if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return None
    source = as_blocked(rewriter, data)
    return Blocked(relax.op.mean(source, [2, 3], keepdims=True), int(data.ty.shape[1]))


def _concatenation(rewriter: Any, call: Any) -> Blocked | None:
    from tvm import relax

    parts = call.args[0]
    if not isinstance(parts, relax.Tuple) or int(call.attrs.axis) % 4 != 1:
        return None
    channels = [int(part.ty.shape[1]) for part in parts.fields]
    blocked = all(is_blocked(rewriter, part) for part in parts.fields)
    if not blocked or any(count % LANES for count in channels):
        return None
    joined = relax.op.concat([as_blocked(rewriter, part) for part in parts.fields], 1)
    return Blocked(joined, sum(channels))

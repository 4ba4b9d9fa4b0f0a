"""Convolutions of narrow operands: bytes, or upper halves of float32 numbers, and weights alike.

    conv2d(dequantize(quantize(x)), dequantize(W8))   int8, see `tvm_bytes`
    conv2d(widen(narrow(x)), widen(W16))              bfloat16, see `tvm_bfloat16`

Both are kept blocked to [n, C/16, H, W, 16], written where the layer before computes them, and
read sixteen sums at a time by the instructions of `tvm_dot`; fewer than 16 plain channels are read
as words of as many as an instruction takes. Padding is made of what stands for 0.

Sums of bfloat16: VDPBF16PS adds two exact products in two steps, each of which rounds to float32,
half to even; it takes denormal numbers for zeros and gives zeros for them.

Limits: depthwise convolutions of bfloat16 read halves and multiply float32, and so do (with
operands rounded to bfloat16) those of an odd number of blocked channels and of one dimension: what
lies behind the last channel may be no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pruna_ir.backends import tvm_bytes
from pruna_ir.backends.tvm_bfloat16 import narrow_words, narrowed_source
from pruna_ir.backends.tvm_bytes import Grid, Weight
from pruna_ir.backends.tvm_convolutions import ATTRIBUTES, Convolution, convolve, pack
from pruna_ir.backends.tvm_dot import BFLOAT16, INT8
from pruna_ir.backends.tvm_layouts import Halves, as_bytes, is_quantised
from pruna_ir.backends.tvm_loops import LANES


def narrow_convolution(rewriter: Any, constants: Convolution, data: Any, weight: Any) -> Any:
    """A convolution on what is kept of its operands; None where they are none such.

    Args:
        rewriter: that of `tvm_blocked`.
        constants: of the convolution.
        data: float32[n, C, H, W].
        weight: float32[O, C/groups, kh, kw].
    """
    held = rewriter.quantised.get(data)
    if held is None:
        return None
    made = _bfloat16_convolution if isinstance(held.grid, Halves) else _integer_convolution
    return made(rewriter, constants, data, weight)


def packed(builder: Any, constants: Convolution, weight: Any) -> Any:
    """Packed weights; computed at load."""

    def packed_weight(weight: Any) -> Any:
        return pack(constants, weight)

    made = builder.call_te(packed_weight, weight, primfunc_name_hint="conv2d_pack")
    return builder.emit(made)


def _is_narrow(rewriter: Any, constants: Convolution, data: Any) -> bool:
    """Whether data is read as words: it has few channels, and is not blocked."""
    few = constants.inputs < LANES and not constants.is_depthwise
    return few and not is_quantised(rewriter, data)


def _bfloat16_convolution(
    rewriter: Any, constants: Convolution, data: Any, weight: Any
) -> Any:
    """A convolution of upper halves; None where it is to be one of float32 numbers."""
    halves = narrowed_source(rewriter.bindings.get(weight))
    if halves not in rewriter.parameters:
        return None
    if constants.is_depthwise:
        source, held = as_bytes(rewriter, data), rewriter.visit_expr(weight)
        return _call(rewriter, constants, source, held, "conv2d_depthwise")
    constants = replace(constants, quad=BFLOAT16.depth)
    few = _is_narrow(rewriter, constants, data)
    filled = constants.depth > constants.inputs // constants.groups * constants.merged
    if BFLOAT16 not in rewriter.dots or (filled and not few):
        return None
    if few:
        source = rewriter.visit_expr(rewriter.quantised[data].source)
        source = rewriter.builder_.emit(
            rewriter.builder_.call_te(narrow_words, source, primfunc_name_hint="bfloat16_words")
        )
    else:
        source = as_bytes(rewriter, data)
    return _call(rewriter, constants, source, rewriter.visit_expr(halves), "conv2d_bfloat16")


def _call(
    rewriter: Any, constants: Convolution, data: Any, weight: Any, name: str, zero: int = 0
) -> Any:
    """The call that computes the sums."""
    return rewriter.builder_.call_te(
        convolve(constants, rewriter.vectors, rewriter.choose, zero),
        data,
        packed(rewriter.builder_, constants, weight),
        primfunc_name_hint=name,
        primfunc_attrs=ATTRIBUTES,
    )


def _integer_convolution(
    rewriter: Any, constants: Convolution, data: Any, weight: Any
) -> Any:
    """A convolution of bytes with int8 weights; None where the weight is not quantised."""
    integers = tvm_bytes.quantised_weight(weight, rewriter.bindings, rewriter.parameters)
    if integers is None or not tvm_bytes.is_exact(constants):
        return None
    builder, held = rewriter.builder_, rewriter.quantised[data]
    constants = replace(constants, quad=INT8.depth)
    if few := _is_narrow(rewriter, constants, data):
        operands = rewriter.visit_expr(held.source), *tvm_bytes.constants(held.grid.inverse)
        source = builder.emit(
            builder.call_te(tvm_bytes.quantize_words, *operands, primfunc_name_hint="quantize")
        )
    else:
        source = as_bytes(rewriter, data)
    name = "conv2d_depthwise_int8" if constants.is_depthwise else "conv2d_int8"
    zero = held.grid.word if few else held.grid.zero
    stored = rewriter.visit_expr(integers.integers)
    sums = builder.emit(_call(rewriter, constants, source, stored, name, zero))
    return builder.call_te(
        tvm_bytes.rescale, sums, *_factors(rewriter, constants, held.grid, integers)
    )


def _factors(rewriter: Any, constants: Convolution, grid: Grid, weight: Weight) -> list[Any]:
    """What is added to sums and what they are multiplied with; computed at load."""
    from tvm import relax

    builder = rewriter.builder_
    scale = rewriter.visit_expr(weight.scale)
    if scale.ty.ndim == 0:
        scale = builder.emit(relax.op.full((constants.outputs,), scale))
    stored = rewriter.visit_expr(weight.integers)
    number, zero = tvm_bytes.constants(grid.numbers)
    made = (
        builder.call_te(tvm_bytes.offsets(constants), stored, zero),
        builder.call_te(tvm_bytes.multipliers(constants), scale, number),
    )
    return [builder.emit(value) for value in made]


__all__: Sequence[str] = ("narrow_convolution", "packed")

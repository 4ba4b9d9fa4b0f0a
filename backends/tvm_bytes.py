"""Bytes between convolutions: quantised tensors of a Relax function and what is computed on them.

A tensor of 8-bit integers with one scale s and one zero point z is held as unsigned bytes, blocked
to [n, C/16, H, W, 16] or, where it has fewer than 16 channels, as words of four channels,
[n, C/4, H, W]; signed integers are held with 128 added to them and to z.

    quantize(x)     byte = rint(min(max(x / s, 0 - z), 255 - z)) + z
    dequantize      (byte - z) * s
    convolution     sums[o] = sum of byte * weight[o]    exact, see `tvm_dot`
                    (sums[o] - z * sum of weight[o]) * (s * s_weight[o])

Padding is made of z, so that what z contributes does not depend on the place. x / s is computed as
x * (1 / s), which differs from the quotient by rounding where s is no power of two. Functions read
s and z from tensors, so that layers of equal sizes are compiled once; those have no dimension, as
TVM fuses no function behind a product that reads other elements than the one that it writes.

Limits: one scale and zero point for a whole tensor of data; weights with a zero point of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruna_ir.backends.tvm_convolutions import Convolution
from pruna_ir.backends.tvm_loops import LANES

_ROUND = 12582912.0
"""1.5 * 2^23: a float added to it is rounded to an integer, half to even, in its low bits."""
_ROUND_BITS = 0x4B400000
_SIGNED = 128
_WORD = 4
_SUMS = 2**31
_LARGEST = 255 * 128


@dataclass(frozen=True)
class Grid:
    """What bytes stand for: ``(byte - zero) * scale``."""

    scale: float
    zero: int

    @property
    def word(self) -> int:
        """Four bytes that stand for 0, as an int32."""
        return int(np.array([self.zero] * _WORD, np.uint8).view(np.int32)[0])

    @property
    def numbers(self) -> tuple[Any, Any]:
        """Scale and zero as arrays float32[] and int32[], which `dequantize` reads."""
        return np.array(self.scale, np.float32), np.array(self.zero, np.int32)

    @property
    def inverse(self) -> tuple[Any, Any]:
        """1 / scale and zero as arrays float32[] and int32[], which `quantize` reads."""
        scale, zero = self.numbers
        return np.array(np.float32(1) / scale, np.float32), zero


@dataclass(frozen=True)
class Weight:
    """The integers of a weight, int8[O, I/groups, kh, kw], and their scale, [] or [O]."""

    integers: Any
    scale: Any


def quantised_source(call: Any, bindings: Mapping[Any, Any]) -> tuple[Any, Grid] | None:
    """What ``dequantize(quantize(x, s, z), s, z)`` reads, and its grid; None for other calls.

    Args:
        call: an expression.
        bindings: the expressions that variables are bound to.
    """
    if _name(call) != "relax.dequantize":
        return None
    made: Any = bindings.get(call.args[0])
    if _name(made) != "relax.quantize":
        return None
    scales, zeros = zip(*(map(_scalar, c.args[1:]) for c in (call, made)), strict=True)
    if None in (*scales, *zeros) or scales[0] != scales[1] or zeros[0] != zeros[1]:
        return None
    signed = str(made.attrs.out_dtype) == "int8"
    if not signed and str(made.attrs.out_dtype) != "uint8":
        return None
    return made.args[0], Grid(scales[0], int(zeros[0]) + _SIGNED * signed)


def quantised_weight(
    value: Any, bindings: Mapping[Any, Any], parameters: Mapping[Any, np.ndarray[Any, Any]]
) -> Weight | None:
    """The integers behind ``dequantize(W8, s, 0)``; None where a weight is no such.

    Args:
        value: the weight of a convolution.
        bindings: the expressions that variables are bound to.
        parameters: the values of the arguments of ``main`` that are weights.
    """
    call: Any = bindings.get(value)
    if _name(call) != "relax.dequantize":
        return None
    integers, scale, zeros = call.args
    if integers not in parameters or parameters[integers].dtype != np.int8:
        return None
    held = parameters.get(zeros)
    point = _scalar(zeros) if held is None else np.abs(held.astype(int)).max()
    if point != 0 or (scale.ty.ndim == 1 and int(call.attrs.axis) != 0):
        return None
    return Weight(integers, scale)


def _name(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


def _scalar(value: Any) -> float | None:
    """The value of a constant of rank 0; None for other expressions."""
    if value.ty.ndim or not hasattr(value, "value"):
        return None
    return float(value.value.numpy())


# -- computations --------------------------------------------------------------------------------


def constants(numbers: Sequence[Any]) -> list[Any]:
    """Arrays as Relax constants."""
    from tvm import relax

    return [relax.const(number) for number in numbers]


def _integer(x: Any, inverse: Any, zero: Any) -> Any:
    """The byte of a float, as an int32."""
    from tvm import tirx

    low = tirx.const(0.0, "float32") - zero().astype("float32")
    high = tirx.const(255.0, "float32") - zero().astype("float32")
    x = tirx.min(tirx.max(x * inverse(), low), high)
    bits = tirx.reinterpret("int32", x + tirx.const(_ROUND, "float32"))
    return bits - (tirx.const(_ROUND_BITS, "int32") - zero())


def quantize(x: Any, inverse: Any, zero: Any) -> Any:
    """float32 to bytes, of any shape; the others as `Grid.inverse` has them."""
    from tvm import te

    return te.compute(
        x.shape, lambda *at: _integer(x[at], inverse, zero).astype("uint8"), name="quantize"
    )


def quantize_words(x: Any, inverse: Any, zero: Any) -> Any:
    """float32[n, C, H, W] to int32[n, C/4, H, W]; zeros fill up the last word."""
    from tvm import te, tirx

    n, channels, height, width = x.shape

    def byte(at: tuple[Any, ...], place: int) -> Any:
        channel = at[1] * _WORD + place
        value = _integer(x[at[0], channel, at[2], at[3]], inverse, zero)
        return tirx.if_then_else(channel < channels, value, tirx.const(0, "int32"))

    def word(*at: Any) -> Any:
        made = byte(at, 0)
        for place in range(1, _WORD):
            made = made | (byte(at, place) << tirx.const(8 * place, "int32"))
        return made

    return te.compute((n, -(-int(channels) // _WORD), height, width), word, name="words")


def dequantize(q: Any, scale: Any, zero: Any) -> Any:
    """Bytes to float32, of any shape; the others as `Grid.numbers` has them."""
    from tvm import te

    def element(*at: Any) -> Any:
        return (q[at].astype("int32") - zero()).astype("float32") * scale()

    return te.compute(q.shape, element, name="dequantize")


def is_exact(convolution: Convolution) -> bool:
    """Whether 32 bits hold every sum of a convolution."""
    height, width = convolution.kernel
    return convolution.inputs // convolution.groups * height * width * _LARGEST < _SUMS


def offsets(convolution: Convolution) -> Callable[[Any, Any], Any]:
    """What z adds to the sums, negated: int32[O/16, 16], of weights int8[O, I/groups, kh, kw]."""
    from tvm import te, tirx

    def compute(weight: Any, zero: Any) -> Any:
        axes = [te.reduce_axis((0, int(size)), "r") for size in weight.shape[1:]]

        def total(block: Any, lane: Any) -> Any:
            channel = tirx.min(block * LANES + lane, convolution.outputs - 1)
            return te.sum(weight[(channel, *axes)].astype("int32"), axis=axes)

        sums = te.compute((convolution.blocks, LANES), total, name="weight_sums")
        none = tirx.const(0, "int32")
        return te.compute(sums.shape, lambda *at: sums[at] * (none - zero()), name="offsets")

    return compute


def multipliers(convolution: Convolution) -> Callable[[Any, Any], Any]:
    """The scales of the sums, float32[O/16, 16], of those of the weights, [] or [O]."""
    from tvm import te, tirx

    def compute(scales: Any, scale: Any) -> Any:
        def element(block: Any, lane: Any) -> Any:
            channel = tirx.min(block * LANES + lane, convolution.outputs - 1)
            return scales[channel] * scale()

        return te.compute((convolution.blocks, LANES), element, name="multipliers")

    return compute


def rescale(sums: Any, offset: Any, multiplier: Any) -> Any:
    """Sums of products, int32[n, O/16, H, W, 16], as the float32 numbers that they stand for."""
    from tvm import te

    def element(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        whole = sums[n, o, y, x, lane] + offset[o, lane]
        return whole.astype("float32") * multiplier[o, lane]

    return te.compute(sums.shape, element, name="rescale")

"""Layouts: how a rewriter of Relax functions holds a tensor [n, C, H, W].

    blocked    [n, C/16, H, W, 16], of the tensor's own type
    bytes      blocked too, of a tensor on a grid, see `tvm_bytes`; or the upper halves of one
               that is rounded to bfloat16, see `tvm_bfloat16`

A rewriter has what the functions here look up and note: a ``builder_``, the dictionaries
``blocked`` and ``bytes`` of `Blocked` tensors and ``quantised`` of `Quantised` ones, by the
variable of the function that is rewritten. What one needs is made when it is asked for, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruna_ir.backends import tvm_bfloat16, tvm_bytes
from pruna_ir.backends.tvm_bytes import Grid, constants
from pruna_ir.backends.tvm_loops import LANES


@dataclass(frozen=True)
class Blocked:
    """A blocked tensor and how many of its channels mean something."""

    value: Any
    channels: int


@dataclass(frozen=True)
class Halves:
    """The grid of bfloat16."""


@dataclass(frozen=True)
class Quantised:
    """A tensor on a grid, and the tensor that was quantised, where its bytes are to be made."""

    grid: Grid | Halves
    source: Any = None


def unblocked(builder: Any, blocked: Blocked, like: Any) -> Any:
    """The call that computes a plain tensor [n, C, H, W], of the type ``like``."""
    from tvm import te

    n, _, height, width = like.shape

    def unblock(x: Any) -> Any:
        return te.compute(
            (n, blocked.channels, height, width),
            lambda n, c, y, x_: x[n, c // LANES, y, x_, c % LANES],
            name="unblock",
        )

    return builder.call_te(unblock, blocked.value, primfunc_name_hint="unblock")


def _block(builder: Any, value: Any) -> Any:
    from tvm import te, tirx

    def block(x: Any) -> Any:
        n, channels, height, width = x.shape

        def element(n: Any, c: Any, y: Any, x_: Any, lane: Any) -> Any:
            channel = c * LANES + lane
            if int(channels) % LANES == 0:
                return x[n, channel, y, x_]
            zero = tirx.const(0, x.dtype)
            return tirx.if_then_else(channel < channels, x[n, channel, y, x_], zero)

        shape = (n, -(-int(channels) // LANES), height, width, LANES)
        return te.compute(shape, element, name="block")

    return builder.emit(builder.call_te(block, value, primfunc_name_hint="block"))


def as_blocked(rewriter: Any, value: Any) -> Any:
    """A tensor [n, C, H, W] as a blocked one.

    One on a grid is computed from its bytes for each reader, which it is fused into.
    """
    if is_quantised(rewriter, value):
        grid = rewriter.quantised[value].grid
        expand, name, operands = _expansion(grid)
        made = rewriter.builder_.call_te(
            expand, as_bytes(rewriter, value), *operands, primfunc_name_hint=name
        )
        return rewriter.builder_.emit(made)
    if value in rewriter.blocked:
        return rewriter.blocked[value].value
    made = _block(rewriter.builder_, rewriter.visit_expr(value))
    rewriter.blocked[value] = Blocked(made, int(value.ty.shape[1]))
    return made


def _expansion(grid: Grid | Halves) -> tuple[Callable[..., Any], str, list[Any]]:
    """What computes numbers from what is kept of them, its name, and what else it reads."""
    if isinstance(grid, Halves):
        return tvm_bfloat16.widen, tvm_bfloat16.WIDEN, []
    return tvm_bytes.dequantize, "dequantize", constants(grid.numbers)


def _reduction(grid: Grid | Halves) -> tuple[Callable[..., Any], str, list[Any]]:
    """What computes what is kept of numbers on a grid, its name, and what else it reads."""
    if isinstance(grid, Halves):
        return tvm_bfloat16.narrow, tvm_bfloat16.NARROW, []
    return tvm_bytes.quantize, "quantize", constants(grid.inverse)


def is_quantised(rewriter: Any, value: Any) -> bool:
    """Whether a tensor's bytes are blocked, or can be made of a blocked tensor."""
    held = rewriter.quantised.get(value)
    return value in rewriter.bytes or (held is not None and held.source in rewriter.blocked)


def is_blocked(rewriter: Any, value: Any) -> bool:
    """Whether a tensor is held blocked, or as blocked bytes."""
    return value in rewriter.blocked or is_quantised(rewriter, value)


def as_bytes(rewriter: Any, value: Any) -> Any:
    """The blocked bytes of a quantised tensor."""
    if value not in rewriter.bytes:
        held = rewriter.quantised[value]
        source = as_blocked(rewriter, held.source)
        reduce, name, operands = _reduction(held.grid)
        made = rewriter.builder_.call_te(reduce, source, *operands, primfunc_name_hint=name)
        made = rewriter.builder_.emit(made)
        rewriter.bytes[value] = Blocked(made, int(value.ty.shape[1]))
    return rewriter.bytes[value].value

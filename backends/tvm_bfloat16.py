"""bfloat16 in TVM: products and convolutions of it, and float32 between them.

A program that computes in bfloat16 is lowered with float32 in its place, but for the operands of
its matrix products and convolutions, which are rounded to it. They are held as the upper halves of
float32 numbers, uint16, rounded to nearest, half to even:

    y = linear(x, W, b)  -->  y = linear(widen(narrow(x)), widen(narrow(W)), b)
    narrow(x) = (bits(x) + 0x7fff + bit 16 of x) >> 16        NaN stays NaN
    widen(u)  = u << 16

What is narrowed once is widened for nothing where a processor multiplies bfloat16 itself: two
products and their sum in float32 are one instruction of AVX512-BF16 (`pruna_ir.backends.tvm_dot`).
Every other operator rounds to float32, and so less often than the program does. What a convolution
reads is rounded for its other readers too, as in the program, so that its halves are all that is
kept.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2C, VDPBF16PS: it
rounds half to even, and takes denormal numbers for zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.backends.tvm_dot import BFLOAT16, dot, widened, word
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
from pruna_ir.call import bind_arguments
from pruna_ir.decompose import decompose
from pruna_ir.program import Program
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten
NARROW, WIDEN = "bfloat16_narrow", "bfloat16_widen"
"""How the functions are called that convert from and to float32."""
_HALF = 16
_CONVOLUTIONS: Mapping[Any, tuple[str, str]] = dict.fromkeys(
    (
        aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
        aten.conv3d.default, aten.conv3d.padding,
    ),
    ("input", "weight"),
)  # fmt: skip
_OPERANDS: Mapping[Any, tuple[str, str]] = {
    **_CONVOLUTIONS,
    aten.linear.default: ("input", "weight"),
    aten.matmul.default: ("self", "other"),
    aten.addmm.default: ("mat1", "mat2"),
    aten.bmm.default: ("self", "mat2"),
}
_CONVERSIONS = (torch.bfloat16, torch.float32)


# -- programs ------------------------------------------------------------------------------------


def multiplies_bfloat16(program: Program) -> bool:
    """Whether a matrix product or convolution of a program is in bfloat16."""
    if not _computes_bfloat16(program):
        return False
    return any(_dtype(node) is torch.bfloat16 for node in decompose(program).calls(*_OPERANDS))


def _computes_bfloat16(program: Program) -> bool:
    return any(_dtype(node) is torch.bfloat16 for node in program.calls())


def with_float32(program: Program) -> Program:
    """The program in float32, the operands of its products in bfloat16 rounded to it."""
    if not _computes_bfloat16(program):
        return program
    rw = Rewrite(decompose(program), "tvm-import", Context())
    products = [n for n in rw.calls(*_OPERANDS) if _dtype(n) is torch.bfloat16]
    for name, tensor in rw.program.tensors().items():
        if tensor.dtype is torch.bfloat16:
            rw.set_tensor(name, tensor.detach().float())
    for node in list(rw.program.calls()):
        _widen_arguments(rw, node)
    rounded: dict[fx.Node, fx.Node] = {}
    for node in products:
        bound = bind_arguments(node)
        for source in [bound[name] for name in _OPERANDS[node.target]]:
            if source not in rounded:
                made = _rounded(rw, source, node)
                rounded |= {source: made, made: made}
            rw.redirect(node, {source: rounded[source]})
    return rw.finish()


def _dtype(node: Any) -> Any:
    return getattr(node.meta.get("val"), "dtype", None)


def _widen_arguments(rw: Rewrite, node: fx.Node) -> None:
    """Drop conversions between the two types, and ask for float32 in place of bfloat16."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    bound = bind_arguments(node)
    if node.target is aten.to.dtype and {bound["dtype"], _dtype(bound["self"])} <= set(
        _CONVERSIONS
    ):
        rw.replace(node, bound["self"])
        return
    asked = {key: torch.float32 for key, value in bound.items() if value is torch.bfloat16}
    if asked:
        rw.update(node, **asked)


def _rounded(rw: Rewrite, source: fx.Node, reader: fx.Node) -> fx.Node:
    """A node rounded: for one reader; for all of them where that is a convolution."""
    shared = reader.target in _CONVOLUTIONS and source.op == "call_function"
    others = [user for user in source.users if user.op != "output"] if shared else []
    at = source.next if shared else reader
    low = rw.insert(aten.to.dtype, before=at, like=source, self=source, dtype=torch.bfloat16)
    wide = rw.insert(aten.to.dtype, before=at, like=source, self=low, dtype=torch.float32)
    for other in others:
        rw.redirect(other, {source: wide})
    return wide


# -- relax ---------------------------------------------------------------------------------------


def conversion(
    constants: Mapping[str, np.ndarray[Any, Any]],
) -> Callable[[fx.Node, Any], Any]:
    """A translator of ``_to_copy``: to and from bfloat16 with functions of ours.

    Args:
        constants: the tensors behind placeholders, which are stored narrowed.
    """

    def translate(node: fx.Node, importer: Any) -> Any:
        from tvm import relax

        bound = bind_arguments(node)
        source, dtype, builder = bound["self"], bound["dtype"], importer.block_builder
        if dtype is torch.float32 and _dtype(source) is torch.bfloat16:
            held = importer.env[source]
            return builder.emit(builder.call_te(widen, held, primfunc_name_hint=WIDEN))
        if dtype is not torch.bfloat16 or _dtype(source) is not torch.float32:
            return importer._to_copy(node)
        if source.name in constants:
            tensor = torch.from_numpy(constants[source.name]).to(torch.bfloat16)
            return relax.const(tensor.view(torch.int16).numpy().view(np.uint16))
        held = importer.env[source]
        return builder.emit(builder.call_te(narrow, held, primfunc_name_hint=NARROW))

    return translate


def narrow(x: Any) -> Any:
    """The upper halves of float32 numbers, rounded half to even; NaN stays NaN."""
    from tvm import te

    return te.compute(x.shape, lambda *at: _narrowed(x(*at)), name="narrow")


def _narrowed(value: Any) -> Any:
    from tvm import tirx

    def whole(value: int) -> Any:
        return tirx.const(value, "uint32")

    bits = tirx.reinterpret("uint32", value)
    odd = (bits >> whole(_HALF)) & whole(1)
    nearest = (bits + whole(0x7FFF) + odd) >> whole(_HALF)
    # a NaN may carry its marks in the lower half alone, or round up to infinity
    quiet = (bits >> whole(_HALF)) | whole(0x40)
    magnitude = bits & whole(0x7FFFFFFF)
    return tirx.Select(magnitude > whole(0x7F800000), quiet, nearest).astype("uint16")


def narrow_words(x: Any) -> Any:
    """float32[n, C, H, W] to int32[n, C/2, H, W], pairs of channels; a zero fills up the last."""
    from tvm import te, tirx

    n, channels, height, width = x.shape

    def element(n: Any, c: Any, y: Any, x_: Any) -> Any:
        second = 2 * c + 1
        inside = second < channels
        zero = tirx.const(0.0, "float32")
        values = x[n, 2 * c, y, x_], tirx.if_then_else(inside, x[n, second, y, x_], zero)
        return word([_narrowed(value) for value in values])

    return te.compute((n, -(-int(channels) // 2), height, width), element, name="words")


def widen(u: Any) -> Any:
    """The float32 numbers of which these are the upper halves."""
    from tvm import te

    return te.compute(u.shape, lambda *at: widened(u(*at)), name="widen")


def narrowed_source(call: Any) -> Any:
    """What ``widen`` reads; None for other calls."""
    return _read_by(call, WIDEN)


def rounded_source(call: Any, bindings: Mapping[Any, Any]) -> Any:
    """What ``widen(narrow(x))`` reads; None for other calls.

    Args:
        call: an expression.
        bindings: the expressions that variables are bound to.
    """
    halves = narrowed_source(call)
    return None if halves is None else _read_by(bindings.get(halves), NARROW)


def _read_by(call: Any, name: str) -> Any:
    if getattr(getattr(call, "op", None), "name", "") != "relax.call_tir":
        return None
    return call.args[1].fields[0] if call.args[0].name_hint.startswith(name) else None


# -- products ------------------------------------------------------------------------------------


def pack_pairs(weight: Any, panel: int, transposed: bool) -> Any:
    """``P[j // panel, k // 2, j % panel]``: the pairs of W[k, j] along k, filled up with zeros.

    Args:
        weight: uint16 [N, K] where transposed, else [K, N].
        panel: columns of a panel.
        transposed: see above.
    """
    return packed_by(weight, panel, transposed, BFLOAT16.depth, word)


def bfloat16_product(columns: int, tile: Tile) -> Callable[[Any, Any], Any]:
    """The product of uint16 [.., M, K] with packed pairs, summed up in float32."""

    def matmul(a: Any, packed: Any) -> Any:
        return register_tiles(
            a, packed, columns, tile, BFLOAT16.depth, lambda x, p: dot(BFLOAT16, x, p),
            lambda held, *at: held(*at),
        )  # fmt: skip

    return matmul


def bfloat16_form(rewriter: Any, call: Any) -> Any:
    """The form of a ``relax.matmul`` of widened operands; None where there is none.

    Args:
        rewriter: see `pruna_ir.backends.tvm_narrow_products`.
        call: the product.
    """
    left, right = call.args
    rows = narrowed_source(rewriter.bindings.get(left))
    made = rewriter.bindings.get(right)
    transposed = getattr(getattr(made, "op", None), "name", "") == "relax.permute_dims"
    weight = narrowed_source(rewriter.bindings.get(made.args[0]) if transposed else made)
    if rows is None or weight not in rewriter.parameters or weight.ty.ndim != 2:
        return None
    depth, columns = constant_size(right.ty.shape[0]), constant_size(call.ty.shape[-1])
    if left.ty.ndim < 2 or not (depth and columns):
        return None
    tile = choose_tile(constant_size(call.ty.shape[-2]), columns, -(-depth // BFLOAT16.depth),
                       Registers.of_target())  # fmt: skip
    builder = rewriter.builder_
    packed = builder.call_te(
        pack_pairs, rewriter.visit_expr(weight), tile.panel, transposed, primfunc_name_hint=PACK
    )
    return builder.call_te(
        bfloat16_product(columns, tile), rewriter.visit_expr(rows), builder.emit(packed),
        primfunc_name_hint="matmul_bfloat16", primfunc_attrs=PRODUCT_ATTRIBUTES,
    )  # fmt: skip


__all__: Sequence[str] = (
    "NARROW", "WIDEN", "bfloat16_form", "bfloat16_product", "conversion", "multiplies_bfloat16",
    "narrow", "narrow_words", "narrowed_source", "pack_pairs", "rounded_source", "widen",
    "with_float32",
)  # fmt: skip

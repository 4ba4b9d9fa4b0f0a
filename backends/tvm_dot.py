"""Dot products of AVX-512: sixteen sums at a time, each of four bytes or two bfloat16 numbers.

    int8      vpdpbusd     s32[16] += sum of u8[4] * s8[16, 4]      exact: nothing saturates
    bfloat16  vdpbf16ps    f32[16] += sum of bf16[2] * bf16[16, 2]  two roundings

A computation names the product by `dot`, which reads the *first* of the values that lie behind
each other in the data, and the word that packs as many weights (`word`):

    te.sum(dot(INT8, data[.., 4 * k], packed[.., k, lane]), axis=[k])

Its loop over the sixteen lanes is innermost and vectorised by the schedule, apart from its
initialisation; `with_dots` then writes the instruction in the place of that loop:

    for lane in vectorized(16): sums[lane] += dot(data[i], packed[lane])
      -->
    sums[0:16] = vpdpbusd(sums[0:16], broadcast(data[i:i+4]), packed[0:16])

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2C, VPDPBUSD.

Limits: the last index of the data steps by one value in memory, and so do those of the words and
sums; processors with AVX-512 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pruna_ir.backends.tvm_loops import LANES

_VECTORIZED = 2
_WORD = 32


@dataclass(frozen=True)
class Dot:
    """One instruction.

    Attributes:
        name: the type that it multiplies.
        marker: what a computation calls until the instruction replaces it.
        depth: how many products each sum takes in.
        data: the type of the data, and of the operand that it is broadcast to.
        sums: the type of the sums.
        operand: the vector that both operands are handed over as.
        intrinsic: LLVM's name, or that of a function of ours.
        features: the instruction sets that it needs, as LLVM names them.
        definition: that function, in LLVM's language, where TVM has no type for the operands.
    """

    name: str
    marker: str
    depth: int
    data: str
    sums: str
    operand: str
    intrinsic: str
    features: tuple[str, ...]
    definition: str = ""

    def is_covered(self, features: Callable[[str], bool]) -> bool:
        """Whether a processor has the instruction.

        Args:
            features: whether it has an instruction set, by LLVM's name.
        """
        return all(map(features, self.features))


INT8 = Dot(
    "int8", "pruna_dot_int8", 4, "uint8", "int32", "int8x64", "llvm.x86.avx512.vpdpbusd.512",
    ("avx512f", "avx512vnni"),
)  # fmt: skip
"""Unsigned data times signed weights."""
_PAIRS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @pruna_dpbf16ps(<16 x float> %sums, <16 x i32> %data, <16 x i32> %words) {
  %a = bitcast <16 x i32> %data to <32 x bfloat>
  %b = bitcast <16 x i32> %words to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sums, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
"""
BFLOAT16 = Dot(
    "bfloat16", "pruna_dot_bfloat16", 2, "uint16", "float32", "int32x16", "pruna_dpbf16ps",
    ("avx512f", "avx512bf16"), _PAIRS,
)  # fmt: skip
"""Pairs of bfloat16 numbers, held as uint16, and of weights."""
_DOTS = {made.marker: made for made in (INT8, BFLOAT16)}


def dot(kind: Dot, data: Any, packed: Any) -> Any:
    """The products of ``kind.depth`` values with as many weights, added up.

    Args:
        data: the element of a tensor at which the values begin, or of one of words; or, widened to
            int32, the single value of each lane.
        packed: the element of a tensor of words, see `word`.
    """
    from tvm import tirx

    return tirx.call_pure_extern(kind.sums, kind.marker, data, packed)


def word(values: Sequence[Any]) -> Any:
    """Four int8 values, or two uint16 ones, side by side in an int32, the first the lowest."""
    from tvm import tirx

    width = _WORD // len(values)

    def part(value: Any) -> Any:
        return value.astype("int32") & tirx.const(2**width - 1, "int32")

    packed = part(values[0])
    for place, value in enumerate(values[1:], start=1):
        packed = packed | (part(value) << tirx.const(width * place, "int32"))
    return packed


def widened(half: Any) -> Any:
    """The float32 number of which a uint16 is the upper half."""
    from tvm import tirx

    bits = half.astype("uint32") << tirx.const(_WORD // 2, "uint32")
    return tirx.reinterpret("float32", bits)


def with_dots(function: Any) -> Any:
    """A scheduled ``PrimFunc`` with instructions in the place of its calls of `dot`."""
    import tvm_ffi
    from tvm import tirx
    from tvm.ir import StringImm

    body = tvm_ffi.structural_map(
        function.body, (tirx.BufferStore, _instruction), (tirx.For, _without_lanes), order="post"
    )
    name = multiplied(function.with_body(body))
    for kind in _DOTS.values():
        if kind.definition and kind.name == name:
            body = tirx.AttrStmt(
                tirx.const(0, "int32"), "pragma_import_llvm", StringImm(kind.definition), body
            )
    return function.with_body(body)


def _instruction(store: Any) -> Any:
    """``sums[lane] += dot(data[i], packed[lane])`` as one vector; other stores as they are."""
    from tvm import tirx

    call: Any = getattr(store.value, "b", None)
    kind = _kind(call)
    if kind is None:
        return store
    _, data, packed = call.args
    words = tirx.BufferLoad(packed.source, _along(packed.indices, LANES))
    sums = store.value.a
    held = tirx.BufferLoad(sums.source, _along(sums.indices, LANES))
    if kind.definition:
        made = tirx.call_pure_extern(
            f"{kind.sums}x{LANES}", kind.intrinsic, held, _data(kind, data), words
        )
    else:
        made = tirx.call_llvm_pure_intrin(
            f"{kind.sums}x{LANES}",
            kind.intrinsic,
            held,
            tirx.reinterpret(kind.operand, _data(kind, data)),
            tirx.reinterpret(kind.operand, words),
        )
    return tirx.BufferStore(store.buffer, made, _along(store.indices, LANES))


def _data(kind: Dot, value: Any) -> Any:
    """The sixteen words that a data operand stands for: equal ones, but where it is widened."""
    from tvm import tirx

    if isinstance(value, tirx.Cast):
        source = value.value
        loaded = tirx.BufferLoad(source.source, _along(source.indices, LANES))
        return loaded.astype(f"int32x{LANES}")
    if str(getattr(value.ty, "dtype", value.ty)) == "int32":
        return tirx.Broadcast(value, LANES)
    values = tirx.BufferLoad(value.source, _along(value.indices, kind.depth))
    return tirx.Broadcast(tirx.reinterpret("int32", values), LANES)


def _kind(call: Any) -> Dot | None:
    """The instruction that a call names."""
    from tvm.ir import Call, Op

    if not isinstance(call, Call) or not call.op.same_as(Op.get("tirx.call_pure_extern")):
        return None
    return _DOTS.get(str(call.args[0].value))


def _along(indices: Sequence[Any], lanes: int) -> list[Any]:
    """The indices of a run of elements that starts at some."""
    from tvm import tirx

    return [*indices[:-1], tirx.Ramp(indices[-1], 1, lanes)]


def _without_lanes(loop: Any, _: Any = None) -> Any:
    """A vectorised loop whose body stores vectors already, as a single step."""
    from tvm import s_tir, tirx

    body = loop.body
    if int(loop.kind) != _VECTORIZED or not isinstance(body, s_tir.SBlockRealize):
        return loop
    store = body.block.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.indices[-1], tirx.Ramp):
        return loop
    return tirx.For(loop.loop_var, loop.min, tirx.const(1, "int32"), tirx.ForKind.SERIAL, body)


def multiplied(function: Any) -> str:
    """The type that the instructions of a ``PrimFunc`` multiply; empty where it has none."""
    import tvm
    import tvm_ffi

    find = tvm.target.codegen.llvm_lookup_intrinsic_id
    kinds = _DOTS.values()
    names = {find(kind.intrinsic): kind.name for kind in kinds if not kind.definition}
    own = {kind.intrinsic: kind.name for kind in kinds if kind.definition}
    intrinsic, extern = (
        tvm.ir.Op.get(f"tirx.{name}") for name in ("call_llvm_pure_intrin", "call_pure_extern")
    )
    found: set[str] = set()

    def note(call: Any) -> None:
        if call.op.same_as(intrinsic):
            found.add(names.get(int(call.args[0].value), ""))
        elif call.op.same_as(extern):
            found.add(own.get(str(call.args[0].value), ""))

    tvm_ffi.structural_walk(function.body, (tvm.ir.Call, note))
    return next(iter(sorted(found - {""})), "")


__all__: Sequence[str] = (
    "BFLOAT16", "INT8", "Dot", "dot", "multiplied", "widened", "with_dots", "word",
)  # fmt: skip

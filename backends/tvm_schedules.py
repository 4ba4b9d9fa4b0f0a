"""CPU schedules by rule: which loops of a fused function run how.

TVM's own lowering leaves loops as they are written, which runs one multiplication at a time. Rules
cover what matters:

    conv2d    `pruna_ir.backends.tvm_convolutions`
    matmul    `pruna_ir.backends.tvm_products`
    rows      `pruna_ir.backends.tvm_reductions`: softmax, layer norm
    the rest  element-wise steps inlined into each other, outer loops parallel, reductions of
              blocked tensors sixteen lanes at a time

A convolution or product to which no rule applies keeps TVM's loops, and so does a whole program on
a processor without AVX2: the build says which functions and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pruna_ir.backends import tvm_convolutions, tvm_products, tvm_reductions
from pruna_ir.backends.tvm_dot import with_dots
from pruna_ir.backends.tvm_functions import with_arithmetic
from pruna_ir.backends.tvm_loops import LANES, extent

_REDUCTION = 2
_PRODUCTS = ("conv", "matmul", "dense", "einsum")
_BLOCKED_RANK = 5
_MOST_CURVES = 2
_CURVED = ("T.erf", "T.exp", "T.tanh", "T.sigmoid", "T.pow")
NO_PROCESSOR = "no rule covers a processor without AVX2"


def _is_reduction(schedule: Any, block: Any) -> bool:
    return any(int(v.iter_type) == _REDUCTION for v in schedule.get(block).iter_vars)


def _inline(schedule: Any, root: Any) -> None:
    """Inline element-wise steps into element-wise readers, up to the last one."""
    for block in schedule.get_child_blocks(root):
        readers = schedule.get_consumers(block)
        if not readers or _is_reduction(schedule, block):
            continue
        if any(_is_reduction(schedule, reader) for reader in readers):
            continue
        if all(_is_short(schedule.get(block), schedule.get(reader)) for reader in readers):
            schedule.compute_inline(block)


def _is_short(block: Any, reader: Any) -> bool:
    """Whether a reader stays short with what it reads written out in it.

    Functions become polynomials, of which LLVM takes minutes to compile many in one expression:
    one that holds some already is read from memory.
    """
    text, buffer = str(reader.body), block.writes[0].source.name
    curves = _curves(str(block.body)) * max(1, text.count(f"{buffer}["))
    return not curves or curves + _curves(text) <= _MOST_CURVES


def _curves(text: str) -> int:
    return sum(text.count(f"{word}(") for word in _CURVED)


def _inline_readers(schedule: Any, block: Any) -> None:
    """Inline what follows a block, element by element, into the last of it."""
    for reader in schedule.get_consumers(block):
        while behind := schedule.get_consumers(reader):
            schedule.compute_inline(reader)
            reader = behind[0]


def _schedule_loops(schedule: Any, block: Any) -> None:
    """Run the leading loops in parallel; the innermost is LLVM's to vectorise."""
    kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
    loops = schedule.get_loops(block)
    if len(kinds) != len(loops) or not loops:
        return
    leading = next((i for i, kind in enumerate(kinds) if kind == _REDUCTION), len(kinds))
    if _BLOCKED_RANK == leading < len(kinds) and extent(schedule, loops[leading - 1]) == LANES:
        _schedule_lanes(schedule, block)
        return
    keep = 1 if leading == len(kinds) else 0
    outer = loops[: max(leading - keep, 0)][:3]
    if outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


def _schedule_lanes(schedule: Any, block: Any) -> None:
    """Reduce sixteen channels of a blocked tensor at a time."""
    loops = schedule.get_loops(block)
    lane, reduced = loops[_BLOCKED_RANK - 1], loops[_BLOCKED_RANK:]
    schedule.reorder(*reduced, lane)
    schedule.vectorize(lane)
    schedule.parallel(schedule.fuse(*loops[:3]))
    initial = schedule.decompose_reduction(block, reduced[0])
    schedule.vectorize(schedule.get_loops(initial)[-1])


def _convolution(schedule: Any, root: Any) -> Any:
    """The block of the convolution that a rule covers; None where there is none."""
    blocks = schedule.get_child_blocks(root)
    named = (b for b in blocks if schedule.get(b).name_hint == tvm_convolutions.ACCUMULATE)
    return next(named, None)


def schedule_function(function: Any) -> tuple[Any, bool]:
    """The function with its loops scheduled, and whether a convolution or product was among them.

    Raises:
        tvm.s_tir.ScheduleError: a rule does not fit after all.
    """
    import tvm
    from tvm import s_tir

    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        if schedule.get(block).name_hint == tvm_reductions.ROWS:
            _inline_readers(schedule, block)
            tvm_reductions.schedule_rows(schedule, block)
            return schedule.mod["main"], False
    _inline(schedule, root)
    convolution = _convolution(schedule, root)
    if convolution is not None:
        tvm_convolutions.schedule_convolution(schedule, convolution)
        return schedule.mod["main"], True
    written: set[str] = set()
    product = False
    blocks = [(block, schedule.get(block).name_hint) for block in schedule.get_child_blocks(root)]
    for block, name in blocks:
        if name in written:
            continue
        if name == tvm_products.PRODUCT:
            written |= tvm_products.schedule_product(schedule, block)
            product = True
        elif name in tvm_products.COPIES:
            tvm_products.schedule_copy(schedule, block)
        elif name == "matmul" and len(schedule.get_loops(block)) >= 3:
            tvm_products.schedule_matmul(schedule, block)
            product = True
        else:
            _schedule_loops(schedule, block)
    return schedule.mod["main"], product


def _is_product(name: str, function: Any) -> bool:
    """Whether a function multiplies and adds as a convolution or a matrix product does."""
    import tvm
    from tvm import s_tir

    if not any(word in name for word in _PRODUCTS):
        return False
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    return any(_is_reduction(schedule, block) for block in blocks)


def schedule_module(module: Any, features: Callable[[str], bool]) -> tuple[Any, dict[str, str]]:
    """The module with its loops scheduled, and why functions keep TVM's loops, by name.

    Args:
        module: a ``tvm.IRModule`` after fusion.
        features: whether the processor has an instruction set, by LLVM's name.
    """
    import tvm
    from tvm import s_tir, tirx

    functions = {
        name: function
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    if not covers(features):
        return module, {name.name_hint: NO_PROCESSOR for name in functions}
    result = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    kept: dict[str, str] = {}
    for name, function in functions.items():
        try:
            scheduled, product = schedule_function(function)
        except s_tir.ScheduleError:
            kept[name.name_hint] = "a rule does not fit its loops"
            continue
        result.update_func(name, with_arithmetic(with_dots(scheduled)))
        if not product and _is_product(name.name_hint, function):
            kept[name.name_hint] = "no rule covers its operator at these shapes"
    return result, dict(sorted(kept.items()))


def covers(features: Callable[[str], bool]) -> bool:
    """Whether the rules are made for a processor: one with AVX2 or AVX-512."""
    return features("avx2") or features("avx512f")


__all__: Sequence[str] = ("NO_PROCESSOR", "covers", "schedule_function", "schedule_module")

"""Plain CPU schedules, so that a TVM artifact is bearable: packed convolutions, tiled products.

TVM's own lowering leaves loops as they are written, which runs one multiplication at a time. Three
rules cover what matters:

    conv2d    `pruna_ir.backends.tvm_convolutions`
    matmul    `pruna_ir.backends.tvm_products`
    the rest  element-wise steps inlined into each other, outer loops parallel

A function to which a rule does not apply keeps TVM's loops; the build names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pruna_ir.backends import tvm_convolutions, tvm_products

_REDUCTION = 2


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
        if schedule.get(block).name_hint == tvm_convolutions.ACCUMULATE:
            tvm_convolutions.schedule_convolution(schedule, block)
            return schedule.mod["main"]
    written: set[str] = set()
    blocks = [(block, schedule.get(block).name_hint) for block in schedule.get_child_blocks(root)]
    for block, name in blocks:
        if name in written:
            continue
        if name == tvm_products.PRODUCT:
            written |= tvm_products.schedule_product(schedule, block)
        elif name in tvm_products.COPIES:
            tvm_products.schedule_copy(schedule, block)
        elif name == "matmul" and len(schedule.get_loops(block)) >= 3:
            tvm_products.schedule_matmul(schedule, block)
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


__all__: Sequence[str] = ("schedule_module")

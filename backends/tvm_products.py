"""CPU schedules of matrix products.

    C[.., i, j] = sum_k A[.., i, k] * B[.., k, j]

A panel of up to 64 columns at a time, so that B's panel stays in the cache while i runs.

Limits: products are in float32.
"""

from __future__ import annotations

from typing import Any

from pruna_ir.backends.tvm_loops import LANES, extent, vectorize

_PANELS = (64, 48, 32, 16, 8)


def schedule_matmul(schedule: Any, block: Any) -> None:
    """Hold a panel of columns in registers over the whole reduction."""
    loops = schedule.get_loops(block)
    *batch, i, j, k = loops
    width = extent(schedule, j)
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
    if extent(schedule, outer) == 1 and not batch:
        schedule.parallel(i)
    else:
        schedule.parallel(schedule.fuse(*batch, outer) if batch else outer)
    vectorize(schedule, block)
    copied = schedule.split(schedule.get_loops(held)[-1], [None, lanes])
    schedule.vectorize(copied[-1])
    vectorize(schedule, schedule.decompose_reduction(block, k))

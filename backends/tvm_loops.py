"""Loop steps that the schedules of several operators share."""

from __future__ import annotations

from typing import Any

LANES = 16
"""Float32 values in one vector register of AVX-512, two registers of AVX2."""


def vectorize(schedule: Any, block: Any) -> None:
    """Vectorise the innermost loop and unroll the next.

    A reduction is treated so before it is decomposed: its update alone can not be.
    """
    schedule.unroll(schedule.get_loops(block)[-2])
    schedule.vectorize(schedule.get_loops(block)[-1])


def extent(schedule: Any, loop: Any) -> int:
    """A loop's constant extent; 0 where it is symbolic."""
    from tvm import tirx

    size = schedule.get(loop).extent
    return int(size) if isinstance(size, (int, tirx.IntImm)) else 0

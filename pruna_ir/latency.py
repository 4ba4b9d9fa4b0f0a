"""Latency: how long things take, side by side.

A machine's speed drifts, so times are only worth something as ratios within one run: every round
calls each candidate once, and a candidate's speed-up is the median over rounds of the first
candidate's time over its own in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pruna_ir.errors import UsageError

Clock = Callable[[], float]


@dataclass(frozen=True)
class Latency:
    """The times of one candidate, in milliseconds.

    Attributes:
        p50: the median.
        p90: 90 of 100 calls took no longer.
        p99: 99 of 100 calls took no longer.
        rounds: the number of calls that were timed.
        speedup: the median over rounds of the first candidate's time over this one's.
    """

    p50: float
    p90: float
    p99: float
    rounds: int
    speedup: float

    @property
    def median(self) -> float:
        """The median, in milliseconds."""
        return self.p50

    def __str__(self) -> str:
        return (
            f"{self.p50:.3g} ms (p90 {self.p90:.3g}, p99 {self.p99:.3g}, {self.rounds} rounds), "
            f"{self.speedup:.2f}x"
        )


def measure(
    runners: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 100,
    budget_s: float = 10.0,
    warmup: int = 2,
    settle: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Time every candidate in interleaved rounds; speed-ups are against the first.

    Args:
        runners: calls to time, by name.
        repeats: the largest number of rounds.
        budget_s: no round starts after this many seconds; at least 3 are run.
        warmup: untimed rounds before.
        settle: untimed calls of a candidate before each timed one. The others have driven its
            weights from the caches; a model that serves alone finds them there.
        clock: seconds, monotonic.

    Raises:
        UsageError: there is nothing to time.

    >>> found = measure({"sum": lambda: sum(range(1000)), "len": lambda: len("")}, repeats=5)
    >>> found["sum"].rounds, found["sum"].speedup
    (5, 1.0)
    """
    if not runners or repeats < 1:
        raise UsageError("measure needs at least one candidate and one repetition")
    for _ in range(warmup):
        for run in runners.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    start = clock()
    for done in range(repeats):
        if done >= 3 and clock() - start > budget_s:
            break
        for name, run in runners.items():
            for _ in range(settle):
                run()
            before = clock()
            run()
            times[name].append((clock() - before) * 1e3)
    baseline = next(iter(times.values()))
    return {name: _summary(taken, baseline) for name, taken in times.items()}


def _summary(taken: Sequence[float], baseline: Sequence[float]) -> Latency:
    ordered = sorted(taken)
    ratios = [
        first / own if own > 0 else float("inf")
        for first, own in zip(baseline, taken, strict=True)
    ]
    return Latency(
        p50=statistics.median(ordered),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        rounds=len(ordered),
        speedup=statistics.median(ratios),
    )


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that ``percent`` of 100 values do not exceed (nearest rank).

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50), percentile([1.0, 2.0, 3.0, 4.0], 90)
    (2.0, 4.0)
    """
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(rank, 1) - 1]

"""Latency: interleaved rounds, medians, paired ratios."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.latency import measure, percentile


class FakeTime:
    """A clock that candidates advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float):
        turns = iter(range(10**9))

        def run() -> None:
            self.calls.append(name)
            self.now += seconds[next(turns) % len(seconds)]

        return run


def test_rounds_are_interleaved():
    time = FakeTime()
    runners = {"a": time.takes("a", 1.0), "b": time.takes("b", 0.25)}
    measure(runners, repeats=3, budget_s=100, warmup=1, clock=time)
    assert time.calls == ["a", "b"] * 4


def test_candidates_settle_untimed_before_every_timed_call():
    time = FakeTime()
    runners = {"a": time.takes("a", 5.0, 5.0, 1.0), "b": time.takes("b", 2.0)}
    found = measure(runners, repeats=3, budget_s=100, warmup=0, settle=2, clock=time)
    assert time.calls == (["a"] * 3 + ["b"] * 3) * 3
    assert found["a"].p50 == pytest.approx(1000.0)
    assert found["b"].rounds == 3


def test_times_are_milliseconds_and_ratios_are_against_the_first():
    time = FakeTime()
    runners = {"a": time.takes("a", 0.010), "b": time.takes("b", 0.004)}
    found = measure(runners, repeats=5, clock=time)
    assert found["a"].p50 == pytest.approx(10.0)
    assert found["a"].speedup == 1.0
    assert found["b"].p50 == found["b"].median == pytest.approx(4.0)
    assert found["b"].speedup == pytest.approx(2.5)


def test_drift_does_not_change_the_ratio():
    time = FakeTime()
    drift = (1.0, 2.0, 4.0, 8.0)
    runners = {"a": time.takes("a", *drift), "b": time.takes("b", *(d / 2 for d in drift))}
    found = measure(runners, repeats=4, warmup=0, budget_s=1e9, clock=time)
    assert found["b"].speedup == pytest.approx(2.0)


def test_an_outlier_moves_only_the_tail():
    time = FakeTime()
    runners = {"a": time.takes("a", *([0.001] * 99), 1.0)}
    found = measure(runners, repeats=100, warmup=0, clock=time)["a"]
    assert (found.p50, found.p90, found.p99) == pytest.approx((1.0, 1.0, 1.0))
    found = measure({"a": time.takes("a", 0.001, 1.0)}, repeats=100, budget_s=1e9, clock=time)["a"]
    assert found.p99 == pytest.approx(1000.0)


def test_the_budget_stops_after_three_rounds_at_least():
    time = FakeTime()
    slow = {"a": time.takes("a", 60.0)}
    assert measure(slow, repeats=50, budget_s=1.0, warmup=0, clock=time)["a"].rounds == 3
    assert measure(slow, repeats=2, budget_s=1.0, warmup=0, clock=time)["a"].rounds == 2


def test_nothing_to_time_is_an_error():
    with pytest.raises(UsageError, match="at least one candidate"):
        measure({})


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 100))
def test_a_percentile_is_an_element_that_enough_values_do_not_exceed(values, percent):
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert found in ordered
    assert sum(v <= found for v in ordered) * 100 >= percent * len(ordered)
    assert sum(v < found for v in ordered) * 100 < percent * len(ordered)

"""The walk computes what is wanted, in parts where that is the same, and frees it."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from threading import get_ident

import pytest
import torch
from torch import fx, nn

from pruna_ir import packed_walk
from pruna_ir.calibration import Histogram, MinMax, observe
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError
from pruna_ir.packed_walk import PackedWalk
from pruna_ir.program import Program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def net(**options) -> Program:
    return capture(Net(), (torch.randn(2, 3, 16, 16),), **{"dynamic_batch": True, **options})


def relus(program: Program) -> list[fx.Node]:
    return list(program.calls(torch.ops.aten.relu.default))


def shown(program: Program, x: torch.Tensor, *wanted: fx.Node) -> list[tuple[str, torch.Tensor]]:
    seen: list[tuple[str, torch.Tensor]] = []
    PackedWalk(program, wanted, lambda node, v: seen.append((node.name, v))).walk((x,))
    return seen


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_walk, "PART_BYTES", 3 * 8 * 16 * 16 * 4)


def test_batches_of_large_values_come_in_parts(small_parts: None) -> None:
    program = net()
    x = torch.randn(8, 3, 16, 16)
    first, second = relus(program)
    seen = shown(program, x, first, second)
    assert [(name, len(v)) for name, v in seen] == [
        (node.name, rows) for rows in (3, 3, 2) for node in (first, second)
    ]
    whole = torch.cat([v for name, v in seen if name == first.name])
    own = torch.relu(Net().first(x))
    torch.testing.assert_close(whole, own, rtol=1e-5, atol=1e-5)


def test_small_batches_stay_whole() -> None:
    program = net()
    (seen,) = shown(program, torch.randn(8, 3, 16, 16), relus(program)[0])
    assert len(seen[1]) == 8


def test_programs_that_look_across_rows_stay_whole(small_parts: None) -> None:
    class Centred(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0, keepdim=True))

    program = capture(Centred(), (torch.randn(2, 3, 16, 16),), dynamic_batch=True)
    (seen,) = shown(program, torch.randn(8, 3, 16, 16), relus(program)[0])
    assert len(seen[1]) == 8
    fixed = capture(Net(), (torch.randn(8, 3, 16, 16),), dynamic_batch=False)
    (seen,) = shown(fixed, torch.randn(8, 3, 16, 16), relus(fixed)[0])
    assert len(seen[1]) == 8


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_only_what_is_needed_is_computed() -> None:
    program = net()
    with Counted() as counted:
        shown(program, torch.randn(2, 3, 16, 16), relus(program)[0])
    ran = [name for name in counted.names if "convolution_pointwise" in name]
    assert len(ran) == 1
    assert not any("mean" in name or "addmm" in name for name in counted.names)


def test_inputs_that_nobody_needs_are_passed_over() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return a + 1.0, b * 2.0

    program = capture(Two(), (torch.randn(2, 3), torch.randn(2, 3)), dynamic_batch=True)
    (node,) = program.calls(torch.ops.aten.mul.Tensor)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    seen: list[torch.Tensor] = []
    PackedWalk(program, (node,), lambda _, v: seen.append(v)).walk((a, b))
    assert torch.equal(seen[0], b * 2.0)


def test_values_are_freed_at_their_last_use() -> None:
    program = net()
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def show(_: fx.Node, value: torch.Tensor) -> None:
        alive.append(weakref.ref(value))
        counts.append(sum(ref() is not None for ref in alive))

    gc.collect()
    PackedWalk(program, [*relus(program), *program.results()], show).walk(
        (torch.randn(2, 3, 16, 16),)
    )
    assert counts == [1, 2, 1]


def test_observers_see_the_same_in_parts_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    program = net()
    x = torch.randn(11, 3, 16, 16)
    found = {}
    for size in (1 << 24, 1):
        monkeypatch.setattr(packed_walk, "PART_BYTES", size)
        observers = {relus(program)[0]: Histogram(), relus(program)[1]: MinMax()}
        observe(program, observers, TensorData((x,), batch_size=4))
        found[size] = list(observers.values())
    (whole, bounds), (parts, part_bounds) = found.values()
    assert (whole.total, whole.zeros, whole.exponent) == (parts.total, parts.zeros, parts.exponent)
    # Values at the edge of a bin may change sides by rounding.
    moved = (whole.counts.cumsum(0) - parts.counts.cumsum(0)).abs().max()
    assert int(moved) <= 3
    assert part_bounds.high == pytest.approx(bounds.high, rel=1e-5)


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_parts_are_run_side_by_side(small_parts: None, three_threads: None) -> None:
    program = net()
    x = torch.randn(23, 3, 16, 16)
    (first, second), seen = relus(program), [[], [], []]
    shows = [lambda node, v, to=to: to.append((node, v, get_ident())) for to in seen]
    walk = PackedWalk(program, (first, second), *shows)
    for _ in range(20):
        walk.walk((x,))
    assert torch.get_num_threads() == 3
    assert sum(len({thread for _, _, thread in some}) > 0 for some in seen) >= 2
    whole = shown(program, x, first, second)
    for node, (_, value) in zip((first, second), [whole[0], whole[1]], strict=True):
        rows = torch.cat([v for some in seen for n, v, _ in some if n is node])
        wanted = torch.cat([v for name, v in whole if name == node.name])
        assert len(rows) == 20 * 23
        assert torch.allclose(rows.double().sum(0), 20 * wanted.double().sum(0), atol=1e-3)
        assert value.shape[1:] == rows.shape[1:]


def test_threads_of_observers_add_up(small_parts: None, three_threads: None) -> None:
    """Two nodes may share an observer; the counts are the same however parts fall."""
    program = net()
    x = torch.randn(40, 3, 16, 16)
    first, second = relus(program)
    counts = []
    for threads in (1, 3, 3):
        torch.set_num_threads(threads)
        shared, bounds = Histogram(), MinMax()
        observers = {first: shared, second: shared, program.results()[0]: bounds}
        assert observe(program, observers, TensorData((x,), batch_size=20)) == 40
        assert shared.total == 2 * 40 * 8 * 16 * 16
        counts.append((shared.counts.tolist(), shared.zeros, bounds.low, bounds.high))
    assert counts[0] == counts[1] == counts[2]


def test_an_observer_that_cannot_merge_sees_everything_itself(
    small_parts: None, three_threads: None
) -> None:
    class Plain:
        low, high, rows = 0.0, 0.0, 0

        def update(self, x: torch.Tensor) -> None:
            self.rows += len(x)

    program, plain, other = net(), Plain(), MinMax()
    first, second = relus(program)
    data = TensorData((torch.randn(24, 3, 16, 16),), batch_size=24)
    observe(program, {first: plain, second: other}, data)
    assert plain.rows == 24
    assert other.high > 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1 << 24, 1])
def test_errors_name_the_layer_and_the_batch_as_given(
    size: int, threads: int, monkeypatch: pytest.MonkeyPatch, three_threads: None
) -> None:
    monkeypatch.setattr(packed_walk, "PART_BYTES", size)
    torch.set_num_threads(threads)
    program = net()
    x = torch.randn(12, 3, 16, 16)
    x[7, 0, 3, 3] = math.nan
    done: list[int] = []
    with pytest.raises(PassError, match=r"relu\) computes NaN.* on calibration batch 1;"):
        observe(
            program, {node: Histogram() for node in relus(program)},
            TensorData((x,), batch_size=4), progress=lambda _, seen, __: done.append(seen),
        )  # fmt: skip
    assert done == [4]

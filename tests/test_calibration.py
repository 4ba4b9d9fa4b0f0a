"""The walk over data: what observers see, its memory and its refusals."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pruna_ir.calibration import observe
from pruna_ir.capture import capture
from pruna_ir.data import Batch, TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.histogram import Histogram
from pruna_ir.program import Program
from tests.observed import seen, state


class Chain(torch.nn.Module):
    def __init__(self, length: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def chain(length: int = 3, *, dynamic: bool = True) -> Program:
    torch.manual_seed(0)
    return capture(Chain(length), (torch.randn(2, 4),), dynamic_batch=dynamic)


def linears(program: Program) -> list[torch.fx.Node]:
    return list(program.calls(torch.ops.aten.linear.default))


def test_sees_every_value_of_its_nodes() -> None:
    program = chain()
    x = torch.randn(11, 4)
    observers = {node: Histogram() for node in linears(program)}
    progress: list[tuple[str, int, int]] = []
    done = observe(
        program, observers, TensorData((x,), batch_size=4),
        progress=lambda *step: progress.append(step),
    )  # fmt: skip
    assert done == 11
    assert progress == [("calibrate", 4, 12), ("calibrate", 8, 12), ("calibrate", 11, 11)]
    torch.manual_seed(0)
    module = Chain()
    for node, layer in zip(linears(program), module.layers, strict=True):
        x = layer(x)
        assert state(observers[node]) == state(seen(x))
        x = torch.relu(x)


def test_stops_after_the_samples_asked_for() -> None:
    program = chain(1)
    (node,) = linears(program)
    seen_by = Histogram()
    data = TensorData((torch.randn(20, 4),), batch_size=8)
    done = observe(program, {node: seen_by}, data, samples=10)
    assert done == 10
    assert seen_by.total == 10 * 4


def test_cuts_batches_to_a_fixed_batch_size() -> None:
    program = chain(1, dynamic=False)
    (node,) = linears(program)
    seen_by = Histogram()
    assert observe(program, {node: seen_by}, TensorData((torch.randn(7, 4),), None, 5)) == 6
    with pytest.raises(UsageError, match="at least one whole batch"):
        observe(program, {node: seen_by}, TensorData((torch.randn(1, 4),)))


class Nothing:
    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


def test_empty_data_is_refused() -> None:
    with pytest.raises(UsageError, match="no sample"):
        observe(chain(1), {}, Nothing())
    with pytest.raises(UsageError, match="at least 1 sample"):
        observe(chain(1), {}, Nothing(), samples=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_name_the_layer_and_the_batch(bad: float) -> None:
    program = chain()
    x = torch.randn(9, 4)
    x[7] = bad
    observers = {node: Histogram() for node in linears(program)}
    with pytest.raises(PassError, match=r"layers\.\d .* calibration batch 2;"):
        observe(program, observers, TensorData((x,), batch_size=3))


def test_values_beyond_float32_are_refused() -> None:
    program = capture(torch.nn.Linear(4, 4).double(), (torch.randn(2, 4).double(),))
    data = TensorData((torch.full((3, 4), 1e300, dtype=torch.float64),))
    with pytest.raises(PassError, match="more than float32 holds on calibration batch 0"):
        observe(program, {linears(program)[0]: Histogram()}, data)


def test_integer_values_are_refused() -> None:
    program = capture(torch.nn.Embedding(5, 3), (torch.zeros(2, dtype=torch.int64),))
    observers = {program.placeholders()[0]: Histogram()}
    with pytest.raises(PassError, match="only float tensors"):
        observe(program, observers, TensorData((torch.zeros(2, dtype=torch.int64),)))


class Alive(TorchDispatchMode):
    """Counts the largest number of [rows, 4] results alive at one time."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == (self.rows, 4):
            self.alive = [ref for ref in self.alive if ref() is not None]
            self.alive.append(weakref.ref(result))
            self.most = max(self.most, len(self.alive))
        return result


def test_activations_are_freed_at_their_last_use() -> None:
    program = chain(30)
    observers = {node: Histogram() for node in linears(program)}
    gc.collect()
    with Alive(rows=17) as counter:
        observe(program, observers, TensorData((torch.randn(17, 4),)))
    assert counter.most <= 6
    with Alive(rows=17) as control:
        kept = []
        x = torch.randn(17, 4)
        for _ in range(30):
            x = x + 1
            kept.append(x)
    assert control.most >= 30

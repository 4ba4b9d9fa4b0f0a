"""Blocked convolutions of the tvm backend: equal to torch in float64, whatever shape is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_convolutions import (
    ACCUMULATE,
    Convolution,
    Tile,
    accumulators,
    convolve,
    pack,
    schedule_convolution,
    tile,
)
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions, Lowered
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.test_tvm_bytes import Array, convolutions, sums_reference

TOLERANCE = 1e-5
"""The largest difference from float64, in units of the largest expected value or 1."""
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "leaky": torch.nn.functional.leaky_relu,
    "hardswish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Layer:
    """A convolution as it is drawn, and what follows it."""

    groups: int
    group_inputs: int
    group_outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    bias: bool
    norm: bool
    residual: bool
    activation: str


PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
LAYERS = st.builds(
    Layer,
    groups=st.sampled_from([1, 1, 2, 3, 8, 17]),
    group_inputs=st.sampled_from([1, 1, 2, 5, 16, 21]),
    group_outputs=st.sampled_from([1, 1, 2, 4, 7, 16, 33]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=PAIRS,
    dilation=PAIRS,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 3)),
    bias=st.booleans(),
    norm=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)


class Branch(torch.nn.Module):
    """A drawn layer behind a convolution that makes its channels: its data is blocked."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        inputs, outputs = layer.groups * layer.group_inputs, layer.groups * layer.group_outputs
        self.layer = layer
        self.widen = torch.nn.Conv2d(3, inputs, 1)
        self.conv = torch.nn.Conv2d(
            inputs, outputs, layer.kernel, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias,
        )  # fmt: skip
        self.norm = torch.nn.BatchNorm2d(outputs) if layer.norm else torch.nn.Identity()
        if isinstance(self.norm, torch.nn.BatchNorm2d):
            for tensor in (self.norm.weight, self.norm.running_var):
                tensor.data.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(self.widen(x)))
        if self.layer.residual:
            y = y + torch.sigmoid(y.mean((2, 3), keepdim=True)) * y
        return ACTIVATIONS[self.layer.activation](y)


class Branches(torch.nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.branches = torch.nn.ModuleList(map(Branch, layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(branch(x) for branch in self.branches)


def lowered(made: Program, folder: Path) -> Lowered:
    return ToTvm().lower(made, folder, Context())


def error(module: torch.nn.Module, folder: Path, x: torch.Tensor) -> float:
    """The largest difference from the module in float64, in units of the tolerance."""
    actual = ToTvm().load(folder, LoadOptions(threads=2)).run([x.numpy()])
    with torch.no_grad():
        results = module.double()(x.double())
    module.float()
    expected = [results] if isinstance(results, torch.Tensor) else list(results)
    assert [a.shape for a in actual] == [tuple(e.shape) for e in expected]
    return max(
        float(np.abs(a - e.numpy()).max()) / (TOLERANCE * max(1.0, float(e.abs().max())))
        for a, e in zip(actual, expected, strict=True)
    )


@settings(max_examples=2, deadline=None)
@given(
    layers=st.lists(LAYERS, min_size=4, max_size=4),
    size=st.tuples(st.integers(10, 14), st.sampled_from([13, 16, 30, 37])),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_equals_torch(
    layers: list[Layer], size: tuple[int, int], batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = Branches(layers).eval()
    made = capture(module, (torch.randn(2, 3, *size),))
    with TemporaryDirectory() as folder:
        assert lowered(made, Path(folder)).facts["tvm-default-schedules"] == []
        x = torch.randn(batch, 3, *size)
        assert error(module, Path(folder), x) < 1
        # The control: a network whose first biases differ by a hundredth is told apart.
        for branch in module.branches:
            branch.widen.bias.data += 0.01
        assert error(module, Path(folder), x) > 1


class Between(torch.nn.Module):
    """What stays blocked between convolutions, and what can not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.second = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.joined = torch.nn.Conv2d(48, 19, 1)
        self.gate = torch.nn.Conv2d(19, 19, 1)
        self.last = torch.nn.Conv2d(38, 5, 3, stride=2)
        self.register_buffer("shift", torch.linspace(-1, 1, 19).reshape(19, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        functional = torch.nn.functional
        y = self.joined(torch.cat([self.first(x), self.second(x)], 1)) + self.shift
        gated = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        odd = torch.cat([gated, y.flip(3)], 1)
        low = functional.max_pool2d(odd, 3, 2, 1) - functional.avg_pool2d(odd, 3, 2, 1)
        return self.last(low), y.softmax(1), low / (odd.amax((2, 3), keepdim=True) + 9)


def test_what_lies_between_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Between().eval()
    made = capture(module, (torch.randn(2, 3, 14, 15),))
    assert lowered(made, tmp_path).facts["tvm-default-schedules"] == []
    assert error(module, tmp_path, torch.randn(3, 3, 14, 15)) < 1


class Signals(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv1d(2, 18, 5, stride=2, padding=2)
        self.second = torch.nn.Conv1d(18, 12, 3, dilation=2, groups=6, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x).relu()
        return y, torch.tanh(self.second(y))


def test_one_dimension_is_a_height_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Signals().eval()
    made = capture(module, (torch.randn(2, 2, 31),))
    assert lowered(made, tmp_path).facts["tvm-default-schedules"] == []
    assert error(module, tmp_path, torch.randn(3, 2, 31)) < 1


# -- one function ---------------------------------------------------------------------------------


def convolved(constants: Convolution, vectors: int, data: Array, weight: Array) -> Array:
    """The convolution alone and its packing: float32[n, O/16, H, W, 16]; memory begins as NaN."""
    import tvm
    from tvm import s_tir, te

    def nan(tensor: Any) -> Any:
        return tvm.runtime.tensor(np.full([int(v) for v in tensor.shape], np.nan, np.float32))

    given_data = te.placeholder(data.shape, name="data")
    given_weight = te.placeholder(weight.shape, name="weight")
    packed = pack(constants, given_weight)
    held = te.placeholder(packed.shape, name="packed")
    result = convolve(constants, vectors)(given_data, held)
    schedule = s_tir.Schedule(te.create_prim_func([given_data, held, result]))
    schedule_convolution(schedule, schedule.get_sblock(ACCUMULATE))
    module = schedule.mod
    module["pack"] = te.create_prim_func([given_weight, packed]).with_attr("global_symbol", "pack")
    made = tvm.compile(module, target=host_target())
    weights, sums = nan(packed), nan(result)
    made["pack"](tvm.runtime.tensor(weight), weights)
    made["main"](tvm.runtime.tensor(data), weights, sums)
    return np.asarray(sums.numpy())


def blocked(data: Array) -> Array:
    """[n, C, H, W] as [n, C/16, H, W, 16], NaN behind the last channel."""
    n, channels, height, width = data.shape
    whole = np.full((n, -(-channels // 16) * 16, height, width), np.nan, np.float32)
    whole[:, :channels] = data
    lanes = whole.reshape(n, -1, 16, height, width).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(lanes)


@settings(max_examples=24, deadline=None)
@given(
    drawn=convolutions(),
    size=st.tuples(st.integers(7, 9), st.sampled_from([7, 13, 16, 29, 30])),
    vectors=st.sampled_from([6, 16]),
    plain=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_of_whole_numbers_are_exact(
    drawn: Convolution, size: tuple[int, int], vectors: int, plain: bool, seed: int
) -> None:
    constants = replace(drawn, quad=1)
    generator = np.random.default_rng(seed)
    data = generator.integers(-8, 9, (2, constants.inputs, *size)).astype(np.float32)
    shape = (constants.outputs, constants.inputs // constants.groups, *constants.kernel)
    weight = generator.integers(-8, 9, shape).astype(np.float32)
    held = data if plain and not constants.is_depthwise else blocked(data)
    expected = sums_reference(constants, data, weight, 0)
    lanes = convolved(constants, vectors, held, weight).transpose(0, 1, 4, 2, 3)
    found = lanes.reshape(2, -1, *expected.shape[2:])[:, : constants.outputs]
    assert np.array_equal(found, expected)
    # The control: weights that differ by one are told apart, in their own channel alone.
    weight[-1] += 1
    differing = (found != sums_reference(constants, data, weight, 0)).any((0, 2, 3))
    assert differing[-1]
    assert not differing[:-1].any()


@pytest.mark.parametrize("width", [13, 29, 31])
def test_every_element_is_written(width: int) -> None:
    """Sums of ones over ones count the window, and lanes behind the last channel are zeros."""
    constants = Convolution(3, 20, 1, (3, 2), (1, 1), (1, 1), (0, 0, 0, 0))
    ones = np.ones((2, 3, 5, width), np.float32), np.ones((20, 3, 3, 2), np.float32)
    result = convolved(constants, 16, *ones)
    lanes = result[:, 1, :, :, 4:]
    assert np.array_equal(result[:, 0], np.full((2, 3, width - 1, 16), 18))
    assert np.array_equal(lanes, np.zeros_like(lanes))


# -- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "columns", "expected"),
    [
        (4, 56, Tile(2, 8)),
        (16, 14, Tile(2, 7)),
        (32, 7, Tile(2, 7)),
        (1, 28, Tile(1, 14)),
        (3, 13, Tile(1, 13)),
        (8, 1, Tile(8, 1)),
    ],
)
def test_tiles_fit_into_the_registers_of_avx512(
    blocks: int, columns: int, expected: Tile
) -> None:
    assert tile(blocks, columns, 16) == expected


@pytest.mark.parametrize(
    ("blocks", "columns", "expected"), [(4, 56, Tile(1, 6)), (32, 7, Tile(2, 2))]
)
def test_tiles_fit_into_the_registers_of_avx2(blocks: int, columns: int, expected: Tile) -> None:
    """Sixteen registers: two a vector of sums, two a vector of weights, one for the data."""
    found = tile(blocks, columns, accumulators({"avx2"}.__contains__))
    assert 2 * found.blocks * (found.columns + 1) < 16
    assert found == expected


@given(blocks=st.integers(1, 130), columns=st.integers(1, 300), vectors=st.integers(1, 28))
def test_every_tile_fits(blocks: int, columns: int, vectors: int) -> None:
    found = tile(blocks, columns, vectors)
    assert blocks % found.blocks == 0
    assert found.blocks * found.columns <= vectors


@given(groups=st.integers(1, 40), inputs=st.integers(1, 9), outputs=st.integers(1, 40))
def test_a_block_of_outputs_reads_the_channels_of_its_groups(
    groups: int, inputs: int, outputs: int
) -> None:
    one = (1, 1)
    made = Convolution(groups * inputs, groups * outputs, groups, one, one, one, (0, 0, 0, 0))
    for channel in range(made.outputs):
        first = made.first_channel(channel // 16)
        read = range(first, first + made.depth)
        own = channel // outputs * inputs
        assert {own, own + inputs - 1} <= set(read)
        assert read.stop <= made.inputs
        assert first % made.step == made.depth % made.step == 0

"""Convolutions on bytes: sums equal an integer reference bit for bit, whatever shape is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import has_dots, host_target
from pruna_ir.backends.tvm_bytes import Grid, dequantize, is_exact, quantize, quantize_words
from pruna_ir.backends.tvm_convolutions import (
    ACCUMULATE,
    Convolution,
    convolve,
    pack,
    schedule_convolution,
)
from pruna_ir.backends.tvm_dot import INT8, multiplied, with_dots
from pruna_ir.capture import capture
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.lowering import LoadOptions
from pruna_ir.transform import Context

Array = np.ndarray[Any, Any]
POISON = 0x7B7B7B7B


NEEDS_DOTS = pytest.mark.skipif(
    not has_dots(host_target()), reason="the processor has no AVX512-VNNI"
)
PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    """Groups, odd channels, depthwise ones among them; any window, stride, dilation, padding."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 8, 17]))
    inputs, outputs = draw(st.sampled_from([1, 1, 2, 5, 8, 16, 21])), draw(st.integers(1, 19))
    if draw(st.booleans()) and groups > 1:
        inputs = outputs = 1
    return Convolution(
        groups * inputs, groups * outputs, groups, draw(PAIRS), draw(PAIRS), draw(PAIRS),
        draw(st.tuples(*[st.integers(0, 3)] * 4)), INT8.depth,
    )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A convolution on plain bytes [n, C, H, W], beginning with poisoned memory."""

    constants: Convolution
    packing: Any
    function: Any
    packed: tuple[int, ...]
    result: tuple[int, ...]

    @staticmethod
    def of(constants: Convolution, shape: tuple[int, ...], zero: int) -> Compiled:
        """Compiled for blocked data of a shape, padded with ``zero``."""
        import tvm
        from tvm import s_tir, te

        inputs = constants.inputs // constants.groups
        data = te.placeholder(shape, "uint8", name="data")
        weight = te.placeholder((constants.outputs, inputs, *constants.kernel), "int8", "weight")
        packed = pack(constants, weight)
        held = te.placeholder(packed.shape, "int32", name="packed")
        result = convolve(constants, 16, zero=zero)(data, held)
        schedule = s_tir.Schedule(te.create_prim_func([data, held, result]))
        schedule_convolution(schedule, schedule.get_sblock(ACCUMULATE))
        function = with_dots(schedule.mod["main"])
        assert multiplied(function) == "int8"
        packing = tvm.compile(te.create_prim_func([weight, packed]), target=host_target())
        made = tvm.compile(tvm.IRModule({"main": function}), target=host_target())
        sizes = (tuple(int(v) for v in t.shape) for t in (packed, result))
        return Compiled(constants, packing, made, *sizes)

    def __call__(self, data: Array, weight: Array) -> Array:
        """The sums, int32[n, O, H, W]."""
        import tvm

        packed = tvm.runtime.tensor(np.full(self.packed, POISON, np.int32))
        result = tvm.runtime.tensor(np.full(self.result, POISON, np.int32))
        self.packing(tvm.runtime.tensor(weight), packed)
        self.function["main"](tvm.runtime.tensor(data), packed, result)
        plain = result.numpy().transpose(0, 1, 4, 2, 3)
        n, blocks, lanes, height, width = plain.shape
        whole = plain.reshape(n, blocks * lanes, height, width)
        return np.asarray(whole[:, : self.constants.outputs])


def sums_reference(constants: Convolution, data: Array, weight: Array, zero: int) -> Array:
    """The sums in float64, which holds them exactly."""
    top, left, bottom, right = constants.padding
    plain = torch.from_numpy(data).double()
    padded = torch.nn.functional.pad(plain, (left, right, top, bottom), value=zero)
    made = torch.nn.functional.conv2d(
        padded, torch.from_numpy(weight).double(), None, constants.strides, 0,
        constants.dilation, constants.groups,
    )  # fmt: skip
    return np.asarray(made.numpy().astype(np.int64))


def blocked(data: Array, generator: np.random.Generator) -> Array:
    """[n, C, H, W] as [n, C/16, H, W, 16], with anything behind the last channel."""
    n, channels, height, width = data.shape
    blocks = -(-channels // 16)
    whole = generator.integers(0, 256, (n, blocks * 16, height, width)).astype(np.uint8)
    whole[:, :channels] = data
    lanes = whole.reshape(n, blocks, 16, height, width).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(lanes)


@NEEDS_DOTS
@settings(max_examples=16, deadline=None)
@given(
    constants=convolutions(),
    size=st.tuples(st.integers(7, 9), st.sampled_from([7, 13, 16, 30])),
    batch=st.integers(1, 5),
    zero=st.sampled_from([0, 3, 255]),
    seed=st.integers(0, 2**16),
)
def test_sums_are_exact(
    constants: Convolution, size: tuple[int, int], batch: int, zero: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (batch, constants.inputs, *size)).astype(np.uint8)
    shape = (constants.outputs, constants.inputs // constants.groups, *constants.kernel)
    weight = generator.choice([-128, -1, 0, 5, 127], shape).astype(np.int8)
    held = blocked(data, generator)
    run = Compiled.of(constants, held.shape, zero)
    expected = sums_reference(constants, data, weight, zero)
    assert np.array_equal(run(held, weight), expected)
    # The control: one weight that differs by one is told apart, in its own channel alone.
    weight[-1, -1, 0, 0] ^= 1
    differing = (run(held, weight) != expected).any((0, 2, 3))
    assert not differing[:-1].any()
    assert differing[-1] or zero == 0


def test_sums_that_do_not_fit_into_32_bits_are_told() -> None:
    one = (1, 1)
    wide = Convolution(2**15, 16, 1, (3, 3), one, one, (0, 0, 0, 0))
    assert not is_exact(wide)
    assert is_exact(Convolution(4096, 16, 1, (3, 3), one, one, (0, 0, 0, 0)))


# -- quantisers -----------------------------------------------------------------------------------


def computed(function: Any, *arrays: Array) -> Array:
    """The result of a computation on arrays; its memory is poisoned before."""
    import tvm
    from tvm import te

    inputs = [te.placeholder(a.shape, a.dtype.name, name=f"x{i}") for i, a in enumerate(arrays)]
    result = function(*inputs)
    made = tvm.compile(te.create_prim_func([*inputs, result]), target=host_target())
    shape = tuple(int(v) for v in result.shape)
    out = np.full(shape, 0x7B, np.dtype(str(result.dtype)))
    held = tvm.runtime.tensor(out)
    made["main"](*map(tvm.runtime.tensor, arrays), held)
    return np.asarray(held.numpy())


@given(exponent=st.integers(-9, 6), zero=st.integers(0, 255))
@settings(max_examples=6, deadline=None)
def test_rounding_is_the_operators_own(exponent: int, zero: int) -> None:
    """Halves, both ends of the grid, what lies beyond, infinities."""
    grid = Grid(2.0**exponent, zero)
    steps = np.concatenate([np.arange(-600, 600) / 2, [1e9, -1e9, np.inf, -np.inf, 0.49999997]])
    x = (steps * grid.scale).astype(np.float32)
    scale, point = torch.tensor(grid.scale), torch.tensor(zero, dtype=torch.int32)
    expected = fake_quant(torch.from_numpy(x), scale, point, None, 0, 255).numpy()
    found = computed(quantize, x, *grid.inverse)
    assert np.array_equal(computed(dequantize, found, *grid.numbers), expected)


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_words_hold_four_channels(channels: int) -> None:
    grid = Grid(0.5, 7)
    x = np.random.default_rng(0).normal(0, 40, (2, channels, 3, 5)).astype(np.float32)
    words = computed(quantize_words, x, *grid.inverse)
    held = words.view(np.uint8).reshape(2, -1, 3, 5, 4).transpose(0, 1, 4, 2, 3)
    plain = held.reshape(2, -1, 3, 5)
    assert np.array_equal(plain[:, :channels], computed(quantize, x, *grid.inverse))
    assert (plain[:, channels:] == 0).all()
    assert grid.word == int(np.array([7] * 4, np.uint8).view(np.int32)[0])


# -- networks -------------------------------------------------------------------------------------


class Quantiser(torch.nn.Module):
    """A grid whose scale is a power of two."""

    def __init__(self, exponent: int, zero: int, qmin: int, qmax: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0**exponent))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.int32))
        self.ends = qmin, qmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = fake_quant(x, self.scale, self.zero, None, *self.ends)
        return made


class Layer(torch.nn.Module):
    """A convolution with a quantised weight, per channel or not, and a bias that is exact."""

    def __init__(self, conv: torch.nn.Conv2d, *, channels: bool, point: int = 0) -> None:
        super().__init__()
        self.conv = conv
        count = (conv.out_channels,) if channels else ()
        self.register_buffer("scale", 2.0 ** -torch.randint(4, 7, count).float())
        self.register_buffer("zero", torch.full(count, point, dtype=torch.int32))
        self.axis = 0 if channels else None
        if conv.bias is not None:
            conv.bias.data = torch.round(conv.bias.data * 64) / 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = fake_quant(self.conv.weight, self.scale, self.zero, self.axis, -127, 127)
        made: torch.Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        return made


class Chain(torch.nn.Module):
    """Unsigned, signed and narrow grids, a max pool of bytes, a residual add, odd channels."""

    def __init__(self, point: int = 0) -> None:
        super().__init__()
        conv = torch.nn.Conv2d
        self.input = Quantiser(-4, 128, 0, 255)
        self.stem = Layer(conv(3, 21, 3, padding=1), channels=True)
        self.first = Quantiser(-4, 0, 0, 255)
        self.wide = Layer(conv(21, 24, (1, 3), padding=(0, 1), bias=False), channels=False)
        self.signed = Quantiser(-3, -3, -128, 127)
        self.depthwise = Layer(conv(24, 24, 3, padding=1, groups=24), channels=True)
        self.narrow = Quantiser(-3, 0, -8, 7)
        self.grouped = Layer(conv(24, 24, 3, padding=1, groups=3), channels=True, point=point)
        self.last = Quantiser(-3, 100, 0, 255)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pool = torch.nn.functional.max_pool2d
        y = self.signed(self.wide(pool(self.first(self.stem(self.input(x)).relu()), 3, 2, 1)))
        y = self.narrow(self.depthwise(y)) + y
        mixed = self.last(self.grouped(self.last(y)) + y)
        return mixed, mixed.mean((2, 3))


def runner(module: torch.nn.Module, x: torch.Tensor, folder: Path, cpu: str = "") -> Any:
    made = capture(module.eval(), (x,))
    assert ToTvm(cpu).lower(made, folder, Context()).facts["tvm-default-schedules"] == []
    return ToTvm(cpu).load(folder, LoadOptions(threads=2))


def convolution_precisions(loaded: Any) -> list[str]:
    return [row.precision for row in loaded.audit() if row.kind == "conv"]


@NEEDS_DOTS
def test_a_chain_of_layers_computes_torchs_bits() -> None:
    torch.manual_seed(0)
    module = Chain()
    with TemporaryDirectory() as folder:
        loaded = runner(module, torch.randn(2, 3, 16, 13), Path(folder))
        assert convolution_precisions(loaded) == ["int8"] * 4
        x = 6 * torch.randn(5, 3, 16, 13)
        with torch.no_grad():
            expected, mean = (t.numpy() for t in module.double()(x.double()))
        found, pooled = loaded.run([x.numpy()])
        assert np.array_equal(found, expected)
        np.testing.assert_allclose(pooled, mean, rtol=0, atol=1e-5)
        # The control: half a step of the first grid, added to all, is seen.
        assert not np.array_equal(loaded.run([(x + 2**-5).numpy()])[0], expected)


@NEEDS_DOTS
def test_weights_with_a_zero_point_are_multiplied_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Chain(point=2)
    x = torch.randn(2, 3, 16, 13)
    loaded = runner(module, x, tmp_path)
    assert convolution_precisions(loaded) == ["int8", "int8", "int8", "float32"]
    with torch.no_grad():
        expected = module(x)[0].numpy()
    assert np.array_equal(loaded.run([x.numpy()])[0], expected)


def test_a_processor_without_dot_products_multiplies_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Chain(), torch.randn(2, 3, 16, 13)
    with pytest.warns(RuntimeWarning, match=r"float32: x86-64-v3 has no AVX512-VNNI"):
        loaded = runner(module, x, tmp_path, "x86-64-v3")
    assert convolution_precisions(loaded) == ["float32"] * 4
    with torch.no_grad():
        expected = module(x)[0].numpy()
    assert np.array_equal(loaded.run([x.numpy()])[0], expected)

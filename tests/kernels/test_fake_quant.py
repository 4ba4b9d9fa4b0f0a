"""fake_quant against its reference, exact rational arithmetic, and the LSQ formulas."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.kernels import dense_pieces
from pruna_ir.kernels.fake_quant import (
    KERNEL,
    fake_quant,
    fake_quant_gradients,
    fake_quant_reference,
)
from tests.kernels.poison import poisoned

TINY = torch.finfo(torch.float32).tiny
OP = torch.ops.pruna.fake_quant.default


def exact(x: float, scale: float, zero: int, qmin: int, qmax: int) -> Fraction:
    """The operator in rational arithmetic: Python's round() of a Fraction goes half to even."""
    level = round(Fraction(x) / Fraction(scale)) + zero
    return (min(max(level, qmin), qmax) - zero) * Fraction(scale)


grids = st.sampled_from([(0, 255), (-128, 127), (-127, 127), (-8, 7), (0, 1)])
finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@settings(max_examples=150)
@given(
    st.integers(-600, 600), st.integers(-40, 20), st.integers(-128, 255), grids, st.booleans()
)
def test_ties_go_to_even_and_saturate_exactly(
    half_steps: int, exponent: int, zero: int, grid: tuple[int, int], tensor64: bool
) -> None:
    """At power-of-two scales every multiple of half a step is exact, ties included."""
    qmin, qmax = grid
    zero = min(max(zero, qmin), qmax)
    scale = 2.0**exponent
    dtype = torch.float64 if tensor64 else torch.float32
    x = torch.tensor(half_steps * scale / 2, dtype=dtype)
    parameters = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    y = fake_quant(x, *parameters, None, qmin, qmax)
    assert y.dtype == dtype
    assert Fraction(float(y)) == exact(float(x), scale, zero, qmin, qmax)


@settings(max_examples=150)
@given(finite, st.floats(2**-20, 1e3, width=32), st.integers(-128, 255), grids)
def test_in_float64_it_is_the_exact_interpreter(
    value: float, scale: float, zero: int, grid: tuple[int, int]
) -> None:
    qmin, qmax = grid
    zero = min(max(zero, qmin), qmax)
    y = fake_quant(
        torch.tensor(value, dtype=torch.float64), torch.tensor(scale),
        torch.tensor(zero, dtype=torch.int32), None, qmin, qmax,
    )  # fmt: skip
    distance = Fraction(value) / Fraction(scale)
    near_tie = abs(abs(distance - round(distance)) - Fraction(1, 2)) < Fraction(1, 10**9)
    expected = exact(value, scale, zero, qmin, qmax)
    assert near_tie or Fraction(float(y)) == expected


def test_saturates_at_infinity_and_keeps_nan() -> None:
    scale, zero = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e38])
    y = fake_quant(x, scale, zero, None, 0, 7)
    assert y[0] == y[3] == 2.0
    assert y[1] == -1.5
    assert torch.isnan(y[2])


def test_smallest_normal_scale_works_and_zero_is_exact() -> None:
    scale, zero = torch.tensor(TINY), torch.tensor(0, dtype=torch.int32)
    x = torch.tensor([0.0, -0.0, TINY, 5 * TINY, 1.0])
    y = fake_quant(x, scale, zero, None, -128, 127)
    assert y.tolist() == [0.0, 0.0, TINY, 5 * TINY, 127 * TINY]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_channel_has_its_own_grid(axis: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=dtype)
    channels = x.shape[axis]
    scale = torch.rand(channels) / 10 + 0.01
    zero = torch.randint(-5, 6, (channels,), dtype=torch.int32)
    y = fake_quant(x, scale, zero, axis, -16, 15)
    assert torch.equal(y, fake_quant_reference(x, scale.to(dtype), zero, axis, -16, 15))
    for channel in range(channels):
        alone = fake_quant(x.select(axis, channel), scale[channel], zero[channel], None, -16, 15)
        assert torch.equal(y.select(axis, channel), alone)
    wrong = fake_quant(x, scale.flip(0), zero, axis, -16, 15)
    assert not torch.equal(y, wrong)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), max_size=4), st.integers(-4, 3), st.booleans(), grids,
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference_on_any_shape(
    shape: list[int], axis: int, by_channel: bool, grid: tuple[int, int], strided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    by_channel = by_channel and -len(shape) <= axis < len(shape)
    x = torch.randn(shape, generator=generator) * 5
    x = x.transpose(0, -1) if strided and len(shape) > 1 else x
    channels = [x.shape[axis]] if by_channel else []
    scale = torch.rand(channels, generator=generator) + 0.01
    zero = torch.randint(*grid, channels, generator=generator, dtype=torch.int32)
    arguments = (x, scale, zero, axis if by_channel else None, *grid)
    expected = fake_quant_reference(*arguments)
    with poisoned():
        found = fake_quant(*arguments)
    assert found.shape == x.shape
    assert torch.equal(found, expected)


def test_keeps_layout_and_reduced_precision_dtypes() -> None:
    scale, zero = torch.tensor(0.1), torch.tensor(128, dtype=torch.int32)
    x = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)
    assert fake_quant(x, scale, zero, None, 0, 255).stride() == x.stride()
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype)
        y = fake_quant(low, scale, zero, None, 0, 255)
        assert torch.equal(y, fake_quant(low.float(), scale, zero, None, 0, 255).to(dtype))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([None, 0, 1, -1]), grids)
def test_gradients_are_those_of_lsq(seed: int, axis: int | None, grid: tuple[int, int]) -> None:
    """Esser et al., equations 3 and 5, written with loops over the elements."""
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = grid
    x = torch.randn(4, 4, generator=generator, dtype=torch.float64) * 3
    shape = [] if axis is None else [4]
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.2 + 0.01
    zero = torch.randint(qmin, qmax + 1, shape, generator=generator, dtype=torch.int32)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    scale.requires_grad_()
    (fake_quant(x, scale, zero, axis, qmin, qmax) * weight).sum().backward()
    to_x, to_scale = torch.zeros(4, 4, dtype=torch.float64), torch.zeros_like(scale)
    for i in range(4):
        for j in range(4):
            channel = () if axis is None else ([i, j][axis],)
            step, z = float(scale[channel].detach()), int(zero[channel])
            v, g = float(x[i, j].detach()) / step, float(weight[i, j])
            low, high = qmin - z, qmax - z
            inside = low < v < high
            to_x[i, j] = g if inside else 0.0
            to_scale[channel] += g * (round(v) - v if inside else high if v >= high else low)
    torch.testing.assert_close(x.grad, to_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale.grad, to_scale, rtol=1e-10, atol=1e-10)


def test_scale_gradient_is_the_slope_between_rounding_steps() -> None:
    """A small change of the scale moves y by the saturated level alone: -Q_N or Q_P."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int32)
    x = torch.tensor([9.0, -9.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(fake_quant(x, scale, zero, None, -8, 7)[0], scale)
    assert gradient == 7.0


def test_passes_torchs_own_operator_checks() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(4, dtype=torch.float64) + 0.1).requires_grad_()
    zero = torch.tensor([0, 1, -3, 2], dtype=torch.int32)
    torch.library.opcheck(OP, (x, scale, zero, 1, -8, 7))
    torch.library.opcheck(OP, (x, scale[0].detach(), zero[0], None, -8, 7))


@pytest.mark.parametrize(
    ("scale", "zero", "axis", "fact"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int32), None, "without axis"),
        (torch.ones(3), torch.zeros(3, dtype=torch.int32), 0, "along axis 0"),
        (torch.ones(4), torch.zeros(4, dtype=torch.int32), 2, "axis 2 of a 2-d"),
        (torch.ones(4), torch.zeros((), dtype=torch.int32), 0, "zero_point"),
    ],
)
def test_refuses_shapes_that_do_not_fit(
    scale: torch.Tensor, zero: torch.Tensor, axis: int | None, fact: str
) -> None:
    with pytest.raises(RuntimeError, match=fact):
        fake_quant(torch.ones(4, 5), scale, zero, axis, 0, 255)


def test_refuses_integer_tensors() -> None:
    with pytest.raises(RuntimeError, match="float tensor"):
        fake_quant(
            torch.ones(4, dtype=torch.int64), torch.tensor(1.0),
            torch.tensor(0, dtype=torch.int32), None, 0, 255,
        )  # fmt: skip


class Quantised(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("zero_point", torch.tensor(3, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OP(x, self.scale, self.zero_point, None, 0, 255)


def test_survives_export_and_export_again_with_dynamic_batch() -> None:
    module, dynamic = Quantised(), ({0: torch.export.Dim.AUTO},)
    once = torch.export.export(module, (torch.randn(2, 3),), dynamic_shapes=dynamic)
    again = torch.export.export(once.module(), (torch.randn(4, 3),), dynamic_shapes=dynamic)
    assert [n.target for n in again.graph.nodes if n.op == "call_function"] == [OP]
    x = torch.randn(7, 3)
    assert torch.equal(again.module()(x), module(x))


def test_kernel_is_a_primitive() -> None:
    assert KERNEL.primitive
    assert KERNEL.op is OP


# -- one scale over a dense tensor: chunks and edges ---------------------------------------------


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.dtype is torch.float32 else torch.int64)


def plain(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, qmin: int, qmax: int
) -> torch.Tensor:
    return fake_quant_reference(x, scale.to(x.dtype), zero, None, qmin, qmax)


layouts = st.sampled_from(["contiguous", "channels_last", "strided", "permuted"])


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x.transpose(1, 3).contiguous().transpose(1, 3) if layout == "permuted" else x


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), grids, layouts, st.sampled_from([torch.float32, torch.float64]))
def test_every_layout_gives_the_same_bits(
    seed: int, grid: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = grid
    x = torch.randn(2, 3, 5, 4, generator=generator, dtype=dtype)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, float("inf"), -1e38], dtype=dtype)
    zero = torch.randint(qmin, qmax + 1, (), generator=generator, dtype=torch.int32)
    scale = torch.rand((), generator=generator) * 0.1 + 1e-3
    y = fake_quant(laid_out(x, layout), scale, zero, None, qmin, qmax)
    assert torch.equal(bits(y), bits(plain(x, scale, zero, qmin, qmax)))


def test_tensors_of_many_chunks_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_pieces, "CHUNK", 7)
    torch.manual_seed(0)
    x, grad = torch.randn(3, 11), torch.randn(3, 11)
    scale, zero = torch.tensor(0.3), torch.tensor(1, dtype=torch.int32)
    y = fake_quant(x, scale, zero, None, -4, 3)
    assert torch.equal(y, plain(x, scale, zero, -4, 3))
    with torch.no_grad():
        fast = fake_quant_gradients(grad, x, y, scale, zero, None, -4, 3)
    slow = fake_quant_gradients(grad, x, y, scale, zero, None, -4, 3)  # grad mode: no chunks
    assert torch.equal(fast[0], slow[0])
    torch.testing.assert_close(fast[1], slow[1])


@pytest.mark.parametrize(("shape", "axis"), [((11, 3), 0), ((3, 11), 1), ((5, 2, 3, 3), -4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_are_the_same_a_few_channels_at_a_time(
    shape: tuple[int, ...], axis: int, layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dense_pieces, "CHUNK", 7)
    torch.manual_seed(0)
    x, grad = torch.randn(shape), torch.randn(shape)
    if x.dim() == 4:
        x, grad = x.to(memory_format=layout), grad.to(memory_format=layout)
    channels = shape[axis]
    scale, zero = torch.rand(channels) * 0.3 + 0.1, torch.zeros(channels, dtype=torch.int32)
    y = fake_quant(x, scale, zero, axis, -4, 3)
    with torch.no_grad():
        fast = fake_quant_gradients(grad, x, y, scale, zero, axis, -4, 3)
    slow = fake_quant_gradients(grad, x, y, scale, zero, axis, -4, 3)  # grad mode: all at once
    doubles = fake_quant(x.double(), scale.double(), zero, axis, -4, 3)
    torch.testing.assert_close(y, doubles.float())
    assert torch.equal(fast[0], slow[0])
    torch.testing.assert_close(fast[1], slow[1])


@settings(max_examples=150, deadline=None)
@given(
    st.floats(2**-100, 2.0**100, width=32), st.integers(-128, 255), grids,
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_edges_clip_exactly_where_the_quotient_does(
    scale: float, zero: int, grid: tuple[int, int], dtype: torch.dtype
) -> None:
    """Values within a few units in the last place of both edges, and the edges themselves."""
    qmin, qmax = grid
    zero = min(max(zero, qmin), qmax)
    step, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    ends = torch.tensor([qmin - zero, qmax - zero], dtype=dtype) * step.to(dtype)
    kind = torch.int32 if dtype is torch.float32 else torch.int64
    offsets = torch.arange(-6, 7, dtype=kind)
    x = torch.cat([(bits(end) + offsets).view(dtype) for end in ends if end])
    x = torch.cat([x, torch.tensor([0.0, float("inf"), float("-inf")], dtype=dtype)])
    v = x / step.to(dtype)
    inside = (v > qmin - zero) & (v < qmax - zero)
    with torch.no_grad():
        to_x, _ = fake_quant_gradients(
            torch.ones_like(x), x, fake_quant(x, step, z, None, qmin, qmax), step, z, None,
            qmin, qmax, wanted=(True, False),
        )  # fmt: skip
    assert torch.equal(to_x, inside.to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), grids, layouts, st.booleans())
def test_one_scale_has_the_gradients_of_the_formulas(
    seed: int, grid: tuple[int, int], layout: str, rounding: bool
) -> None:
    """Multiples of half a step, so that ties and clamps are hit, and values between them."""
    generator = torch.Generator().manual_seed(seed)
    qmin, qmax = grid
    scale = 2.0 ** float(torch.randint(-8, 3, (), generator=generator))
    zero = int(torch.randint(qmin, qmax + 1, (), generator=generator))
    halves = torch.randint(2 * qmin - 5, 2 * qmax + 6, (2, 3, 5, 4), generator=generator)
    v = halves.double() / 2 - zero
    v[1] += torch.rand(3, 5, 4, generator=generator, dtype=torch.float64)
    x, grad = laid_out(v * scale, layout), torch.randn(2, 3, 5, 4, generator=generator).double()
    step, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    y = fake_quant(x, step, z, None, qmin, qmax)
    with torch.no_grad():
        to_x, to_scale = fake_quant_gradients(
            laid_out(grad, layout), x, y, step, z, None, qmin, qmax, rounding=rounding
        )
    low, high = qmin - zero, qmax - zero
    expected = 0.0
    for value, g, got in zip(v.flatten().tolist(), grad.flatten().tolist(), to_x.flatten(),
                             strict=True):  # fmt: skip
        inside = low < value < high
        assert float(got) == (g if inside else 0.0)
        slope = round(value) - value if rounding else 0.0
        expected += g * (slope if inside else high if value >= high else low)
    assert float(to_scale) == pytest.approx(expected, rel=1e-6, abs=1e-6 * (qmax - qmin))


def test_second_derivatives_are_those_of_the_slope_that_is_flat() -> None:
    x = torch.tensor([0.3, 5.0], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([2.0, 2.0], dtype=torch.float64, requires_grad=True)
    y = fake_quant(x, torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), None, -4, 3)
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert second.tolist() == [1.0, 0.0]

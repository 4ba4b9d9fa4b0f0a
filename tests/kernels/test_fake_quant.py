"""fake_quant against its reference, exact rational arithmetic, and the LSQ formulas."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.kernels.fake_quant import KERNEL, fake_quant, fake_quant_reference

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

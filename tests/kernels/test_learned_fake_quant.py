"""learned_fake_quant: fake_quant's values, and the gradients of LSQ+ and PACT."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.kernels.learned_fake_quant import learned_fake_quant, zero_point_of

grids = st.sampled_from([(0, 255), (-128, 127), (0, 15), (-8, 7), (0, 1)])


def drawn(
    seed: int, grid: tuple[int, int], axis: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, gradient, scale and an offset whose zero point lies in the grid."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(4, 4, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    shape = [] if axis is None else [4]
    scale = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.2 + 0.01
    levels = torch.rand(shape, generator=generator, dtype=torch.float64)
    return x, grad, scale, -(grid[0] + levels * (grid[1] - grid[0])) * scale


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), grids, st.sampled_from([None, 0, -1]))
def test_an_offset_learns_as_lsq_plus_has_it(
    seed: int, grid: tuple[int, int], axis: int | None
) -> None:
    """The zero point's gradient is -scale per clipped value; offset and scale follow from it."""
    x, grad, scale, offset = drawn(seed, grid, axis)
    for tensor in (x, scale, offset):
        tensor.requires_grad_()
    zero = zero_point_of(scale, offset, *grid)
    y = learned_fake_quant(x, scale, zero, axis, *grid, offset=offset)
    assert torch.equal(y, fake_quant(x.detach(), scale.detach(), zero, axis, *grid))
    (y * grad).sum().backward()
    to_offset, to_scale = torch.zeros_like(scale), torch.zeros_like(scale)
    for i in range(4):
        for j in range(4):
            channel = () if axis is None else ([i, j][axis],)
            step, z = float(scale[channel].detach()), int(zero[channel])
            shift, g = float(offset[channel].detach()), float(grad[i, j])
            v, low, high = float(x[i, j].detach()) / step, grid[0] - z, grid[1] - z
            if low < v < high:
                to_scale[channel] += g * (round(v) - v)
            else:
                to_offset[channel] += g  # dy/dz = -scale, dz/doffset = -1 / scale
                to_scale[channel] += g * ((high if v >= high else low) - shift / step)
    torch.testing.assert_close(offset.grad, to_offset, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scale.grad, to_scale, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), grids, st.sampled_from([None, 0, -1]))
def test_clipping_learns_as_pact_has_it(
    seed: int, grid: tuple[int, int], axis: int | None
) -> None:
    """With a = scale * level: dL/da is the sum of the gradients of what is clipped there."""
    x, grad, scale, offset = drawn(seed, grid, axis)
    scale.requires_grad_()
    zero = zero_point_of(scale, offset, *grid)
    y = learned_fake_quant(x, scale, zero, axis, *grid, rounding=False)
    (y * grad).sum().backward()
    low, high = grid[0] - zero, grid[1] - zero
    shaped = [t if axis is None else t.reshape([4, 1] if axis == 0 else [1, 4])
              for t in (scale.detach(), low, high)]  # fmt: skip
    v = x / shaped[0]
    slope = torch.where(v >= shaped[2], shaped[2], torch.where(v <= shaped[1], shaped[1], 0))
    product = grad * slope
    expected = product.sum() if axis is None else product.sum(1 if axis == 0 else 0)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-9, atol=1e-9)


def test_a_float32_tensor_in_one_scale_learns_the_same() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(3, 50), torch.randn(3, 50)
    found = []
    for dtype in (torch.float32, torch.float64):
        scale = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        offset = torch.tensor(-0.52, dtype=dtype, requires_grad=True)
        values = x.to(dtype).clone().requires_grad_()
        zero = torch.tensor(5, dtype=torch.int32)
        y = learned_fake_quant(values, scale, zero, None, 0, 15, offset=offset)
        (y * grad).sum().backward()
        found.append((values.grad, scale.grad, offset.grad))
    for low, high in zip(*found, strict=True):
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("offset", "expected"), [(0.0, 0), (-0.75, 2), (-1.25, 2), (-1.3, 3), (0.4, 0), (-99.0, 15)]
)
def test_zero_points_are_integers_of_the_grid_with_ties_to_even(
    offset: float, expected: int
) -> None:
    zero = zero_point_of(torch.tensor(0.5), torch.tensor(offset), 0, 15)
    assert zero.dtype == torch.int32
    assert int(zero) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([(0, 255), (0, 15), (0, 1)]),
    st.sampled_from([0.4, 1.0, 6.0]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_a_cap_is_a_clamp_ahead(
    seed: int, grid: tuple[int, int], cap: float, dtype: torch.dtype
) -> None:
    """Values and gradients of relu6 and fake_quant, with the lower bound left to the grid."""
    x, grad, scale, _ = (t.to(dtype) for t in drawn(seed, grid, None))
    zero, results = torch.tensor(0, dtype=torch.int32), []
    x[0, 0], x[0, 1] = cap, 0.0
    for given_cap in (cap, None):
        own, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
        source = own if given_cap else torch.nn.functional.hardtanh(own, 0.0, cap)
        y = learned_fake_quant(source, step, zero, None, *grid, cap=given_cap)
        (y * grad).sum().backward()
        results.append((y.detach(), own.grad, step.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])

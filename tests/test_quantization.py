"""Scales and zero points against exact rational arithmetic; grids; the per-layer description."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.errors import PassError, UsageError
from pruna_ir.quantization import (
    S8_ASYMMETRIC,
    S8_SYMMETRIC,
    S8_WEIGHT,
    SMALLEST_SCALE,
    U8_ASYMMETRIC,
    Grid,
    QuantParameters,
    QuantScheme,
    choose_parameters,
    describe,
)
from tests.networks import conv_net
from tests.quantised import quantised_net

GRIDS = [U8_ASYMMETRIC, S8_ASYMMETRIC, S8_SYMMETRIC, S8_WEIGHT, Grid(-8, 7, symmetric=True)]
grids = st.sampled_from(GRIDS)
bounds = st.floats(-(2.0**127), 2.0**127, allow_nan=False, width=32)


@given(bounds, bounds, grids)
def test_the_range_is_covered_and_zero_is_exact(a: float, b: float, grid: Grid) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    chosen = choose_parameters(min(a, b), max(a, b), grid, "layer")
    scale, zero = Fraction(float(chosen.scale)), int(chosen.zero_point)
    assert grid.qmin <= zero <= grid.qmax
    assert float(chosen.scale) >= SMALLEST_SCALE
    # Zero itself is a level, and both ends are at most half a step (and the rounding of the
    # stored scale) outside of the grid.
    assert chosen.reals(chosen.integers(torch.zeros(1))).item() == 0.0
    slack = scale / 2 + (grid.qmax - grid.qmin) * scale * Fraction(1, 2**23)
    assert (grid.qmin - zero) * scale <= Fraction(low) + slack
    assert (grid.qmax - zero) * scale >= Fraction(high) - slack


@given(bounds, bounds, grids)
def test_the_formula_in_exact_arithmetic(a: float, b: float, grid: Grid) -> None:
    low, high = Fraction(min(a, b, 0.0)), Fraction(max(a, b, 0.0))
    if grid.symmetric:
        wanted = max(low / grid.qmin, high / grid.qmax)
    else:
        wanted = (high - low) / (grid.qmax - grid.qmin)
    chosen = choose_parameters(min(a, b), max(a, b), grid, "layer")
    scale = Fraction(float(chosen.scale))
    if wanted == 0:
        assert scale == 1
    elif wanted < Fraction(SMALLEST_SCALE):
        assert scale == Fraction(SMALLEST_SCALE)
    else:
        assert abs(scale - wanted) <= wanted * Fraction(1, 2**23)
    if not grid.symmetric:
        exact = grid.qmin - low / scale
        assert abs(int(chosen.zero_point) - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
    else:
        assert int(chosen.zero_point) == 0


@given(st.lists(bounds, min_size=1, max_size=9), grids, st.integers(-4, 4))
def test_integers_are_the_nearest_levels(values: list[float], grid: Grid, exponent: int) -> None:
    scale = torch.tensor(2.0**exponent)
    zero = 0 if grid.symmetric else (grid.qmin + grid.qmax) // 2
    chosen = QuantParameters(scale, torch.tensor(zero, dtype=torch.int32), grid)
    found = chosen.integers(torch.tensor(values, dtype=torch.float64)).tolist()
    for value, level in zip(values, found, strict=True):
        nearest = round(Fraction(value) / Fraction(2) ** exponent) + zero
        assert level == min(max(nearest, grid.qmin), grid.qmax)


@pytest.mark.parametrize("grid", GRIDS)
def test_ties_go_to_even(grid: Grid) -> None:
    chosen = QuantParameters(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), grid)
    ties = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert chosen.integers(ties).tolist() == [0, 2, 2, 4]


@given(st.integers(0, 255), st.floats(2.0**-100, 2.0**100, width=32))
def test_integers_and_reals_are_inverse_on_the_grid(level: int, scale: float) -> None:
    zero = torch.tensor(100, dtype=torch.int32)
    chosen = QuantParameters(torch.tensor(scale), zero, U8_ASYMMETRIC)
    q = torch.tensor([level], dtype=torch.int32)
    assert torch.equal(chosen.integers(chosen.reals(q)), q)


@pytest.mark.parametrize("grid", GRIDS)
def test_subnormal_and_zero_ranges(grid: Grid) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    subnormal = 2.0**-149
    assert float(choose_parameters(-subnormal, subnormal, grid, "layer").scale) == smallest
    assert float(choose_parameters(0.0, 0.0, grid, "layer").scale) == 1.0
    assert math.isfinite(1.0 / smallest)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_range_on_one_side_is_widened_to_zero(grid: Grid) -> None:
    above, alone = choose_parameters(2.0, 6.0, grid, "x"), choose_parameters(0.0, 6.0, grid, "x")
    assert float(above.scale) == float(alone.scale)
    assert int(above.zero_point) == int(alone.zero_point)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["low", "high"])
def test_nan_and_infinity_are_refused_by_name(bad: float, side: str) -> None:
    low, high = (bad, 1.0) if side == "low" else (-1.0, bad)
    with pytest.raises(PassError, match=r"block\.conv2: its range holds NaN or infinity"):
        choose_parameters(low, high, U8_ASYMMETRIC, "block.conv2")
    channels = torch.tensor([0.0, low]), torch.tensor([1.0, high])
    with pytest.raises(PassError, match=r"block\.conv2"):
        choose_parameters(*channels, S8_WEIGHT, "block.conv2", axis=0)


def test_empty_and_huge_ranges_are_refused() -> None:
    with pytest.raises(PassError, match="low above high"):
        choose_parameters(1.0, -1.0, U8_ASYMMETRIC, "x")
    with pytest.raises(PassError, match="beyond float32"):
        choose_parameters(0.0, 1e39, U8_ASYMMETRIC, "x")


def test_channels_are_chosen_independently() -> None:
    low, high = torch.tensor([-1.0, -8.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])
    together = choose_parameters(low, high, U8_ASYMMETRIC, "w", axis=1)
    for channel in range(3):
        alone = choose_parameters(low[channel], high[channel], U8_ASYMMETRIC, "w")
        assert together.scale[channel] == alone.scale
        assert together.zero_point[channel] == alone.zero_point
    x = torch.randn(2, 3, 5)
    rows = [together.integers(x)[:, c] for c in range(3)]
    for channel, row in enumerate(rows):
        alone = choose_parameters(low[channel], high[channel], U8_ASYMMETRIC, "w")
        assert torch.equal(row, alone.integers(x[:, channel]))


@pytest.mark.parametrize(
    ("qmin", "qmax", "symmetric"),
    [(1, 5, False), (0, 0, False), (0, 255, True), (0, 10**6, False)],
)
def test_impossible_grids_are_refused(qmin: int, qmax: int, symmetric: bool) -> None:
    with pytest.raises(UsageError, match="grid"):
        Grid(qmin, qmax, symmetric)


def test_grids_know_their_storage() -> None:
    assert [str(grid) for grid in GRIDS[:4]] == [
        "u8[0, 255]", "s8[-128, 127]", "s8[-128, 127]", "s8[-127, 127]",
    ]  # fmt: skip
    assert Grid(-8, 7, symmetric=True).bits == 4
    assert Grid(-300, 300, symmetric=True).dtype is torch.int16


def test_weights_take_symmetric_grids_only() -> None:
    with pytest.raises(UsageError, match="symmetric"):
        QuantScheme(U8_ASYMMETRIC, weight=U8_ASYMMETRIC)


def test_describe_names_every_quantised_operand() -> None:
    rows = describe(quantised_net())
    assert [(row.operator, row.operand) for row in rows if row.operand != "self"] == [
        ("aten.conv2d", "input"), ("aten.conv2d", "weight"),
        ("aten.conv2d", "input"), ("aten.conv2d", "weight"),
        ("aten.linear", "input"), ("aten.linear", "weight"),
    ]  # fmt: skip
    weight = rows[1]
    assert (weight.layer, weight.bits, weight.axis, weight.grid) == (
        "conv2d", 8, 0, "s8[-127, 127]",
    )  # fmt: skip
    assert 0 < weight.scale[0] < weight.scale[1]
    assert describe(conv_net()) == []

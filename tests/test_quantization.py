"""Scales and zero points against exact rational arithmetic; grids; the per-layer description."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import PassError, UsageError
from pruna_ir.passes.weight_ranges import weight_parameters
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
    fake_quant_op,
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


@given(bounds, bounds, grids)
def test_powers_of_two_are_the_least_that_cover_the_range(a: float, b: float, grid: Grid) -> None:
    low, high = Fraction(min(a, b, 0.0)), Fraction(max(a, b, 0.0))
    if grid.symmetric:
        wanted = max(low / grid.qmin, high / grid.qmax)
    else:
        wanted = (high - low) / (grid.qmax - grid.qmin)
    chosen = choose_parameters(min(a, b), max(a, b), replace(grid, powers=True), "layer")
    scale = Fraction(float(chosen.scale))
    assert scale.numerator & (scale.numerator - 1) == 0
    assert scale.denominator & (scale.denominator - 1) == 0
    if wanted == 0:
        assert scale == 1
    elif wanted > Fraction(SMALLEST_SCALE):
        # float64 divides once before: a quotient just above a power may round down to it.
        assert wanted * (1 - Fraction(1, 2**50)) <= scale < 2 * wanted * (1 + Fraction(1, 2**50))
    zero = int(chosen.zero_point)
    assert grid.qmin <= zero <= grid.qmax
    assert zero % 2 == 0
    assert (grid.qmin - zero) * scale <= low + scale
    assert (grid.qmax - zero) * scale >= high - scale


@given(st.integers(-600, 600), grids, bounds, bounds)
def test_halves_round_alike_before_and_after_the_zero_point(
    halves: int, grid: Grid, a: float, b: float
) -> None:
    chosen = choose_parameters(min(a, b), max(a, b), replace(grid, powers=True), "layer")
    value, zero = Fraction(halves, 2), int(chosen.zero_point)
    assert round(value) + zero == round(value + zero)


def test_powers_stay_with_other_bits_and_beyond_float32_is_refused() -> None:
    assert replace(S8_WEIGHT, powers=True).with_bits(4) == Grid(-7, 7, symmetric=True, powers=True)
    assert replace(U8_ASYMMETRIC, powers=True).with_bits(4).powers
    most = torch.finfo(torch.float32).max
    assert float(choose_parameters(-most, most, Grid(-1, 1, symmetric=True), "x").scale) == most
    with pytest.raises(PassError, match="x: its range goes beyond float32"):
        choose_parameters(-most, most, Grid(-1, 1, symmetric=True, powers=True), "x")


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


# -- narrower grids ------------------------------------------------------------------------------


@given(st.sampled_from([U8_ASYMMETRIC, S8_ASYMMETRIC, S8_SYMMETRIC, S8_WEIGHT]), st.integers(2, 8))
def test_a_grid_with_other_bits_is_of_the_same_kind(grid: Grid, bits: int) -> None:
    narrow = grid.with_bits(bits)
    assert narrow.bits == bits
    assert narrow.symmetric == grid.symmetric
    assert (narrow.qmin == 0) == (grid.qmin == 0)
    assert (narrow.qmin == -narrow.qmax) == (grid.qmin == -grid.qmax)
    assert narrow.with_bits(grid.bits) == grid


def test_a_grid_of_one_bit_is_refused_where_it_holds_nothing_but_zero() -> None:
    with pytest.raises(UsageError, match="a grid"):
        S8_WEIGHT.with_bits(1)


# -- the operator, in exact arithmetic -----------------------------------------------------------


def exact_level(x: float, scale: float, zero: int, grid: Grid) -> int:
    """clamp(round(x / scale) + zero), ties to even, in rational numbers."""
    if math.isinf(x):
        return grid.qmax if x > 0 else grid.qmin
    return min(max(round(Fraction(x) / Fraction(scale)) + zero, grid.qmin), grid.qmax)


def from_a_tie(x: float, scale: float) -> float:
    """How far x / scale is from a tie, relative to its size."""
    ratio = Fraction(x) / Fraction(scale)
    return float(abs(ratio - math.floor(ratio) - Fraction(1, 2)) / max(1, abs(ratio)))


def operator(x: torch.Tensor, scale: float, zero: int, grid: Grid) -> list[int]:
    """The integers behind what the operator gives."""
    op = fake_quant_op()
    step = torch.tensor(scale, dtype=torch.float32)
    y = op(x, step, torch.tensor(zero, dtype=torch.int32), None, grid.qmin, grid.qmax)
    levels = y.double() / step.double() + zero
    assert (levels - levels.round()).abs().max() < 1e-3
    return [int(level) for level in levels.round()]


def zero_points(grid: Grid) -> st.SearchStrategy[int]:
    return st.just(0) if grid.symmetric else st.integers(grid.qmin, grid.qmax)


NARROW = [grid.with_bits(bits) for grid in (U8_ASYMMETRIC, S8_SYMMETRIC) for bits in (2, 3, 4)]
all_grids = st.sampled_from([*GRIDS, *NARROW])


@settings(max_examples=50, deadline=None)
@given(all_grids.flatmap(lambda g: st.tuples(st.just(g), zero_points(g))), st.data())
def test_the_operator_at_ties_and_powers_of_two_is_exact(chosen, draw) -> None:
    """Multiples of half a step, far beyond the grid on both sides, at every power of two."""
    grid, zero = chosen
    exponent = draw.draw(st.integers(-126, 100))
    halves = draw.draw(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20))
    x = torch.tensor([math.ldexp(n, exponent - 1) for n in halves], dtype=torch.float32)
    scale = math.ldexp(1.0, exponent)
    wanted = [exact_level(float(v), scale, zero, grid) for v in x]
    assert operator(x, scale, zero, grid) == wanted
    assert operator(x.double(), scale, zero, grid) == wanted
    parameters = QuantParameters(
        torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), grid
    )
    assert parameters.integers(x).tolist() == wanted


@settings(deadline=None)
@given(
    all_grids.flatmap(lambda g: st.tuples(st.just(g), zero_points(g))),
    st.floats(SMALLEST_SCALE, 2.0**100, width=32),
    st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20),
)
def test_the_operator_at_any_scale_errs_at_ties_alone(chosen, scale, steps) -> None:
    grid, zero = chosen
    x = torch.tensor([step * scale for step in steps], dtype=torch.float32)
    for values, near in ((x, 2.0**-22), (x.double(), 2.0**-50)):
        found = operator(values, scale, zero, grid)
        for value, level in zip(values.tolist(), found, strict=True):
            wanted = exact_level(value, scale, zero, grid)
            assert level == wanted or (
                abs(level - wanted) == 1 and from_a_tie(value, scale) <= near
            )


@pytest.mark.parametrize("grid", [*GRIDS, *NARROW], ids=str)
def test_infinities_saturate_and_nan_stays(grid: Grid) -> None:
    x = torch.tensor([math.inf, -math.inf, 3e38, -3e38])
    assert operator(x, 0.5, 0, grid) == [grid.qmax, grid.qmin] * 2
    nan = fake_quant_op()(
        torch.tensor([math.nan, 0.0]), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32),
        None, grid.qmin, grid.qmax,
    )  # fmt: skip
    assert nan.isnan().tolist() == [True, False]


@given(all_grids.flatmap(lambda g: st.tuples(st.just(g), zero_points(g))))
def test_the_smallest_scale_divides_subnormals_right(chosen) -> None:
    grid, zero = chosen
    x = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126, -(2.0**-127) * 3, 2.0**-120])
    wanted = [exact_level(float(v), SMALLEST_SCALE, zero, grid) for v in x]
    parameters = QuantParameters(
        torch.tensor(SMALLEST_SCALE), torch.tensor(zero, dtype=torch.int32), grid
    )
    assert parameters.integers(x).tolist() == wanted
    assert operator(x.double(), SMALLEST_SCALE, zero, grid) == wanted


# -- weights -------------------------------------------------------------------------------------


weights = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3),
    min_size=1, max_size=4,
)  # fmt: skip
weight_grids = st.integers(2, 8).map(S8_WEIGHT.with_bits)


@settings(deadline=None)
@given(weights, weight_grids, st.sampled_from([0, 1, None]))
def test_weight_scales_are_the_largest_value_over_the_largest_integer(rows, grid, axis) -> None:
    w = torch.tensor(rows, dtype=torch.float32)
    chosen = weight_parameters(w, grid, axis, "w")
    parts = [w] if axis is None else list(w.movedim(axis, 0))
    scales = chosen.scale.reshape(-1).tolist()
    assert len(scales) == len(parts)
    for part, scale in zip(parts, scales, strict=True):
        wanted = max(abs(Fraction(v)) for v in part.reshape(-1).tolist()) / grid.qmax
        if wanted == 0:
            assert scale == 1.0
        elif wanted < Fraction(SMALLEST_SCALE):
            assert scale == SMALLEST_SCALE
        else:
            assert abs(Fraction(scale) - wanted) <= wanted / 2**23
        # No value is clipped: each is at most half a step, and the scale's rounding, away.
        for value in part.reshape(-1).tolist():
            level = exact_level(value, scale, 0, grid)
            slack = Fraction(scale) * (Fraction(1, 2) + Fraction(grid.qmax, 2**22))
            assert abs(level * Fraction(scale) - Fraction(value)) <= slack
    assert chosen.integers(w).abs().max() <= grid.qmax


@settings(max_examples=50, deadline=None)
@given(weights, weight_grids, st.sampled_from([0, 1, None]))
def test_weight_scales_by_error_are_never_worse(rows, grid, axis) -> None:
    w = torch.tensor(rows, dtype=torch.float32)
    errors = {}
    for method in ("minmax", "mse"):
        chosen = weight_parameters(w, grid, axis, "w", method)
        error = (chosen.reals(chosen.integers(w)) - w.double()).square()
        errors[method] = error.sum([d for d in range(2) if d != axis])
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-12)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_weights_of_nan_or_infinity_are_refused_by_name(bad, axis, method) -> None:
    w = torch.ones(2, 3)
    w[1, 2] = bad
    with pytest.raises(PassError, match=r"block\.conv2\.weight: its range holds NaN or infinity"):
        weight_parameters(w, S8_WEIGHT, axis, "block.conv2.weight", method)


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

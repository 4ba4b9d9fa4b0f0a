"""Ranges against brute force: the noise of a grid, each method's choice, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.activation_ranges import METHODS, clipped_fraction, estimate, noise, sqnr_db
from pruna_ir.errors import PassError, UsageError
from pruna_ir.histogram import Histogram
from pruna_ir.observers import MinMax
from pruna_ir.quantization import (
    S8_ASYMMETRIC,
    S8_SYMMETRIC,
    U8_ASYMMETRIC,
    Grid,
    QuantParameters,
    choose_parameters,
)
from tests.observed import seen, values
from tests.test_divergence import divergence_reference

GRIDS = [U8_ASYMMETRIC, S8_SYMMETRIC, S8_ASYMMETRIC, Grid(-8, 7, symmetric=False)]


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "shifted": normal * 0.3 - 2,
        "outlier": torch.cat([normal, torch.tensor([40.0])]),
        "skewed": normal.exp() - 1,
        "two values": torch.tensor([0.0, 1.0]).repeat(50),
        "constant": torch.full((99,), -3.0),
        "zeros": torch.zeros(5),
    }


def true_error(x: torch.Tensor, chosen: QuantParameters) -> float:
    return float((chosen.reals(chosen.integers(x)) - x.double()).square().sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", distributions())
def test_noise_is_the_error_of_the_centres_and_near_the_true_one(name: str, grid: Grid) -> None:
    x = distributions()[name]
    histogram = seen(x)
    for method in ("mse", "minmax"):
        chosen = estimate(histogram, method, grid, name)
        found = noise(histogram, chosen.scale[None], chosen.zero_point[None], grid)
        centres = histogram.centres().repeat_interleave(histogram.counts)
        spread = min(histogram.width, float(chosen.scale)) ** 2 / 12 * len(centres)
        naive = true_error(centres, chosen) + spread
        assert float(found) == pytest.approx(naive, rel=1e-9, abs=1e-12)
        bound = histogram.width * math.sqrt(len(x))
        true = true_error(x, chosen)
        assert abs(math.sqrt(float(found)) - math.sqrt(true)) <= bound


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", distributions())
def test_mse_is_as_good_as_a_brute_force_search(name: str, grid: Grid) -> None:
    """Every pair (or one scale) of 40 fractions, the error taken on the values themselves."""
    x = distributions()[name][::7]
    chosen = estimate(seen(x), "mse", grid, name)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    fractions = np.linspace(0.025, 1, 40)
    pairs = [(a, a) for a in fractions]
    if not grid.symmetric and low < 0 < high:
        pairs = [(a, b) for a in fractions[1::3] for b in fractions[1::3]]
    best = min(
        true_error(x, choose_parameters(low * a, high * b, grid, name)) for a, b in pairs
    )
    resolution = seen(x).width * math.sqrt(len(x))
    assert math.sqrt(true_error(x, chosen)) <= 1.02 * math.sqrt(best) + resolution


def test_mse_cuts_an_outlier_and_minmax_does_not() -> None:
    x = torch.cat([torch.randn(100_000), torch.tensor([30.0])])
    histogram = seen(x)
    tight, wide = (estimate(histogram, m, S8_SYMMETRIC, "x") for m in ("mse", "minmax"))
    assert float(tight.scale) < 0.75 * float(wide.scale)
    assert clipped_fraction(histogram, wide) == 0.0
    assert 0 < clipped_fraction(histogram, tight) < 1e-3
    assert sqnr_db(histogram, tight) > sqnr_db(histogram, wide) + 1


def divergence_of_scales(histogram: Histogram, grid: Grid) -> dict[float, float]:
    """Every threshold by hand: the least divergence of those that give a scale."""
    counts, first, levels = histogram.counts.tolist(), histogram.first, 2**grid.bits
    if grid.symmetric:
        below, above = counts[:-first][::-1] if first else [], counts[-first:]
        size = max(len(below), len(above))
        padded = [part + [0] * (size - len(part)) for part in (below, above)]
        counts, first, levels = [a + b for a, b in zip(*padded, strict=True)], 0, levels // 2
    low, high = min(0.0, histogram.low), max(0.0, histogram.high)
    found: dict[float, float] = {}
    for t in range(1, max(len(counts) + first, -first) + 1):
        if min(t, -first) + min(t, len(counts) + first) >= levels:
            bound = t * histogram.width
            scale = float(choose_parameters(max(low, -bound), min(high, bound), grid, "").scale)
            outside = sum(counts) - sum(counts[max(-t - first, 0) : t - first])
            if outside * levels > sum(counts):
                continue
            value = divergence_reference(counts, first, t, levels)
            found[scale] = min(value, found.get(scale, math.inf))
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", distributions())
def test_kl_keeps_the_range_of_the_least_divergence(name: str, grid: Grid) -> None:
    histogram = seen(distributions()[name], bins=600 if grid.bits == 8 else 60)
    chosen = float(estimate(histogram, "kl", grid, name).scale)
    found = divergence_of_scales(histogram, grid)
    if not found or min(found.values()) == math.inf:
        assert chosen == float(estimate(histogram, "minmax", grid, name).scale)
    else:
        assert found[chosen] <= min(found.values()) + 1e-9


def test_kl_clips_at_most_what_a_level_holds() -> None:
    """Values in one narrow band far from 0: clipping them all would have no divergence."""
    x = torch.linspace(0.3, 0.7, 200)
    for grid in GRIDS:
        chosen = estimate(seen(x), "kl", grid, "x")
        assert clipped_fraction(seen(x), chosen) <= 1 / 16


def test_kl_merges_bins_down_to_sixteen_a_level() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    for grid, bins in ((U8_ASYMMETRIC, 4096), (S8_SYMMETRIC, 4096), (GRIDS[-1], 256)):
        fine, coarse = seen(x, 8192), seen(x, bins)
        assert fine.exponent < coarse.exponent
        scales = [float(estimate(h, "kl", grid, "x").scale) for h in (fine, coarse)]
        assert scales[0] == scales[1]


def test_kl_cuts_rare_outliers_and_keeps_what_is_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(100_000, generator=generator), torch.full((4,), 40.0)])
    cut = estimate(seen(x), "kl", S8_SYMMETRIC, "x")
    assert 3.0 < 127 * float(cut.scale) < 8.0
    uniform = torch.rand(100_000, generator=generator) * 2 - 1
    kept = estimate(seen(uniform), "kl", S8_SYMMETRIC, "x")
    assert 128 * float(kept.scale) == pytest.approx(1.0, rel=0.02)


def test_kl_does_not_see_how_many_values_are_zero() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()
    one, many = (estimate(seen(v), "kl", U8_ASYMMETRIC, "x") for v in (
        x[x > 0], torch.cat([x, torch.zeros(90_000)])
    ))  # fmt: skip
    assert float(one.scale) == float(many.scale)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentiles_are_within_a_bin_of_numpys(percentile: float) -> None:
    x = torch.randn(10_001)
    histogram = seen(x)
    chosen = estimate(histogram, "percentile", Grid(-8, 7, symmetric=False), "x", percentile)
    ends = np.percentile(x.numpy(), [100 - percentile, percentile], method="inverted_cdf")
    step = float(chosen.scale)
    assert 15 * step == pytest.approx(ends[1] - ends[0], abs=3 * histogram.width + 1e-6)


@given(values, st.sampled_from(GRIDS), st.sampled_from(METHODS))
def test_every_method_gives_a_usable_grid(data: list[float], grid: Grid, method) -> None:
    chosen = estimate(seen(torch.tensor(data)), method, grid, "x")
    assert float(chosen.scale) >= torch.finfo(torch.float32).tiny
    assert grid.qmin <= int(chosen.zero_point) <= grid.qmax
    assert chosen.reals(chosen.integers(torch.zeros(1))).item() == 0.0


def test_sqnr_and_clipping_of_a_known_case() -> None:
    histogram = seen(torch.tensor([10.0, 10.0, 20.0, 0.0]))
    chosen = choose_parameters(0.0, 12.0, U8_ASYMMETRIC, "x")
    assert clipped_fraction(histogram, chosen) == 0.25
    signal, lost = 600.0, 64.0
    assert sqnr_db(histogram, chosen) == pytest.approx(10 * math.log10(signal / lost), abs=0.01)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(PassError, match=r"conv1: no value was observed"):
        estimate(Histogram(), "mse", U8_ASYMMETRIC, "conv1")
    with pytest.raises(UsageError, match="need a histogram"):
        estimate(MinMax(0.0, 1.0), "mse", U8_ASYMMETRIC, "conv1")
    with pytest.raises(UsageError, match="unknown range method 'entropy'"):
        estimate(seen(torch.ones(1)), "entropy", U8_ASYMMETRIC, "conv1")
    with pytest.raises(UsageError, match="percentile"):
        estimate(seen(torch.ones(1)), "percentile", U8_ASYMMETRIC, "conv1", 40.0)

"""Observers and ranges against naive numpy; the walk over data, its memory and its refusals."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pruna_ir.calibration import (
    METHODS,
    Histogram,
    MinMax,
    clipped_fraction,
    estimate,
    noise,
    observe,
    sqnr_db,
)
from pruna_ir.capture import capture
from pruna_ir.data import Batch, TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.program import Program
from pruna_ir.quantization import (
    S8_ASYMMETRIC,
    S8_SYMMETRIC,
    U8_ASYMMETRIC,
    Grid,
    QuantParameters,
    choose_parameters,
)
from tests.test_divergence import divergence_reference

GRIDS = [U8_ASYMMETRIC, S8_SYMMETRIC, S8_ASYMMETRIC, Grid(-8, 7, symmetric=False)]
values = st.lists(
    st.floats(-(2.0**60), 2.0**60, allow_nan=False, width=32) | st.just(0.0),
    min_size=1, max_size=40,
)  # fmt: skip


def seen(x: torch.Tensor, bins: int = 8192) -> Histogram:
    histogram = Histogram(bins)
    histogram.update(x)
    return histogram


def state(histogram: Histogram) -> tuple[object, ...]:
    return (
        histogram.exponent, histogram.first, histogram.counts.tolist(), histogram.zeros,
        histogram.low, histogram.high,
    )  # fmt: skip


# -- histograms ----------------------------------------------------------------------------------


@settings(max_examples=100)
@given(values, st.integers(2, 50))
def test_counts_are_those_of_numpy(data: list[float], bins: int) -> None:
    histogram = seen(torch.tensor(data), bins)
    x = np.array(data, dtype=np.float64)
    assert len(histogram.counts) <= bins
    assert (histogram.low, histogram.high) == (x.min(), x.max())
    assert histogram.zeros == (x == 0).sum()
    edges = (np.arange(len(histogram.counts) + 1) + histogram.first) * histogram.width
    expected = np.histogram(x[x != 0], edges)[0]
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.total == len(data)


@settings(max_examples=100)
@given(values, st.integers(0, 40), st.integers(2, 50), st.randoms())
def test_order_and_split_do_not_matter(data: list[float], cut: int, bins: int, random) -> None:
    whole = seen(torch.tensor(data), bins)
    shuffled = list(data)
    random.shuffle(shuffled)
    split = Histogram(bins)
    parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
    for part in parts:
        split.update(torch.tensor(part))
    merged = Histogram(bins)
    for part in parts:
        merged.merge(seen(torch.tensor(part), bins))
    assert state(whole) == state(split) == state(merged)


def test_the_bins_are_as_narrow_as_the_range_allows() -> None:
    histogram = seen(torch.tensor([0.1, 1.0]), bins=16)
    assert histogram.width == 1 / 8
    histogram.update(torch.tensor([100.0]))
    assert histogram.width == 8.0
    assert histogram.counts.tolist() == [2, *[0] * 11, 1]


def test_large_tensors_are_counted_whole() -> None:
    x = torch.randn(3, 7, 99991)
    assert seen(x).total == x.numel()
    assert state(seen(x)) == state(seen(x.permute(2, 0, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    assert state(seen(x)) == state(seen(x.double()))


def test_subnormal_values_have_bins() -> None:
    histogram = seen(torch.tensor([2.0**-149, -(2.0**-149)]))
    assert histogram.total == 2
    assert histogram.width == torch.finfo(torch.float32).smallest_normal


@given(values)
def test_minmax_is_exact(data: list[float]) -> None:
    observer = MinMax()
    for value in data:
        observer.update(torch.tensor([value]))
    assert (observer.low, observer.high) == (min(data), max(data))


# -- ranges --------------------------------------------------------------------------------------


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
    with pytest.raises(UsageError, match="bins"):
        Histogram(1)


# -- the walk ------------------------------------------------------------------------------------


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

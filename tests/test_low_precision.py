"""Low-precision noise: neighbours, no bias, equal values alike; certificates that can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.certify import certify
from pruna_ir.equivalence import run_float64, run_native, sqnr_db
from pruna_ir.low_precision import computes_low, rounded, run_rounded
from pruna_ir.lowering import KernelRow, Verdict
from pruna_ir.program import Program

LOW = [torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    x=st.floats(-6e4, 6e4, allow_nan=False),
    dtype=st.sampled_from(LOW),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
def test_a_number_goes_to_one_of_its_two_neighbours(
    x: float, dtype: torch.dtype, seed: int
) -> None:
    exact = torch.tensor([x], dtype=torch.float64)
    (found,) = rounded(exact, dtype, generator(seed)).tolist()
    nearest = exact.to(dtype)
    up, down = (torch.nextafter(nearest, torch.tensor([side]).to(dtype)).double().item()
                for side in (math.inf, -math.inf))  # fmt: skip
    own = nearest.double().item()
    low, high = (own, up) if own <= x else (down, own)
    assert low <= x <= high
    assert found in (low, high)
    if own == x:
        assert found == x


@pytest.mark.parametrize("dtype", LOW)
def test_without_bias_and_with_twice_the_variance(dtype: torch.dtype) -> None:
    x = torch.randn(200_000, dtype=torch.float64, generator=generator(1))
    random, nearest = rounded(x, dtype, generator()), x.to(dtype).double()
    ratio = float((random - x).square().mean() / (nearest - x).square().mean())
    assert ratio == pytest.approx(2, rel=0.05)
    assert abs(float((random - x).mean())) < 5 * float((random - x).std()) / len(x) ** 0.5


def test_equal_values_go_alike_and_runs_differ() -> None:
    x = torch.randn(50, dtype=torch.float64, generator=generator(1)).repeat(40, 1)
    found = rounded(x, torch.bfloat16, generator())
    assert bool((found == found[0]).all())
    assert not torch.equal(found, rounded(x, torch.bfloat16, generator(1)))


def test_beyond_the_range_there_is_infinity() -> None:
    x = torch.tensor([7e4, -7e4, 65504.0, 0.0], dtype=torch.float64)
    assert rounded(x, torch.float16, generator()).tolist() == [math.inf, -math.inf, 65504.0, 0.0]


class Net(nn.Module):
    """Two layers in a low precision between float32 inputs and outputs."""

    def __init__(self, dtype: torch.dtype, gain: float = 1.0) -> None:
        super().__init__()
        self.dtype = dtype
        self.first, self.second = (nn.Linear(n, m).to(dtype) for n, m in ((20, 30), (30, 7)))
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x.to(self.dtype)) * self.gain)
        return self.second(hidden).float()


def program(dtype: torch.dtype, gain: float = 1.0) -> Program:
    torch.manual_seed(0)
    return capture(Net(dtype, gain).eval(), (torch.randn(3, 20),))


class Runs:
    """A runner that computes what it is told to."""

    def __init__(self, program: Program, change=lambda y: y) -> None:  # type: ignore[no-untyped-def]
        self._program, self._change = program, change

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
        outputs = run_native(self._program, [torch.from_numpy(x) for x in inputs])
        return [self._change(y).numpy() for y in outputs]

    def audit(self) -> list[KernelRow]:
        return []


@pytest.mark.parametrize("dtype", LOW)
def test_torch_and_exact_arithmetic_pass(dtype: torch.dtype) -> None:
    own = program(dtype)
    assert computes_low(own)
    found = certify(own, Runs(own))
    assert found.verdict is Verdict.PASSED, found.summary()
    assert "either neighbour at random" in found.rule

    class Exact(Runs):
        def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
            truth = run_float64(own, [torch.from_numpy(x) for x in inputs])
            return [y.float().numpy() for y in truth]

    assert certify(own, Exact(own)).verdict is Verdict.PASSED


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.02,
        lambda y: y + 0.02,
        lambda y: y.flip(1),
        lambda y: torch.zeros_like(y),
        lambda y: torch.where(y == y.max(), torch.nan, y),
        lambda y: y[:, :-1].contiguous(),
        lambda y: y.double(),
    ],
)
def test_wrong_artifacts_fail(change) -> None:  # type: ignore[no-untyped-def]
    own = program(torch.bfloat16)
    assert certify(own, Runs(own, change)).verdict is Verdict.FAILED


def test_a_lower_precision_than_the_programs_fails() -> None:
    own, coarser = program(torch.float16), program(torch.bfloat16)
    assert certify(own, Runs(coarser)).verdict is Verdict.FAILED


def test_another_activation_fails() -> None:
    class Other(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.gelu(self.first(x.to(self.dtype)))
            return self.second(hidden).float()

    own = program(torch.bfloat16)
    torch.manual_seed(0)
    other = capture(Other(torch.bfloat16).eval(), (torch.randn(3, 20),))
    assert certify(own, Runs(other)).verdict is Verdict.FAILED


def test_overflow_proves_nothing() -> None:
    own = program(torch.float16, gain=1e6)
    assert certify(own, Runs(own)).verdict is Verdict.NOT_RUN


def test_the_floor_lies_below_torchs_own_noise_but_not_far() -> None:
    own = program(torch.bfloat16)
    x = (torch.randn(500, 20, generator=generator()),)
    (truth,) = run_float64(own, x)
    native = sqnr_db(run_native(own, x)[0], truth)
    noisy = sqnr_db(run_rounded(own, x, seed=0)[0], truth)
    assert 1 < native - noisy < 5

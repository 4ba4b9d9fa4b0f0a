"""Lifting and comparison: what float64 sees that float32 hides, and which gates inputs reach."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.equivalence import (
    GateRecorder,
    relative_error,
    run_float64,
    run_native,
    sqnr_db,
)
from pruna_ir.stimuli import index_limits, stimuli
from tests.networks import ConvNet, conv_net, seeded

finite = st.floats(-1e6, 1e6)


def test_a_lifted_run_is_the_double_module():
    x = torch.randn(3, 3, 9, 9)
    expected = seeded(ConvNet).double()(x.double())
    (found,) = run_float64(conv_net(), (x,))
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < 1e-14


def test_lifting_reaches_dtypes_that_the_model_names():
    class Casts(nn.Module):
        def forward(self, x):
            steps = torch.arange(x.shape[1], dtype=torch.float32) / 3
            return (x.to(torch.float32) + steps).to(torch.bfloat16).float()

    x = torch.full((2, 4), 1 / 3)
    (found,) = run_float64(capture(Casts(), (x,)), (x,))
    assert found.dtype == torch.float64
    expected = x.double() + torch.arange(4, dtype=torch.float64) / 3
    assert relative_error(found, expected) < 1e-15


def test_a_lifted_run_leaves_the_program_in_float32():
    program, x = conv_net(), torch.randn(2, 3, 9, 9)
    before = program.hash()
    run_float64(program, (x,))
    assert program.hash() == before
    assert run_native(program, (x,))[0].dtype == torch.float32


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_nan_and_stray_infinities_never_pass(broken):
    reference = torch.tensor([1.0, 2.0])
    assert relative_error(torch.tensor([broken, 2.0]), reference) == math.inf
    assert relative_error(reference, torch.tensor([broken, 2.0])) == math.inf


def test_nan_does_not_equal_itself_and_masks_do():
    assert relative_error(torch.tensor([math.nan]), torch.tensor([math.nan])) == math.inf
    masked = torch.tensor([-math.inf, 1.0])
    assert relative_error(masked, masked) == 0.0


def test_shapes_and_integers_compare_exactly():
    assert relative_error(torch.zeros(2), torch.zeros(3)) == math.inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert relative_error(torch.tensor([1e-30]), torch.tensor([0.0])) == math.inf


@given(st.lists(finite, min_size=1, max_size=5), st.floats(1e-6, 10))
def test_the_relative_error_does_not_depend_on_scale(values, scale):
    reference = torch.tensor(values, dtype=torch.float64) + 1
    actual = reference + torch.linspace(0, 1, len(values), dtype=torch.float64)
    small = relative_error(actual, reference)
    large = relative_error(actual * scale, reference * scale)
    assert small == large or math.isclose(small, large, rel_tol=1e-6)


@given(st.integers(-60, 60))
def test_sqnr_counts_ten_decibels_per_factor_of_ten_in_power(exponent):
    reference = torch.ones(64, dtype=torch.float64)
    noise = 10.0 ** (exponent / 20)
    assert math.isclose(sqnr_db(reference + noise, reference), -exponent, abs_tol=1e-6)


def test_sqnr_of_equal_and_of_broken_outputs():
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.tensor([math.nan]), torch.ones(1)) == -math.inf
    assert sqnr_db(torch.ones(2), torch.ones(3)) == -math.inf


def test_stimuli_drive_relu6_to_both_ends():
    program = conv_net()
    recorder = GateRecorder(program)
    for stimulus in stimuli(program):
        run_float64(program, stimulus.inputs, recorder)
    gates = recorder.gates()
    assert gates.total == 2
    assert gates.one_sided == {}


def test_a_gate_that_inputs_never_reach_is_reported():
    class Dead(nn.Module):
        def forward(self, x):
            return nn.functional.relu6(x.sigmoid())

    program = capture(Dead(), (torch.zeros(2, 3),))
    recorder = GateRecorder(program)
    for stimulus in stimuli(program):
        run_float64(program, stimulus.inputs, recorder)
    (message,) = recorder.gates().one_sided.values()
    assert message.startswith("never high")
    assert "tests/test_equivalence.py:" in message


def test_token_inputs_stay_inside_their_embedding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 4)

        def forward(self, ids):
            return self.table(ids.reshape(-1)).sum()

    program = capture(Tokens(), (torch.tensor([[1, 2], [3, 4]]),))
    assert index_limits(program) == {"ids": 11}
    drawn = torch.cat([s.inputs[0].reshape(-1) for s in stimuli(program)])
    assert drawn.min() >= 0
    assert drawn.max() <= 10


def test_stimuli_are_the_same_for_the_same_seed():
    program = conv_net()
    for a, b in zip(stimuli(program, seed=3), stimuli(program, seed=3), strict=True):
        assert torch.equal(a.inputs[0], b.inputs[0])
    assert not torch.equal(stimuli(program, seed=4)[1].inputs[0], stimuli(program)[1].inputs[0])

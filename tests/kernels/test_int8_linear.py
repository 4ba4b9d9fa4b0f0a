"""int8_linear: integers multiplied exactly, scaled by row and channel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.kernels.int8_linear import KERNEL, int8_linear, int8_linear_reference
from tests.kernels.poison import poisoned


def draw(lead, width, out, *, by_row=False, biased=True, seed=0):
    """x, weight, x_scale, weight_scale, bias."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (
        torch.randint(-128, 128, size, generator=generator, dtype=torch.int8)
        for size in ((*lead, width), (out, width))
    )
    x_scale = torch.rand(lead if by_row else [], generator=generator)
    bias = torch.randn(out, generator=generator) if biased else None
    return [x, weight, x_scale, torch.rand(out, generator=generator), bias]


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 70), st.integers(1, 9), st.booleans(),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference(lead, width, out, by_row, biased, seed):
    inputs = draw(lead, width, out, by_row=by_row, biased=biased, seed=seed)
    truth = int8_linear_reference(*inputs)
    with poisoned():
        found = int8_linear(*inputs)
    assert found.shape == truth.shape == (*lead, out)
    assert found.dtype == truth.dtype == torch.float32
    assert torch.equal(found, truth)


def test_is_the_linear_layer_of_the_values_that_the_integers_stand_for():
    x, weight, x_scale, weight_scale, bias = draw([3, 5], 33, 7, by_row=True)
    values = x.double() * x_scale.double().unsqueeze(-1)
    weights = weight.double() * weight_scale.double().unsqueeze(-1)
    truth = torch.nn.functional.linear(values, weights, bias.double())
    found = int8_linear(x, weight, x_scale, weight_scale, bias)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-5)
    doubled = int8_linear(x, weight, x_scale * 2, weight_scale, bias)
    assert float((doubled - found).abs().max()) > 1


def test_registration_follows_torch_rules():
    for by_row in (False, True):
        torch.library.opcheck(KERNEL.op, tuple(draw([2, 3], 5, 7, by_row=by_row, biased=by_row)))


@pytest.mark.parametrize(
    ("place", "tensor", "match"),
    [
        (0, torch.zeros(2, 5), "x is torch.float32"),
        (1, torch.zeros(7, 6, dtype=torch.int8), r"x is \[2, 5\] and weight is \[7, 6\]"),
        (2, torch.ones(3), r"x_scale is \[3\]"),
        (3, torch.ones(1), r"weight_scale \[1\]"),
        (4, torch.ones(7).double(), "float64; they must be int8 and float32"),
    ],
)
def test_refuses_what_does_not_fit(place, tensor, match):
    inputs = draw([2], 5, 7)
    inputs[place] = tensor
    with pytest.raises(RuntimeError, match=match):
        int8_linear(*inputs)

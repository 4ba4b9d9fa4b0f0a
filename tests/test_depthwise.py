"""Depthwise convolution as shifted sums equals torch's own, in float64, for every geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.capture import capture
from pruna_ir.depthwise import ShiftedDepthwise, shifted_sum
from pruna_ir.equivalence import relative_error, run_float64

CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_equals_torch(data, rank, biased, seed):
    torch.manual_seed(seed)

    def sizes(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * rank))

    batch, channels, multiplier = data.draw(st.tuples(*[st.integers(1, 3)] * 3))
    channels += 1
    kernel, stride, padding, dilation = sizes(1, 3), sizes(1, 3), sizes(0, 2), sizes(1, 2)
    space = [d * (k - 1) + 1 + n for d, k, n in zip(dilation, kernel, sizes(0, 4), strict=True)]
    x = torch.randn(batch, channels, *space, dtype=torch.float64)
    w = torch.randn(channels * multiplier, 1, *kernel, dtype=torch.float64)
    bias = torch.randn(channels * multiplier, dtype=torch.float64) if biased else None
    expected = CONV[rank](x, w, bias, stride, padding, dilation, channels)
    with ShiftedDepthwise():
        found = CONV[rank](x, w, bias, stride, padding, dilation, channels)
    assert relative_error(found, expected) < 1e-13
    assert torch.equal(found, shifted_sum(x, w, bias, stride, padding, dilation))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leaves_every_other_convolution_alone(groups, dtype):
    x, w = torch.randn(2, 4, 7, 7).to(dtype), torch.randn(6, 4 // groups, 3, 3).to(dtype)
    with ShiftedDepthwise():
        found = torch.conv2d(x, w, groups=groups)
    assert torch.equal(found, torch.conv2d(x, w, groups=groups))


def test_a_lifted_program_uses_it_and_stays_right():
    torch.manual_seed(0)
    module = torch.nn.Conv2d(5, 10, 3, stride=2, padding=1, groups=5).eval()
    x = torch.randn(2, 5, 9, 9)
    (found,) = run_float64(capture(module, (x,)), (x,))
    assert relative_error(found, module.double()(x.double())) < 1e-13

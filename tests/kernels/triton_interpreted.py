"""Triton's kernels in its interpreter; ``test_triton.py`` runs this file where it is switched on.

Outputs are poisoned: torch fills fresh memory with NaN, or the largest integer.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from pruna_ir.kernels import (
    activations,
    conv_act,
    ffn,
    int8_linear,
    triton_ffn,
    triton_int8_linear,
)
from pruna_ir.kernels import triton_conv_act as triton_conv


@pytest.fixture(autouse=True, scope="module")
def _poisoned():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(mode=True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(mode=False)


def normal(generator, *sizes, dtype=torch.float32):
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)


def wide(tensors):
    """The same tensors at float64, where the reference is computed."""
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def assert_near(found, truth, magnitude, terms, dtype):
    """Within the rounding of a float32 sum of this many terms, stored in a dtype."""
    assert found.shape == truth.shape
    assert found.dtype == dtype
    bound = (4 * terms * 2**-24 + 4 * torch.finfo(dtype).eps) * magnitude
    worst = float((found.double() - truth).abs().max())
    assert worst <= bound  # NaN fails


_ACTIVATION = st.sampled_from(activations.ACTIVATIONS)
_ARGS = {"hardtanh": [-0.5, 0.75], "leaky_relu": [0.1]}
_DTYPE = st.sampled_from([torch.float32, torch.float16])


@st.composite
def convolutions(draw):
    """Sizes that leave at least one pixel of output, odd ones among them."""
    spatial = draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 2)) for _ in range(spatial)]
    padding = [draw(st.integers(0, 2)) for _ in range(spatial)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    size = [n + draw(st.integers(0, 5)) for n in least]
    stride = [draw(st.integers(1, 3)) for _ in range(spatial)]
    return size, kernel, stride, padding, dilation


@settings(max_examples=60)
@given(
    convolutions(), st.integers(1, 5), st.integers(1, 37), st.integers(1, 35), _ACTIVATION,
    st.booleans(), st.sampled_from(["", "before", "after"]), st.booleans(), _DTYPE,
    st.integers(0, 99),
)  # fmt: skip
def test_convolutions(
    shapes, batch, ins, outs, activation, biased, added, channels_last, dtype, seed
):
    size, kernel, stride, padding, dilation = shapes
    generator = torch.Generator().manual_seed(seed)
    x = normal(generator, batch, ins, *size, dtype=dtype)
    weight = normal(generator, outs, ins, *kernel, dtype=dtype)
    bias = normal(generator, outs, dtype=dtype) if biased else None
    options = (stride, padding, dilation)
    shape = conv_act.conv_act(x, weight, bias, None, *options, 1, "none", []).shape
    residual = normal(generator, *shape, dtype=dtype) if added else None
    if channels_last and x.dim() == 4:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    args = _ARGS.get(activation, [])
    tensors = (x, weight, bias, residual)
    last = added == "after"
    found = triton_conv.conv_act(*tensors, *options, activation, args, residual_last=last)
    truth = conv_act.conv_act_reference(*wide(tensors), *options, 1, activation, args, last)
    positive = [None if t is None else t.abs() for t in wide(tensors)]
    magnitude = float(conv_act.conv_act_reference(*positive, *options, 1, "none", []).max())
    assert_near(found, truth, magnitude, ins * math.prod(kernel) + 2, dtype)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 70), st.integers(1, 40),
    st.integers(1, 40), st.sampled_from(ffn.ACTIVATIONS), st.booleans(), st.booleans(),
    st.booleans(), _DTYPE, st.integers(0, 99),
)  # fmt: skip
def test_feed_forward_blocks(
    lead, width, hidden, out, activation, gated, biased, added, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    x, w1 = normal(generator, *lead, width), normal(generator, hidden, width) / width
    w2, gate = normal(generator, out, hidden) / hidden, normal(generator, hidden, width) / width
    b1, b2, b3 = (normal(generator, n) for n in (hidden, out, hidden))
    tensors = [
        None if t is None else t.to(dtype)
        for t in (
            x, w1, b1 if biased else None, w2, b2 if biased else None, gate if gated else None,
            b3 if gated and biased else None,
        )
    ]  # fmt: skip
    residual = normal(generator, *lead, out, dtype=dtype) if added else None
    found = triton_ffn.ffn(*tensors, activation, residual)
    truth = ffn.ffn_reference(*wide(tensors), activation, *wide([residual]))
    positive = [None if t is None else t.abs() for t in wide([*tensors, residual])]
    # A sigmoid is below 1, every other activation below its operand.
    magnitude = max(
        float(ffn.ffn_reference(*positive[:-1], name, positive[-1]).max())
        for name in ("relu", "sigmoid")
    )
    assert_near(found, truth, magnitude, 2 * (width + hidden), dtype)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 150), st.integers(1, 40),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_integer_linear_layers(lead, width, out, by_row, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (*lead, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (out, width), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(lead if by_row else [], generator=generator)
    weight_scale = torch.rand(out, generator=generator)
    bias = normal(generator, out) if biased else None
    tensors = (x, weight, x_scale, weight_scale, bias)
    found = triton_int8_linear.int8_linear(*tensors)
    truth = int8_linear.int8_linear_reference(*tensors)
    torch.testing.assert_close(found, truth, rtol=2**-22, atol=2**-22)


def test_integer_sums_are_exact_to_their_limit():
    x = torch.full((1, 1 << 17), -128, dtype=torch.int8)
    x[0, 0] = -127
    one = torch.tensor(1.0)
    y = triton_int8_linear.int8_linear(x, x.clone(), one, one.reshape(1), None)
    assert float(y) == float(torch.tensor(float((2**17 - 1) * 128**2 + 127**2)))


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_a_nan_stays_one(activation):
    x = torch.tensor([[[[1.0, math.nan, -2.0]]]])
    args = _ARGS.get(activation, [])
    y = triton_conv.conv_act(
        x, torch.ones(1, 1, 1, 1), None, None, [1, 1], [0, 0], [1, 1], activation, args
    )
    assert torch.isnan(y).flatten().tolist() == [False, True, False]


def test_padding_reads_nothing_outside():
    """A control: NaN around the input, in memory, never reaches the output."""
    whole = torch.full((1, 1, 9, 9), math.nan)
    whole[..., 3:6, 3:6] = 1.0
    ones, pair = torch.ones(1, 1, 3, 3), [1, 1]
    y = triton_conv.conv_act(whole[..., 3:6, 3:6], ones, None, None, pair, pair, pair, "none", [])
    assert torch.equal(y, F.conv2d(ones, ones, padding=1))


def test_the_comparison_sees_a_wrong_result():
    """A control: one sum without one of its products, and one element never written."""
    x = normal(torch.Generator().manual_seed(0), 3, 20)
    truth = F.linear(x.double(), x.double())
    magnitude = float(F.linear(x.double().abs(), x.double().abs()).max())
    right = triton_ffn.dense(x, x, None, None, None, "none")
    assert_near(right, truth, magnitude, 20, torch.float32)
    short, unwritten = right.clone(), right.clone()
    short[1, 2] -= x[1, 4] * x[2, 4]
    unwritten[2, 0] = math.nan
    for wrong in (short, unwritten):
        with pytest.raises(AssertionError):
            assert_near(wrong, truth, magnitude, 20, torch.float32)


def test_refuses_what_does_not_fit():
    x, weight = torch.ones(1, 2, 3, 3), torch.ones(4, 3, 1, 1)
    options = ([1, 1], [0, 0], [1, 1], "none", [])
    with pytest.raises(RuntimeError, match=r"x is \[1, 2, 3, 3\] and weight is \[4, 3, 1, 1\]"):
        triton_conv.conv_act(x, weight, None, None, *options)
    with pytest.raises(RuntimeError, match="larger than the input"):
        triton_conv.conv_act(x, torch.ones(4, 2, 5, 5), None, None, *options)
    with pytest.raises(RuntimeError, match=r"residual is \[1, 4, 1, 3\]"):
        triton_conv.conv_act(
            x, torch.ones(4, 2, 1, 1), None, torch.ones(1, 4, 1, 3), *options
        )

"""pooled_linear: the operator equals its reference, in value, gradient, shape and as fx graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from pruna_ir.errors import UsageError
from pruna_ir.kernels.activations import ACTIVATIONS
from pruna_ir.kernels.pooled_linear import KERNEL, pooled_linear, pooled_linear_reference
from tests.kernels.poison import poisoned

ARGS = {"hardtanh": [-0.5, 0.75], "leaky_relu": [0.1]}


def draw(batch, channels, sizes, out, *, biased=True, dtype=torch.float64, seed=0):
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        normal(batch, channels, *sizes), normal(out, channels), normal(out) if biased else None
    ]


_SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@settings(max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 19), _SIZES, st.integers(1, 9),
    st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_fast_path_is_within_rounding_of_the_float64_reference(
    batch, channels, sizes, out, activation, biased, channels_last, seed
):
    tensors = draw(batch, channels, sizes, out, biased=biased, seed=seed)
    single = [None if t is None else t.float() for t in tensors]
    if channels_last and len(sizes) == 2:
        single[0] = single[0].to(memory_format=torch.channels_last)
    wide = [None if t is None else t.double() for t in single]
    args = ARGS.get(activation, [])
    truth = pooled_linear_reference(*wide, activation, args)
    with poisoned():
        found = pooled_linear(*single, activation, args)
    assert found.shape == truth.shape == (batch, out)
    assert found.dtype == torch.float32
    # A mean of n terms rounds n times, a product of c terms c times, each at 2^-24; no activation
    # is steeper than 1.2.
    absolute = [None if t is None else t.abs() for t in wide]
    magnitude = float(pooled_linear_reference(*absolute).max()) + 1
    terms = torch.Size(sizes).numel() + channels + 8
    assert float((found.double() - truth).abs().max()) <= 2 * terms * 2**-24 * magnitude


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference_bit_for_bit_beyond_float32(activation, dtype):
    tensors, args = draw(2, 5, [3, 4], 7, dtype=dtype), ARGS.get(activation, [])
    expected = pooled_linear_reference(*tensors, activation, args)
    assert torch.equal(pooled_linear(*tensors, activation, args), expected)


@settings(max_examples=25)
@given(
    st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 3), st.sampled_from(ACTIVATIONS), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_gradients_at_float64(batch, channels, sizes, out, activation, biased, seed):
    tensors = draw(batch, channels, sizes, out, biased=biased, seed=seed)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def head(x, weight, bias=None):
        return pooled_linear(x, weight, bias, activation, ARGS.get(activation, []))

    assert torch.autograd.gradcheck(head, leaves)


def test_second_gradients_at_float64():
    leaves = [t.requires_grad_() for t in draw(2, 2, [2], 3)]
    assert torch.autograd.gradgradcheck(lambda *t: pooled_linear(*t, "silu"), leaves)


def test_means_what_the_modules_compute():
    x, weight, bias = draw(2, 3, [5, 4], 6)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
    expected = torch.nn.functional.hardswish(torch.nn.functional.linear(pooled, weight, bias))
    found = pooled_linear(x, weight, bias, "hardswish")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(pooled_linear(x * 1.001, weight, bias, "hardswish"), expected)


def test_registration_follows_torch_rules():
    tensors = [t.requires_grad_() for t in draw(2, 5, [3, 4], 7, dtype=torch.float32)]
    torch.library.opcheck(KERNEL.op, (*tensors, "relu", []))
    torch.library.opcheck(KERNEL.op, (*tensors[:2], None))


def test_empty_batch():
    tensors = draw(0, 5, [3, 4], 7, dtype=torch.float32)
    assert pooled_linear(*tensors).shape == (0, 7)


def test_a_nan_is_not_hidden():
    tensors = draw(3, 5, [3, 4], 7, dtype=torch.float32)
    tensors[0][1, 2, 0, 0] = torch.nan
    for activation in ACTIVATIONS:
        found = pooled_linear(*tensors, activation, ARGS.get(activation, []))
        assert torch.isnan(found).all(1).tolist() == [False, True, False]


def test_the_reference_traces_with_proxies():
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, w = (fx.Proxy(graph.placeholder(n), tracer) for n in ("x", "w"))
    x.node.meta["val"] = torch.ones(2, 3, 4, 4)
    graph.output(pooled_linear_reference(x, w, None, "relu").node)
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert targets == ["aten.mean.dim", "aten.linear.default", "aten.relu.default"]


def test_refuses_an_unknown_activation():
    with pytest.raises(UsageError, match="pooled_linear has no activation 'tanh'; it has none"):
        pooled_linear(*draw(2, 3, [4], 5), "tanh")


@pytest.mark.parametrize(
    ("place", "tensor", "match"),
    [
        (0, torch.ones(2, 3).double(), r"x is \[2, 3\]"),
        (1, torch.ones(5, 4).double(), r"weight is \[5, 4\]"),
        (2, torch.ones(1).double(), r"bias is \[1\], weight \[5, 3\]"),
        (2, torch.ones(5), "dtypes differ: torch.float32, torch.float64"),
    ],
)
def test_refuses_what_does_not_fit(place, tensor, match):
    tensors = draw(2, 3, [4], 5)
    tensors[place] = tensor
    with pytest.raises(RuntimeError, match=match):
        pooled_linear(*tensors)

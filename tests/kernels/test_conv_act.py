"""conv_act: the operator equals its reference, in value, gradient, shape and as fx graph."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from pruna_ir.errors import UsageError
from pruna_ir.kernels.activations import ACTIVATIONS
from pruna_ir.kernels.conv_act import KERNEL, conv_act, conv_act_reference
from tests.kernels.poison import poisoned

ARGS = {"hardtanh": [-0.5, 0.75], "leaky_relu": [0.1]}


def draw(spatial: int, size: int, groups: int, dtype: torch.dtype, seed: int = 0):
    """x, weight, bias, residual of a convolution with padding 1 and kernel 3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(2, 2 * groups, *[size] * spatial)
    weight = normal(3 * groups, 2, *[3] * spatial)
    residual = normal(2, 3 * groups, *[size] * spatial)
    return x, weight, normal(3 * groups), residual


def options(spatial: int, groups: int, activation: str):
    ones = [1] * spatial
    return ones, ones, ones, groups, activation, ARGS.get(activation, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference_bit_for_bit(activation, dtype):
    tensors = draw(2, 7, 2, dtype)
    rest = options(2, 2, activation)
    assert torch.equal(conv_act(*tensors, *rest), conv_act_reference(*tensors, *rest))


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3]),
    st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from(["", "before", "after"]),
    st.integers(0, 99),
)  # fmt: skip
def test_equals_the_reference_for_any_shape(
    spatial, size, groups, activation, with_bias, added, seed
):
    x, weight, bias, residual = draw(spatial, size, groups, torch.float64, seed)
    tensors = (x, weight, bias if with_bias else None, residual if added else None)
    rest = (*options(spatial, groups, activation), added == "after")
    assert torch.equal(conv_act(*tensors, *rest), conv_act_reference(*tensors, *rest))


SIDE = st.integers(1, 3)


@st.composite
def geometries(draw, spatial=SIDE, most=4):
    """Sizes, kernel, stride, padding and dilation by dimension; at least one pixel comes out."""
    lists = st.tuples(SIDE, SIDE, st.integers(0, 2), st.integers(1, 2), st.integers(0, most))
    each = [draw(lists) for _ in range(draw(spatial))]
    kernel, stride, padding, dilation, more = (list(n) for n in zip(*each, strict=True))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + m
        for k, p, d, m in zip(kernel, padding, dilation, more, strict=True)
    ]
    return size, kernel, stride, padding, dilation


def drawn(geometry, batch, ins, outs, groups, dtype, seed=0):
    """x, weight, bias, residual."""
    size, kernel, stride, padding, dilation = geometry
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(batch, ins * groups, *size)
    weight, bias = normal(outs * groups, ins, *kernel), normal(outs * groups)
    result = conv_act(x, weight, bias, None, stride, padding, dilation, groups, "none", [])
    return x, weight, bias, normal(*result.shape)


@settings(max_examples=80)
@given(
    geometries(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from(["", "before", "after"]),
    st.integers(0, 99),
)  # fmt: skip
def test_fast_path_is_within_rounding_of_the_float64_reference(
    geometry, batch, ins, outs, groups, activation, biased, added, seed
):
    _, kernel, *lists = geometry
    x, weight, bias, residual = drawn(geometry, batch, ins, outs, groups, torch.float32, seed)
    single = (x, weight, bias if biased else None, residual if added else None)
    wide = [None if t is None else t.double() for t in single]
    rest = (*lists, groups, activation, ARGS.get(activation, []), added == "after")
    truth = conv_act_reference(*wide, *rest)
    with poisoned():
        found = conv_act(*single, *rest)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    # A sum of n products rounds n times, at 2^-24; no activation is steeper than 1.2.
    absolute = [None if t is None else t.abs() for t in wide]
    magnitude = float(conv_act_reference(*absolute, *lists, groups, "none", []).max()) + 1
    terms = ins * math.prod(kernel) + 8
    assert float((found.double() - truth).abs().max()) <= 2 * terms * 2**-24 * magnitude


@settings(max_examples=60)
@given(
    geometries(), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_any_geometry(geometry, batch, ins, groups, seed):
    """Equal to torch's modules; what lies outside of the input is zero."""
    size, kernel, stride, padding, dilation = geometry
    tensors = drawn(geometry, batch, ins, 2, groups, torch.float64, seed)[:3]
    module = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(size) - 1]
    conv = module(ins * groups, 2 * groups, kernel, stride, padding, dilation, groups).double()
    conv.weight.data, conv.bias.data = tensors[1:]
    lists = (stride, padding, dilation)
    found = conv_act(*tensors, None, *lists, groups, "relu", [])
    torch.testing.assert_close(found, conv(tensors[0]).relu().detach(), rtol=1e-12, atol=1e-12)
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        inside = [fake.from_tensor(t) for t in tensors]
        assert conv_act(*inside, None, *lists, groups, "relu", []).shape == found.shape


@settings(max_examples=25)
@given(
    geometries(most=1), st.integers(1, 5), st.integers(1, 2), st.integers(1, 2),
    st.integers(1, 2), st.sampled_from(ACTIVATIONS), st.sampled_from(["", "before", "after"]),
    st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_any_geometry_at_float64(
    geometry, batch, ins, outs, groups, activation, added, seed
):
    tensors = drawn(geometry, batch, ins, outs, groups, torch.float64, seed)
    tensors = [t.requires_grad_() for t in tensors[: 4 if added else 3]]
    rest = (*geometry[2:], groups, activation, ARGS.get(activation, []), added == "after")

    def layer(x, weight, bias, residual=None):
        return conv_act(x, weight, bias, residual, *rest)

    assert torch.autograd.gradcheck(layer, tensors, fast_mode=True)


def test_means_what_the_modules_compute():
    conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = conv(x).detach()
    residual = torch.ones_like(y)
    found = conv_act(
        x, conv.weight, conv.bias, residual, [2, 2], [1, 1], [2, 2], 1, "hardswish", []
    )
    expected = torch.nn.functional.hardswish(y + residual)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, torch.nn.functional.hardswish(y)), "the residual counts"


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_at_float64(activation, last):
    tensors = [t.requires_grad_() for t in draw(1, 4, 1, torch.float64)]
    rest = (*options(1, 1, activation), last)
    assert torch.autograd.gradcheck(lambda *t: conv_act(*t, *rest), tensors)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [2, 3])
def test_gradients_in_two_and_three_dimensions(spatial, groups):
    tensors = [t.requires_grad_() for t in draw(spatial, 2, groups, torch.float64)]
    rest = options(spatial, groups, "silu")
    assert torch.autograd.gradcheck(lambda *t: conv_act(*t, *rest), tensors, fast_mode=True)


def test_second_gradients_at_float64():
    tensors = [t.requires_grad_() for t in draw(1, 3, 1, torch.float64)]
    rest = options(1, 1, "silu")
    assert torch.autograd.gradgradcheck(lambda *t: conv_act(*t, *rest), tensors)


def test_the_place_of_the_residual_counts():
    tensors, rest = draw(2, 5, 1, torch.float64), options(2, 1, "relu")
    after = conv_act(*tensors, *rest, residual_last=True)
    plain = conv_act(*tensors[:3], None, *rest)
    assert torch.equal(after, plain + tensors[3])
    assert float((after - conv_act(*tensors, *rest)).abs().max()) > 0.1


def test_gradients_without_bias_and_residual():
    x, weight, _, _ = (t.requires_grad_() for t in draw(2, 4, 2, torch.float64))
    rest = options(2, 2, "relu6")
    conv_act(x.detach(), weight, None, None, *rest).sum().backward()
    (expected,) = torch.autograd.grad(
        conv_act_reference(x.detach(), weight, None, None, *rest).sum(), [weight]
    )
    assert torch.equal(weight.grad, expected)


def test_registration_follows_torch_rules():
    x, weight, bias, residual = draw(2, 5, 1, torch.float32)
    for t in (x, weight, bias, residual):
        t.requires_grad_()
    torch.library.opcheck(KERNEL.op, (x, weight, bias, residual, *options(2, 1, "relu")))
    torch.library.opcheck(KERNEL.op, (x, weight, None, None, *options(2, 1, "none")))
    torch.library.opcheck(KERNEL.op, (x, weight, bias, residual, *options(2, 1, "gelu"), True))


def test_the_operands_keep_their_values():
    tensors = draw(2, 5, 1, torch.float32)
    copies = [t.clone() for t in tensors]
    conv_act(*tensors, *options(2, 1, "relu"))
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_is_not_hidden(activation):
    x, weight, bias, _ = draw(2, 5, 1, torch.float32)
    x[1, 0, 2, 2] = torch.nan
    found = conv_act(x, weight, bias, None, *options(2, 1, activation))
    assert torch.isnan(found).flatten(1).any(1).tolist() == [False, True]


def test_the_reference_traces_with_proxies():
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, w = (fx.Proxy(graph.placeholder(n), tracer) for n in ("x", "w"))
    graph.output(conv_act_reference(x, w, None, x, [1, 1], [0, 0], [1, 1], 1, "relu6", []).node)
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.add.Tensor", "aten.hardtanh.default"]


def test_refuses_an_unknown_activation():
    with pytest.raises(UsageError, match="no activation 'tanh'; it has none, relu, relu6"):
        conv_act(*draw(2, 5, 1, torch.float32), *options(2, 1, "tanh"))


def test_refuses_wrong_activation_arguments():
    rest = (*options(2, 1, "hardtanh")[:-1], [1.0])
    with pytest.raises(UsageError, match="hardtanh takes 2 numbers, but 1 were given"):
        conv_act(*draw(2, 5, 1, torch.float32), *rest)


@pytest.mark.parametrize("fake", [False, True])
def test_refuses_a_residual_that_broadcasts(fake):
    from torch._subclasses import FakeTensorMode

    tensors = draw(2, 5, 1, torch.float32)
    mode = FakeTensorMode()
    if fake:
        tensors = tuple(mode.from_tensor(t) for t in tensors)
    x, weight, bias, residual = tensors
    with mode if fake else torch.no_grad(), pytest.raises(RuntimeError, match="residual is"):
        conv_act(x, weight, bias, residual[:, :1], *options(2, 1, "relu"))

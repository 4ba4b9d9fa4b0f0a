"""ffn: the operator equals its reference, in value, gradient, shape and as fx graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from pruna_ir.errors import UsageError
from pruna_ir.kernels.ffn import ACTIVATIONS, KERNEL, _onednn, ffn, ffn_reference
from tests.kernels.poison import poisoned


def draw(
    shape, width, hidden, out, *, gated, biased, added=False, dtype=torch.float64, seed=0
):
    """x, w1, b1, w2, b2, gate_weight, gate_bias; with ``added`` the residual behind them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x, w1, w2 = normal(*shape, width), normal(hidden, width), normal(out, hidden)
    biases = [normal(n) if biased else None for n in (hidden, out, hidden)]
    gate = normal(hidden, width) if gated else None
    found = [x, w1, biases[0], w2, biases[1], gate, biases[2] if gated else None]
    return [*found, normal(*shape, out)] if added else found


def run(function, tensors, activation):
    """The block of tensors from `draw`, with a residual where there is one."""
    return function(*tensors[:7], activation, *tensors[7:])


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 9), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_fast_path_is_within_rounding_of_the_float64_reference(
    shape, width, hidden, out, activation, gated, biased, added, seed
):
    tensors = draw(shape, width, hidden, out, gated=gated, biased=biased, added=added, seed=seed)
    single = [None if t is None else t.float() for t in tensors]
    truth = run(ffn_reference, [None if t is None else t.double() for t in single], activation)
    with poisoned():
        found = run(ffn, single, activation)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    # |act(h)| <= |h| (a sigmoid is below 1), so these on absolute values bound every sum; each
    # rounds at 2^-24, and no sum has more than 10 terms (the activation itself is good to a few
    # ulps).
    absolute = [None if t is None else t.double().abs() for t in single]
    magnitude = max(
        float(run(ffn_reference, absolute, name).max()) for name in ("relu", "sigmoid")
    )
    # A sigmoid's slope at 1.702 h carries the error of h.
    assert float((found.double() - truth).abs().max()) <= 32 * 2**-24 * magnitude  # NaN fails


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference_bit_for_bit_beyond_float32(activation, dtype, gated):
    tensors = draw([2, 3], 5, 7, 4, gated=gated, biased=True, added=True, dtype=dtype)
    assert torch.equal(run(ffn, tensors, activation), run(ffn_reference, tensors, activation))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_is_not_hidden(activation, gated):
    tensors = draw([3], 5, 7, 4, gated=gated, biased=True, added=True, dtype=torch.float32)
    tensors[0][1, 2] = torch.nan
    found = run(ffn, tensors, activation)
    assert torch.isnan(found).all(1).tolist() == [False, True, False]


def test_the_operands_keep_their_values():
    tensors = draw([3], 5, 7, 4, gated=True, biased=True, added=True, dtype=torch.float32)
    copies = [t.clone() for t in tensors]
    run(ffn, tensors, "silu")
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


def test_the_residual_counts():
    """A control."""
    tensors = draw([3], 5, 7, 4, gated=False, biased=True, added=True, dtype=torch.float32)
    plain = run(ffn, tensors[:7], "gelu")
    torch.testing.assert_close(run(ffn, tensors, "gelu"), plain + tensors[7])
    assert float((run(ffn, tensors, "gelu") - plain).abs().max()) > 0.1


def test_the_fast_path_reads_tensors_in_any_layout():
    tensors = draw([3, 5], 8, 6, 4, gated=False, biased=True, dtype=torch.float32)
    strided = list(tensors)
    strided[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    strided[1] = tensors[1].t().contiguous().t()
    a, b = _onednn(*tensors, "gelu"), _onednn(*strided, "gelu")
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_empty_batch():
    tensors = draw([0], 5, 7, 4, gated=True, biased=True, dtype=torch.float32)
    assert ffn(*tensors, "silu").shape == (0, 4)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4), st.integers(1, 4),
    st.integers(1, 4), st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_gradients_at_float64(shape, width, hidden, out, activation, gated, biased, added, seed):
    tensors = draw(shape, width, hidden, out, gated=gated, biased=biased, added=added, seed=seed)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def block(*given):
        it = iter(given)
        return run(ffn, [None if t is None else next(it) for t in tensors], activation)

    assert torch.autograd.gradcheck(block, leaves)


def test_second_gradients_at_float64():
    tensors = [t.requires_grad_() for t in draw([2], 2, 3, 2, gated=True, biased=True, added=True)]
    assert torch.autograd.gradgradcheck(lambda *t: run(ffn, t, "silu"), tensors)


def test_gradients_of_one_tensor_alone():
    tensors = draw([2], 3, 4, 2, gated=True, biased=True, added=True)
    for place, tensor in enumerate(tensors):
        leaf = tensor.clone().requires_grad_()
        given = [leaf if place == k else t for k, t in enumerate(tensors)]
        run(ffn, given, "silu").sum().backward()
        (expected,) = torch.autograd.grad(run(ffn_reference, given, "silu").sum(), [leaf])
        assert torch.equal(leaf.grad, expected)


def test_registration_follows_torch_rules():
    for gated in (False, True):
        tensors = draw(
            [2, 3], 5, 7, 4, gated=gated, biased=gated, added=gated, dtype=torch.float32
        )
        for t in tensors:
            if t is not None:
                t.requires_grad_()
        torch.library.opcheck(KERNEL.op, (*tensors[:7], "gelu", *tensors[7:]))


def test_the_activation_counts():
    """A control: the comparison above would see another activation."""
    tensors = draw([3], 5, 7, 4, gated=False, biased=True)
    results = [ffn(*tensors, activation) for activation in ACTIVATIONS]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert float((a - b).abs().max()) > 1e-5


def test_the_reference_traces_with_proxies():
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, w = (fx.Proxy(graph.placeholder(n), tracer) for n in ("x", "w"))
    graph.output(ffn_reference(x, w, None, w, None, w, None, "silu").node)
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    linear = "aten.linear.default"
    assert targets == [linear, linear, "aten.silu.default", "aten.mul.Tensor", linear]


def test_refuses_an_unknown_activation():
    tensors = draw([2], 3, 4, 2, gated=False, biased=False)
    with pytest.raises(UsageError, match="no activation 'tanh'; it has gelu, gelu_tanh, relu"):
        ffn(*tensors, "tanh")


def test_refuses_a_gate_bias_without_a_gate():
    tensors = draw([2], 3, 4, 2, gated=False, biased=False)
    tensors[6] = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(UsageError, match="a gate_bias, but no gate_weight"):
        ffn(*tensors, "relu")


def test_refuses_shapes_that_do_not_fit():
    tensors = draw([2], 3, 4, 2, gated=False, biased=False)
    tensors[3] = tensors[3][:, :-1]
    with pytest.raises(RuntimeError, match=r"w1 \[4, 3\], w2 \[2, 3\]"):
        ffn(*tensors, "relu")


@pytest.mark.parametrize("residual", [torch.zeros(1, 2).double(), torch.zeros(2, 2)])
def test_refuses_a_residual_that_broadcasts_or_has_another_dtype(residual):
    tensors = draw([2], 3, 4, 2, gated=False, biased=False)
    with pytest.raises(RuntimeError, match=r"the result torch.float64 \[2, 2\]"):
        ffn(*tensors, "relu", residual)

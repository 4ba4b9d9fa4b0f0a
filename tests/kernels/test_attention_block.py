"""attention_block: the operator equals its reference: value, gradient, shape, as fx graph."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F  # noqa: N812

from pruna_ir.errors import UsageError
from pruna_ir.kernels.attention import attention_reference
from pruna_ir.kernels.attention_block import (
    KERNEL,
    attention_block,
    attention_block_decomposition,
    attention_block_reference,
)
from tests.kernels.poison import poisoned

MASKS = ("none", "causal", "seen", "added")
HEADS = [(1, 1), (2, 1), (4, 2), (3, 3)]


def draw(
    lead, tokens, width, heads, sizes, out, *,
    mask="none", biased=True, dtype=torch.float64, seed=0,
):  # fmt: skip
    """Arguments of the operator; ``heads`` of queries and keys, ``sizes`` of keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = heads[0] * sizes[0] + heads[1] * sum(sizes)
    x, qkv = normal(*lead, tokens, width), normal(rows, width)
    last = normal(out, heads[0] * sizes[1])
    biases = (normal(rows), normal(out)) if biased else (None, None)
    given = None
    if mask == "seen":
        given = normal(heads[0], tokens, tokens) > 0
    elif mask == "added":
        given = normal(tokens, tokens)
    return [x, qkv, biases[0], last, biases[1], given, *heads, mask == "causal", 0.7]


def floats(arguments, dtype):
    return [
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]


SHAPES = (
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(HEADS), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(1, 7),
    st.sampled_from(MASKS), st.booleans(), st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=50)
@given(*SHAPES)
def test_fast_path_is_within_rounding_of_the_float64_reference(
    lead, tokens, width, heads, sizes, out, mask, biased, seed
):
    single = floats(
        draw(lead, tokens, width, heads, sizes, out, mask=mask, biased=biased, seed=seed),
        torch.float32,
    )
    double = floats(single, torch.float64)
    truth = attention_block_reference(*double)
    with poisoned():
        found = attention_block(*single)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    # Each rounds at 2^-24. Sums have at most 9 + 1 terms (in), 5 (scores) and 20 + 1 (out). The
    # error of a score is below 30 roundings of its terms' magnitude, and is a relative one of its
    # weight and, by way of their sum, of all others; weights sum to one.
    x, qkv, bias, last, out_bias = [None if t is None else t.abs() for t in double[:5]]
    values = float(F.linear(x, qkv, bias).max())
    scores = 0.7 * values**2 * sizes[0] + 4
    magnitude = float(last.sum(-1).max()) * values + (0 if out_bias is None else 4)
    limit = (32 + 64 * scores) * 2**-24 * magnitude
    assert float((found.double() - truth).abs().max()) <= limit  # NaN fails


@settings(max_examples=20)
@given(*SHAPES)
def test_the_reference_is_layers_around_attention(
    lead, tokens, width, heads, sizes, out, mask, biased, seed
):
    """The packed rows are those of queries, keys and values, head by head."""
    given = draw(lead, tokens, width, heads, sizes, out, mask=mask, biased=biased, seed=seed)
    x, qkv, bias, last, out_bias, mask, queries, keys, causal, scale = given
    counts = [queries * sizes[0], keys * sizes[0], keys * sizes[1]]
    biases = [None] * 3 if bias is None else bias.split(counts)
    q, k, v = (
        F.linear(x, weight, b).unflatten(-1, (count, -1)).transpose(-3, -2)
        for weight, b, count in zip(qkv.split(counts), biases, (queries, keys, keys), strict=True)
    )
    mixed = attention_reference(q, k, v, mask, causal, scale).transpose(-3, -2).flatten(-2)
    expected = F.linear(mixed, last, out_bias)
    torch.testing.assert_close(attention_block_reference(*given), expected)
    torch.testing.assert_close(attention_block_decomposition(*given), expected)
    torch.testing.assert_close(attention_block(*given), expected)


@pytest.mark.parametrize("mask", MASKS)
def test_half_precision_is_near(mask):
    given = draw([3], 5, 6, (4, 2), (3, 2), 7, mask=mask)
    truth = attention_block_reference(*given)
    found = attention_block(*floats(given, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert float((found.double() - truth).norm() / truth.norm()) < 0.1


@pytest.mark.parametrize("function", [attention_block, attention_block_reference])
def test_a_token_that_is_masked_wholly_gives_the_bias(function):
    x, qkv, bias, last, out_bias, _, *rest = draw([2], 4, 3, (2, 1), (3, 2), 5)
    seen = torch.ones(4, 4, dtype=torch.bool)
    seen[1] = False
    x.requires_grad_()
    y = function(x, qkv, bias, last, out_bias, seen, *rest)
    assert torch.equal(y[:, 1], out_bias.expand(2, -1))
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_nan_is_not_hidden():
    given = draw([2], 4, 3, (2, 2), (3, 3), 5, mask="added", dtype=torch.float32)
    given[0][0, 1, 2] = math.nan
    found = attention_block(*given)
    assert torch.isnan(found[0]).all()
    assert not torch.isnan(found[1]).any()


@pytest.mark.parametrize("mask", MASKS)
def test_reads_tensors_in_any_layout(mask):
    given = draw([3], 5, 6, (4, 2), (3, 3), 7, mask=mask, dtype=torch.float32)
    strided = list(given)
    strided[0] = given[0].transpose(0, 1).contiguous().transpose(0, 1)
    strided[1] = given[1].t().contiguous().t()
    copies = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    torch.testing.assert_close(attention_block(*strided), attention_block(*given))
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True)
               if isinstance(a, torch.Tensor))  # fmt: skip


def test_empty_batch():
    given = draw([0], 4, 3, (2, 1), (3, 2), 5, dtype=torch.float32)
    assert attention_block(*given).shape == (0, 4, 5)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 2), max_size=1), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from(HEADS[:3]), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(1, 2), st.sampled_from(MASKS), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_gradients_at_float64(lead, tokens, width, heads, sizes, out, mask, biased, seed):
    given = draw(lead, tokens, width, heads, sizes, out, mask=mask, biased=biased, seed=seed)
    places = [
        place for place, t in enumerate(given)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]  # fmt: skip

    def block(*leaves):
        replaced = dict(zip(places, leaves, strict=True))
        return attention_block(*(replaced.get(place, t) for place, t in enumerate(given)))

    assert torch.autograd.gradcheck(block, [given[place].requires_grad_() for place in places])


def test_second_gradients_at_float64():
    x, qkv, bias, last, out_bias, *rest = draw([1], 2, 2, (2, 1), (1, 2), 2)
    leaves = [t.requires_grad_() for t in (x, qkv, bias, last, out_bias)]
    assert torch.autograd.gradgradcheck(lambda *t: attention_block(*t, *rest), leaves)


@pytest.mark.parametrize(("mask", "lead"), [("causal", [2]), ("added", [2, 3])])
def test_registration_follows_torch_rules(mask, lead):
    given = draw(lead, 5, 6, (4, 2), (3, 2), 7, mask=mask, dtype=torch.float32)
    for t in given[:5]:
        t.requires_grad_()
    torch.library.opcheck(KERNEL.op, tuple(given))


@pytest.mark.parametrize(
    ("place", "other"),
    [(2, None), (4, None), (5, None), (8, True), (9, 0.701), ("swap", None)],
)
def test_every_argument_counts(place, other):
    """A control: the comparisons above would see another argument."""
    given = draw([2], 5, 6, (2, 2), (3, 3), 4, mask="seen")
    base = attention_block(*given)
    if place == "swap":  # keys and values exchanged
        q, k, v = given[1].split(6)
        given[1] = torch.cat([q, v, k])
    else:
        given[place] = other
    given[5] = None if given[8] else given[5]
    assert float((base - attention_block(*given)).abs().max()) > 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("function", [KERNEL.reference, KERNEL.decomposition])
def test_traces_with_proxies_into_aten_alone(function, causal):
    from torch._subclasses import FakeTensorMode

    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = []
    for name, shape in (("x", (2, 5, 6)), ("w", (22, 6)), ("o", (7, 8))):
        node = graph.placeholder(name)
        with FakeTensorMode():
            node.meta["val"] = torch.empty(shape)
        proxies.append(fx.Proxy(node, tracer))
    x, w, o = proxies
    graph.output(function(x, w, None, o, None, None, 4, 2, causal, 0.5).node)
    targets = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert targets.count("aten.linear.default") == 2
    assert all(target.startswith("aten.") for target in targets)
    fused = "aten.scaled_dot_product_attention.default" in targets
    assert fused is (function is KERNEL.decomposition)


def test_refuses_a_mask_beside_the_causal_one():
    given = draw([2], 5, 3, (2, 2), (3, 3), 4, mask="seen")
    given[8] = True
    with pytest.raises(UsageError, match="a mask or causal=True, not both"):
        attention_block(*given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.zeros(21, 6)}, r"qkv_weight \[21, 6\], out_weight \[7, 8\] with 4 heads and 2"),
        ({1: torch.zeros(22, 5)}, r"x is \[2, 5, 6\], qkv_weight \[22, 5\]"),
        ({3: torch.zeros(7, 9)}, r"out_weight \[7, 9\]"),
        ({7: 3}, "4 heads of queries cannot share 3 of keys"),
        ({2: torch.zeros(19)}, r"qkv_bias is \[19\], its weight \[22, 6\]"),
        ({4: torch.zeros(1)}, r"out_bias is \[1\], its weight \[7, 8\]"),
        ({0: torch.zeros(2, 5, 6).double()}, "dtypes differ: torch.float32, torch.float64"),
        ({5: torch.zeros(5, 7)}, r"the mask is \[5, 7\], the scores are \[2, 4, 5, 5\]"),
        ({5: torch.zeros(5, 5).double()}, "neither bool nor torch.float32"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    given = draw([2], 5, 6, (4, 2), (3, 2), 7, dtype=torch.float32)
    for place, value in change.items():
        given[place] = value
    with pytest.raises(RuntimeError, match=match):
        attention_block(*given)

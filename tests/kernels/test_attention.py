"""attention: the operator equals its reference, in value, gradient, shape and as fx graph."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.kernels.attention import (
    KERNEL,
    attention,
    attention_decomposition,
    attention_reference,
)
from tests.kernels.poison import poisoned

MASKS = ("none", "causal", "seen", "added")


def draw(lead, heads, queries, keys, size, out, *, mask="none", dtype=torch.float64, seed=0):
    """query, key, value, mask, causal, scale; ``heads`` is of queries and of keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    q = normal(*lead, heads[0], queries, size)
    k, v = normal(*lead, heads[1], keys, size), normal(*lead, heads[1], keys, out)
    given = None
    if mask == "seen":
        given = normal(heads[0], queries, keys) > 0
    elif mask == "added":
        given = normal(queries, keys)
    return [q, k, v, given, mask == "causal", 0.7]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 5), max_size=2), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5),
    st.sampled_from(MASKS), st.integers(0, 99),
)  # fmt: skip
def test_fast_path_is_within_rounding_of_the_float64_reference(
    lead, heads, queries, keys, size, out, mask, seed
):
    inputs = draw(lead, heads, queries, keys, size, out, mask=mask, seed=seed)
    single = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
              for t in inputs]  # fmt: skip
    truth = attention_reference(
        *[t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
          for t in single]
    )  # fmt: skip
    with poisoned():
        found = attention(*single)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    assert not torch.isnan(found).any()
    # A score is a sum of at most 9 products below 40; an error in it is a relative one of its
    # weight. Weights sum to one, so the result's magnitude is that of the values.
    magnitude = float(single[2].abs().max())
    assert float((found.double() - truth).abs().max()) <= 64 * 40 * 2**-24 * magnitude


@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_decomposition(mask):
    inputs = draw([2], (4, 2), 5, 6, 3, 4, mask=mask)
    torch.testing.assert_close(attention(*inputs), attention_decomposition(*inputs))


def test_heads_share_keys_in_a_row():
    q, k, v, *rest = draw([2], (4, 2), 5, 6, 3, 4)
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, k, v, *rest), attention(q, *repeated, *rest))


@pytest.mark.parametrize("function", [attention, attention_reference])
@pytest.mark.parametrize("added", [False, True])
def test_a_row_that_is_masked_wholly_gives_zeros(function, added):
    q, k, v, _, causal, scale = draw([2], (2, 2), 3, 4, 5, 2)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    seen = torch.ones(3, 4, dtype=torch.bool)
    seen[1] = False
    mask = torch.zeros(3, 4, dtype=torch.float64).masked_fill(~seen, -math.inf) if added else seen
    y = function(q, k, v, mask, causal, scale)
    assert bool((y[..., 1, :] == 0).all())
    assert bool((y[..., 0, :] != 0).all())
    y.square().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))
    assert bool((q.grad[..., 1, :] == 0).all())


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_a_nan_is_not_masked_away(function):
    q, k, v, *_ = draw([1], (1, 1), 3, 4, 5, 2)
    q[..., 1, 0] = math.nan
    y = function(q, k, v, torch.zeros(3, 4, dtype=torch.float64), causal=False, scale=1.0)
    assert bool(torch.isnan(y[..., 1, :]).all())


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 2), max_size=1), st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from(MASKS), st.integers(0, 99),
)  # fmt: skip
def test_gradients_at_float64(lead, heads, queries, keys, size, out, mask, seed):
    q, k, v, given, causal, scale = draw(
        lead, heads, queries, keys, size, out, mask=mask, seed=seed
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if mask == "added":
        leaves.append(given.requires_grad_())

    def run(*t):
        return attention(*t[:3], t[3] if len(t) > 3 else given, causal, scale)

    assert torch.autograd.gradcheck(run, leaves)


def test_second_gradients_at_float64():
    q, k, v, *rest = draw([1], (2, 1), 2, 3, 2, 2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, *rest), leaves)


@pytest.mark.parametrize(
    ("lead", "mask"), [*(([2, 3], mask) for mask in MASKS), ([], "added"), ([2], "seen")]
)
def test_registration_follows_torch_rules(lead, mask):
    inputs = draw(lead, (4, 2), 5, 6, 3, 4, mask=mask, dtype=torch.float32)
    for t in inputs[:3]:
        t.requires_grad_()
    torch.library.opcheck(KERNEL.op, tuple(inputs))


def test_without_heads():
    q, k, v, *rest = (t[0] if isinstance(t, torch.Tensor) else t
                      for t in draw([], (1, 1), 3, 4, 5, 2))  # fmt: skip
    assert attention(q, k, v, *rest).shape == (3, 2)
    torch.library.opcheck(KERNEL.op, (q, k, v, *rest))


@pytest.mark.parametrize("other", ["scale", "mask", "causal"])
def test_every_argument_counts(other):
    """A control: the comparisons above would see another argument."""
    q, k, v, mask, _, scale = draw([2], (2, 2), 5, 5, 3, 4, mask="seen")
    base = attention(q, k, v, mask, causal=False, scale=scale)
    changed = {
        "scale": lambda: attention(q, k, v, mask, causal=False, scale=scale * 1.001),
        "mask": lambda: attention(q, k, v, None, causal=False, scale=scale),
        "causal": lambda: attention(q, k, v, None, causal=True, scale=scale),
    }[other]()
    assert float((base - changed).abs().max()) > 1e-6


def test_refuses_a_mask_beside_the_causal_one():
    inputs = draw([2], (2, 2), 5, 5, 3, 4, mask="seen")
    inputs[4] = True
    with pytest.raises(UsageError, match="a mask or causal=True, not both"):
        attention(*inputs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: torch.zeros(2, 2, 6, 9)}, r"query is \[2, 4, 5, 3\], key \[2, 2, 6, 9\]"),
        ({1: torch.zeros(2, 3, 6, 3), 2: torch.zeros(2, 3, 6, 4)}, "4 heads of queries cannot"),
        ({3: torch.zeros(5, 7)}, r"the mask is \[5, 7\], the scores are \[2, 4, 5, 6\]"),
        ({3: torch.zeros(5, 6).double()}, "neither bool nor torch.float32"),
        ({1: torch.zeros(2, 2, 6, 3).double()}, "key torch.float64"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    inputs = draw([2], (4, 2), 5, 6, 3, 4, dtype=torch.float32)
    for place, tensor in change.items():
        inputs[place] = tensor
    with pytest.raises(RuntimeError, match=match):
        attention(*inputs)

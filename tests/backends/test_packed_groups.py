"""Products that read one value run as one, where nobody minds the strides of its slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.backends.packed_program import PackedProgram
from tests.backends.test_packed_program import captured, check, layers_of

F = nn.functional


def attention(x, q, k, v, out):
    """Two heads."""
    n = x.shape[1]
    heads = [layer(x).reshape(-1, n, 2, layer.out_features // 2).transpose(1, 2)
             for layer in (q, k, v)]  # fmt: skip
    y = F.scaled_dot_product_attention(*heads)
    return out(y.transpose(1, 2).reshape(-1, n, v.out_features))


def projections(size=6, out=4, *, bias=(True, True, True)):
    widths = (size, size, out)
    return [nn.Linear(5, w, bias=b) for w, b in zip(widths, bias, strict=True)]


def products(packed: PackedProgram) -> int:
    return sum(
        "mkldnn._linear_pointwise" in str(node.target) for node in packed._module.graph.nodes
    )


@settings(max_examples=10)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 4),
    st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(1, 5), st.integers(0, 99),
)  # fmt: skip
def test_query_key_and_value_are_one_product(tokens, size, out, bias, batch, seed):
    layers = [*projections(2 * size, 2 * out, bias=bias), nn.Linear(2 * out, 5)]
    packed = check(captured(attention, *layers, shape=(2, tokens, 5), seed=seed), batch, seed)
    assert products(packed) == 2
    assert layers_of(packed)[0] == "linear, in one product with layers.1, layers.2"


@pytest.mark.parametrize("activation", [F.silu, torch.relu, torch.sigmoid])
def test_gate_and_value_are_one_product(activation):
    packed = check(captured(
        lambda x, a, b, c: c(activation(a(x)) * b(x)), nn.Linear(5, 7), nn.Linear(5, 7),
        nn.Linear(7, 3), shape=(2, 3, 5),
    ))  # fmt: skip
    assert products(packed) == 2


def test_weights_stored_either_way_are_joined():
    def f(x, a, b):
        return torch.mm(x, a.weight.t().contiguous()) * torch.addmm(b.bias, x, b.weight.t())

    packed = check(captured(f, nn.Linear(5, 4), nn.Linear(5, 4), shape=(2, 5)))
    assert products(packed) == 1


APART = {
    "a result of the program": lambda x, a, b: (a(x), b(x)),
    "a view that is a result": lambda x, a, b: (a(x).unsqueeze(1), b(x).exp()),
    "torch's view": lambda x, a, b: (a(x).exp(), torch.ops.aten.view.default(b(x), [-1])),
    "a sum in the product's loop": lambda x, a, b: (a(x) + x).exp() * b(x),
    "an activation in the product's loop": lambda x, a, b: F.gelu(a(x)) * b(x),
    "other operands": lambda x, a, b: a(x).exp() * b(x.exp()),
    "an operator that is not known": lambda x, a, b: a(x).cumsum(-1) * b(x).exp(),
}


@pytest.mark.parametrize("case", APART)
def test_others_stay_apart(case):
    layers = nn.Linear(5, 5), nn.Linear(5, 5)
    packed = check(captured(APART[case], *layers, shape=(2, 3, 5)))
    assert products(packed) == 2
    assert not any("one product" in row.detail for row in packed.rows)


def test_the_slices_are_told_apart():
    """A control: the comparison would see exchanged slices."""
    program = captured(
        lambda x, a, b: a(x).exp() / b(x).exp(), nn.Linear(5, 4), nn.Linear(5, 4), shape=(2, 5)
    )
    packed = check(program)
    (first, second) = [
        node for node in packed._module.graph.nodes
        if str(node.target) == "aten.slice.Tensor"
    ]  # fmt: skip
    first.args, second.args = second.args, first.args
    packed._module.recompile()
    packed._function = type(packed._module).forward
    x = torch.randn(3, 5)
    assert not torch.allclose(packed(x)[0], program(x)[0])

"""Layers as matrices: patches times matrix is what the operator computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.passes.linear_layers import FORMS, Layer, layer_at, tail, why_no_matrix

aten = torch.ops.aten


def only_layer(module, x):
    program = capture(module.eval(), (x,))
    (node,) = (n for n in program.calls() if n.target in FORMS)
    return layer_at(program, node)


def agrees(layer, x):
    """Whether patches times matrix plus bias is the operator's own result."""
    y = layer.program(x)[0].double()
    rows = layer.rows(y)
    weight = layer.program.tensor(str(layer.weight.target)).detach()
    patches = layer.patches(x, torch.arange(len(rows))).double()
    product = torch.einsum("pgk,gok->pgo", patches, layer.matrix(weight.double()))
    if layer.bias is not None:
        bias = layer.program.tensor(str(layer.bias.target)).detach().double()
        product = product + bias.reshape(layer.groups, -1)
    again = layer.weight_of(layer.matrix(weight), weight.shape)
    return torch.allclose(product, rows, atol=1e-4) and torch.equal(again, weight)


@given(
    rank=st.integers(1, 3), kernel=st.integers(1, 3), stride=st.integers(1, 3),
    padding=st.one_of(st.integers(0, 2), st.just("valid")), dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]), bias=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_convolutions_of_every_rank(
    rank, kernel, stride, padding, dilation, groups, bias, seed
):
    torch.manual_seed(seed)
    made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    module = made(
        6, 3 * groups, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=bias,
    )  # fmt: skip
    x = torch.randn(2, 6, *[7, 8, 6][:rank])
    assert agrees(only_layer(module, x), x)


def test_same_padding_of_an_even_kernel_is_wider_on_the_right():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 9, 7)
    assert agrees(only_layer(nn.Conv2d(2, 5, (2, 4), padding="same", dilation=(1, 2)), x), x)


def test_linear_layers_over_tokens():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    assert agrees(only_layer(nn.Linear(3, 4), x), x)


class Product(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.operator = operator

    def forward(self, x):
        if self.operator is torch.addmm:
            return torch.addmm(self.bias, x, self.weight)
        return self.operator(x, self.weight)


@pytest.mark.parametrize("operator", [torch.addmm, torch.mm, torch.matmul])
def test_products_with_a_stored_matrix(operator):
    x = torch.randn(5, 3)
    assert agrees(only_layer(Product(operator), x), x)


def test_products_of_computed_tensors_are_no_layers():
    class Attention(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2)

    program = capture(Attention(), (torch.randn(2, 3, 4),))
    assert [layer_at(program, node) for node in program.calls(aten.matmul.default)] == [None]


def test_reasons_against_a_matrix():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)

        def forward(self, x):
            return self.one(self.one(x)) @ (2 * self.one.weight)

    program = capture(Tied(), (torch.randn(2, 3),))
    reasons = [why_no_matrix(Layer(program, n)) for n in program.calls() if n.target in FORMS]
    assert reasons == [
        "its weight is also read by linear_1, mul",
        "its weight is also read by linear, mul",
        "its weight is computed in the graph",
    ]
    transposed = only_layer(nn.ConvTranspose2d(2, 3, 2), torch.randn(2, 2, 4, 4))
    assert why_no_matrix(transposed) == "it is a transposed convolution"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = torch.relu(x)
        return torch.relu(self.norm(self.conv(x)) + x)


def test_the_tail_runs_to_the_residual_addition():
    program = capture(Block().eval(), (torch.randn(2, 3, 5, 5),))
    (conv,) = program.calls(aten.conv2d.default)
    whole, branch = tail(program, conv, residual=True), tail(program, conv, residual=False)
    assert [str(n.target) for n in whole.nodes] == ["aten.batch_norm.default", "aten.add.Tensor"]
    assert whole.nodes[:1] == branch.nodes == (branch.norm,)
    scale = branch.scale(program, 3)
    assert torch.allclose(scale, torch.full((3,), (1 + 1e-5) ** -0.5, dtype=torch.float64))


def test_the_tail_ends_where_a_second_reader_looks():
    class Peeking(Block):
        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + x, y

    program = capture(Peeking().eval(), (torch.randn(2, 3, 5, 5),))
    (conv,) = program.calls(aten.conv2d.default)
    assert tail(program, conv, residual=True).nodes == ()

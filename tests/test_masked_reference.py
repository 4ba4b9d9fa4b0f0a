"""The masked reference against independent ground truths: hand-cut modules and plain execution."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import capture, masked_operators, masked_reference
from pruna_ir.equivalence import run_float64
from pruna_ir.errors import UnsupportedError
from pruna_ir.masked_operators import Masked, masked
from pruna_ir.masked_reference import MaskedOracle, survivors

KEPT = [0, 2, 5]
GONE = (1, 3, 4)


def reference(module, x, removed):
    program = capture(module.double().eval(), (x,))
    (result,) = masked_reference.masked_reference(program, (x,), removed)
    return result


def inputs(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def test_nothing_removed_is_plain_execution():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    program = capture(module, (inputs(3, 4).float(),))
    x = inputs(5, 4)
    assert torch.equal(MaskedOracle({})(program, (x,))[0], run_float64(program, (x,))[0])


def cut(layer, dim):
    """A layer's weight (and the bias of a cut output) without what is gone."""
    weight = layer.weight.index_select(dim, torch.tensor(KEPT))
    bias = layer.bias[KEPT] if dim == 0 else layer.bias
    return weight, bias


def test_linear_layers_agree_with_cut_weights():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 6), nn.Linear(6, 2)
    x = inputs(3, 4)
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    result = reference(nn.Sequential(a, nn.Sigmoid(), b), x, removed)
    expected = F.linear(torch.sigmoid(F.linear(x, *cut(a, 0))), *cut(b, 1))
    assert torch.allclose(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("norm", "functional"),
    [
        (nn.LayerNorm(6), lambda y, w, b: F.layer_norm(y, (3,), w, b)),
        (nn.RMSNorm(6, eps=1e-5), lambda y, w, _: F.rms_norm(y, (3,), w, 1e-5)),
    ],
)
def test_norms_take_the_statistics_of_the_survivors(norm, functional):
    torch.manual_seed(0)
    a, b, x = nn.Linear(4, 6), nn.Linear(6, 2), inputs(3, 4)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    removed |= {f"1.{name}": {0: GONE} for name, _ in norm.named_parameters()}
    result = reference(nn.Sequential(a, norm, b), x, removed)
    bias = getattr(norm, "bias", None)
    bias = None if bias is None else bias[KEPT]
    y = functional(F.linear(x, *cut(a, 0)), norm.weight[KEPT], bias)
    assert torch.allclose(result, F.linear(y, *cut(b, 1)), rtol=1e-12, atol=1e-12)


def test_group_norm_takes_the_survivors_of_each_group():
    torch.manual_seed(0)
    a, norm, b = nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)
    nn.init.normal_(norm.weight)
    x = inputs(2, 3, 4, 4)
    gone, kept = (1, 3, 5), [0, 2, 4]
    removed = {name: {0: gone} for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    result = reference(nn.Sequential(a, norm, b), x, removed | {"2.weight": {1: gone}})
    y = F.conv2d(x, a.weight[kept], a.bias[kept])
    y = F.group_norm(y, 3, norm.weight[kept], norm.bias[kept])
    expected = F.conv2d(y, b.weight[:, kept], b.bias)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


class Statistics(nn.Module):
    def __init__(self, statistic):
        super().__init__()
        self.a, self.statistic = nn.Linear(4, 6), statistic

    def forward(self, x):
        return self.statistic(self.a(x))


STATISTICS = {
    "mean": lambda y: y.mean(-1),
    "mean-keepdim": lambda y: y.mean(-1, keepdim=True),
    "sum": lambda y: y.sum(-1),
    "amax": lambda y: (-y.square()).amax(-1),
    "amin": lambda y: y.square().amin(-1),
    "var": lambda y: y.var(-1),
    "biased var": lambda y: y.var(-1, unbiased=False),
    "norm": lambda y: torch.linalg.vector_norm(y, dim=-1),
    "softmax": lambda y: (torch.softmax(y, -1) * y).sum(-1),
    "new": lambda y: (y + y.new_ones(3, 1)).sum(-1),
    "rms": lambda y: (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).sum(-1),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_survivors(name):
    torch.manual_seed(0)
    module, x = Statistics(STATISTICS[name]), inputs(3, 4)
    result = reference(module, x, {"a.weight": {0: GONE}, "a.bias": {0: GONE}})
    expected = STATISTICS[name](F.linear(x, *cut(module.a, 0)))
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


class Heads(nn.Module):
    """Two heads of three through scaled dot-product attention."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = (f(x).view(-1, 5, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 6))


def test_a_removed_head_adds_nothing():
    torch.manual_seed(0)
    module, x = Heads(), inputs(2, 5, 4)
    gone = (0, 1, 2)
    removed = {f"{n}.{p}": {0: gone} for n in "qkv" for p in ("weight", "bias")}
    result = reference(module, x, removed | {"out.weight": {1: gone}})
    q, k, v = (F.linear(x, f.weight[3:], f.bias[3:]) for f in (module.q, module.k, module.v))
    y = F.scaled_dot_product_attention(q, k, v)
    expected = F.linear(y, module.out.weight[:, 3:], module.out.bias)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_a_removed_head_size_keeps_the_scale():
    torch.manual_seed(0)
    module, x = Heads(), inputs(2, 5, 4)
    gone = (1, 4)
    removed = {f"{n}.{p}": {0: gone} for n in "qk" for p in ("weight", "bias")}
    result = reference(module, x, removed)
    q, k, v = (f(x).view(-1, 5, 2, 3).transpose(1, 2) for f in (module.q, module.k, module.v))
    y = F.scaled_dot_product_attention(q[..., [0, 2]], k[..., [0, 2]], v, scale=3**-0.5)
    expected = module.out(y.transpose(1, 2).reshape(-1, 5, 6))
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_what_removal_leaves_of_each_value_is_traced():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    program = capture(module, (inputs(3, 4).float(),))
    seen = {}
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    x = inputs(3, 4)
    MaskedOracle(removed).trace(program, (x,), lambda node, value: seen.update({node.name: value}))
    expected = F.linear(x, *(t.double() for t in cut(module[0], 0)))
    assert torch.allclose(seen["linear"], expected)
    assert {name: list(value.shape) for name, value in seen.items()} == {
        "linear": [3, 3],
        "relu": [3, 3],
        "linear_1": [3, 2],
    }


def test_dead_elements_never_leak():
    value = torch.tensor([1.0, float("nan"), float("inf")])
    pair = masked(value, torch.tensor([True, False, False]))
    assert pair.value.tolist() == [1.0, 0.0, 0.0]
    assert survivors(pair).tolist() == [1.0]
    assert masked(torch.ones(2), torch.tensor([True, True])).alive is None
    assert Masked(torch.ones(2)).mask.all()


def test_an_output_that_would_be_dead_in_part_is_refused():
    module = nn.Linear(4, 6)
    with pytest.raises(UnsupportedError, match="linear = aten.linear.default .* dead in part"):
        reference(module, inputs(3, 4), {"weight": {0: GONE}, "bias": {0: GONE}})


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda y: torch.linalg.matrix_exp(y.unsqueeze(1) * y.unsqueeze(2)), "is not defined"),
        (lambda y: y.argmax(-1), "mixes dead elements with alive ones"),
        (lambda y: y.sort(-1)[0], "mixes dead elements with alive ones"),
        (lambda y: F.avg_pool1d(y.unsqueeze(1), 2), "mixes dead elements with alive ones"),
    ],
)
def test_what_it_cannot_know_is_refused_by_node(operator, message):
    with pytest.raises(UnsupportedError, match=message):
        reference(Statistics(operator), inputs(3, 4), {"a.weight": {0: GONE}, "a.bias": {0: GONE}})


def test_it_shares_no_code_with_the_analysis():
    for module in (masked_reference, masked_operators):
        tree = ast.parse(inspect.getsource(module))
        names = [
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            + [alias.name for alias in node.names]
        ]
        assert not [name for name in names if "coupling" in name]

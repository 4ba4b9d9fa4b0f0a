"""fuse-pooled-heads: a mean over all positions, the layer behind it and its activation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.decompose import decompose
from pruna_ir.passes import fuse_pooled_heads
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_pooled_heads import FusePooledHeads
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import canonical, targets

FUSED = "pruna.pooled_linear"


class Net(nn.Module):
    def __init__(self, function, channels=3, out=4, *, bias=True):
        super().__init__()
        self.function, self.layer = function, nn.Linear(channels, out, bias=bias)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.function(x, self.layer)


def program_of(function, shape=(2, 3, 5, 4), seed=0, *, train=False, bias=True) -> Program:
    torch.manual_seed(seed)
    net = Net(function, shape[1] if len(shape) > 2 else shape[-1], bias=bias)
    return apply(Canonicalize(), capture(net, (torch.randn(shape),), train=train)).program


def fused(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FusePooledHeads(), program)
    verify(result.program)
    report = check(FusePooledHeads(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FusePooledHeads(), result.program).modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def pool(x):
    return F.adaptive_avg_pool2d(x, 1)


def test_before_and_after():
    result = fused(program_of(lambda x, layer: F.hardswish(layer(pool(x).flatten(1)))))
    assert print_program(result.program) == (
        "program(x: float32[batch, 3, 5, 4]) {\n"
        "  %pooled_linear = pruna.pooled_linear(%x, @layer.weight, @layer.bias, "
        "activation=hardswish) : float32[batch, 4]\n"
        "  return output=%pooled_linear\n"
        "}\n"
        "@layer.bias: float32[4]\n"
        "@layer.weight: float32[4, 3]\n"
    )
    (remark,) = result.remarks
    assert remark.message == "fused mean, linear layer, hardswish into pooled_linear"


@pytest.mark.parametrize(
    ("name", "between"),
    [("resnet", None), ("mobilenet_v3", "hardswish"), ("efficientnet", None), ("densenet", None)],
)
def test_fires_on_real_models(name, between):
    result = fused(canonical(name))
    assert targets(result.program).count(FUSED) == 1
    assert not missed(result)
    (node,) = (n for n in result.program.calls() if "pooled_linear" in str(n.target))
    assert (between in node.args) is (between is not None)


SPELLINGS = {
    "adaptive, flatten": lambda x, f: f(torch.flatten(pool(x), 1)),
    "adaptive, squeeze": lambda x, f: f(pool(x).squeeze(-1).squeeze(-1)),
    "adaptive, squeeze of two": lambda x, f: f(pool(x).squeeze((2, 3))),
    "adaptive, reshape": lambda x, f: f(pool(x).reshape(x.shape[0], -1)),
    "adaptive, index": lambda x, f: f(pool(x)[:, :, 0, 0]),
    "mean": lambda x, f: f(x.mean((2, 3))),
    "mean, from the end": lambda x, f: f(x.mean([-1, -2])),
    "mean, kept": lambda x, f: f(x.mean((2, 3), keepdim=True).flatten(1)),
    "mean of means": lambda x, f: f(x.mean(2).mean(-1)),
    "mean of a flat image": lambda x, f: f(x.flatten(2).mean(-1)),
    "windows of whole images": lambda x, f: f(F.avg_pool2d(x, (5, 4)).flatten(1)),
    "dropout": lambda x, f: f(F.dropout(x.mean((2, 3)), 0.5, training=False)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    result = fused(program_of(SPELLINGS[spelling]))
    assert targets(result.program).count(FUSED) == 1
    assert "aten.linear" not in targets(result.program)


class Stored(nn.Module):
    """A layer whose weight is [in, out]."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x.mean((2, 3)), self.weight)


def test_weights_of_addmm_are_transposed_under_a_name_of_their_own():
    program = capture(Stored(), (torch.randn(2, 3, 5, 4),))
    result = fused(program)
    assert targets(result.program) == [FUSED]
    turned = result.program.tensor("weight_transposed")
    assert torch.equal(turned, program.tensor("weight").t())
    assert turned.requires_grad


_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, -0.25, 0.5),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@settings(max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from(sorted(_ACTIVATIONS)),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_head(spatial, channels, size, activation, adaptive, bias, seed):
    pools = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)

    def f(x, layer):
        pooled = pools[spatial - 1](x, 1) if adaptive else x.mean(tuple(range(2, spatial + 2)))
        return _ACTIVATIONS[activation](layer(pooled.flatten(1)))

    result = fused(program_of(f, (2, channels, *[size] * spatial), seed, bias=bias))
    assert targets(result.program) == [FUSED]


# -- refusals ----------------------------------------------------------------------------------


def _pool_read_twice(x, layer):
    p = pool(x)
    return layer(p.flatten(1)) + p.sum()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_pool_read_twice, "adaptive_avg_pool2d is also read by sum_1"),
        (lambda x, f: f(x.amax((2, 3))), "amax takes the largest value, not the mean"),
        (
            lambda x, f: f(x.permute(0, 2, 3, 1).mean((1, 2))),
            "mean takes the mean over dimensions [1, 2], not over all behind the channels",
        ),
        (
            lambda x, f: f(torch.tanh(x.mean((2, 3)))),
            "tanh stands between the pool mean and the layer",
        ),
        (
            lambda x, f: f(F.layer_norm(x.mean((2, 3)), [3])),
            "layer_norm stands between the pool mean and the layer",
        ),
        (
            lambda x, f: f(F.adaptive_avg_pool2d(x, (2, 1)).flatten(2).mT),
            "adaptive_avg_pool2d leaves [2, 1] positions, not one",
        ),
        (
            lambda x, f: f(x.mean((2, 3), keepdim=True).permute(0, 2, 3, 1)),
            "permute stands between the pool mean and the layer",
        ),
        (
            lambda x, f: f(F.avg_pool2d(x, 5, padding=2, stride=9).flatten(1)),
            "avg_pool2d averages windows of [5, 5], not whole images",
        ),
        (
            lambda x, f: torch.addmm(f.bias, x.mean((2, 3)), f.weight.exp().t()),
            "the weight of addmm is computed in the graph",
        ),
        (
            lambda x, f: torch.addmm(f.bias, x.mean((2, 3)), f.weight.t(), alpha=2),
            "addmm has alpha=2 and beta=1",
        ),
    ],
)
def test_refuses_with_the_reason(function, reason):
    result = fused(program_of(function))
    assert not result.modified
    assert missed(result) == [reason]


def test_refuses_dropout_in_training():
    program = program_of(lambda x, f: f(F.dropout(x.mean((2, 3)), 0.5, training=True)), train=True)
    assert missed(apply(FusePooledHeads(), program)) == ["dropout drops values in training mode"]


def test_an_activation_that_the_operator_lacks_stays():
    result = fused(program_of(lambda x, f: torch.tanh(f(x.mean((2, 3))))))
    assert targets(result.program) == [FUSED, "aten.tanh"]


def test_other_layers_have_no_remark():
    result = fused(program_of(lambda x, f: f(x.exp()), (2, 3)))
    assert not result.modified
    assert not result.remarks


# -- what the program does afterwards ----------------------------------------------------------


def test_decomposes_into_a_mean_and_a_layer():
    program = program_of(lambda x, f: torch.relu(f(pool(x).flatten(1))))
    spelt_out = decompose(fused(program).program)
    assert targets(spelt_out) == ["aten.mean.dim", "aten.linear", "aten.relu"]


def test_is_saved_and_read_again(tmp_path):
    program = fused(canonical("mobilenet_v3")).program
    save_program(program, tmp_path / "program.pt2")
    again = load_program(tmp_path / "program.pt2")
    assert torch.equal(again(*program.examples)[0], program(*program.examples)[0])
    assert targets(again).count(FUSED) == 1


def test_the_fused_program_trains():
    program = fused(program_of(lambda x, f: F.silu(f(x.mean((2, 3)))))).program
    program(*program.examples)[0].square().sum().backward()
    assert all(float(t.grad.abs().max()) > 0 for t in program.tensors().values())


def test_the_check_sees_a_wrong_fusion(monkeypatch):
    program = program_of(lambda x, f: F.hardswish(f(x.mean((2, 3)))))
    right = fuse_pooled_heads.activation_behind

    def silu(node):
        return fuse_pooled_heads.Applied(right(node).node, "silu", ())

    monkeypatch.setattr(fuse_pooled_heads, "activation_behind", silu)
    result = apply(FusePooledHeads(), program)
    assert result.modified
    assert not check(FusePooledHeads(), program, result.program, exact=result.exact).passed

"""fuse-conv-bn-relu: a convolution and its epilogue in one operator."""

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
from pruna_ir.passes import fuse_conv_bn_relu
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import canonical, targets

FUSED = "pruna.conv_act"


class Net(nn.Module):
    """A function of an input, a convolution and a batch norm."""

    def __init__(self, function, conv, norm):
        super().__init__()
        self.function, self.conv, self.norm = function, conv, norm

    def forward(self, x):
        return self.function(x, self.conv, self.norm)


def program_of(function, *, conv=None, norm=None, shape=(2, 4, 5, 5), seed=0) -> Program:
    torch.manual_seed(seed)
    conv = conv or nn.Conv2d(4, 4, 3, padding=1)
    norm = norm or nn.BatchNorm2d(conv.out_channels)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.uniform_(-1, 1)
    norm.running_var.uniform_(0.1, 2)
    program = capture(Net(function, conv, norm).eval(), (torch.randn(shape),))
    return apply(Canonicalize(), program).program


def fused(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FuseConvBnRelu(), program)
    verify(result.program)
    report = check(FuseConvBnRelu(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FuseConvBnRelu(), result.program).modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_before_and_after():
    program = program_of(lambda x, conv, norm: torch.relu(norm(conv(x)) + x))
    result = fused(program)
    assert print_program(result.program) == (
        "program(x: float32[batch, 4, 5, 5]) {\n"
        "  %conv_act = pruna.conv_act(%x, @conv.weight, @conv.bias, %x, stride=[1, 1], "
        "padding=[1, 1], dilation=[1, 1], groups=1, activation=relu, activation_args=[])"
        " : float32[batch, 4, 5, 5]\n"
        "  return output=%conv_act\n"
        "}\n"
        "@conv.bias: float32[4]\n"
        "@conv.weight: float32[4, 4, 3, 3]\n"
    )
    assert [r.message for r in result.remarks] == [
        "fused convolution, batch norm, residual, relu into conv_act"
    ]


def test_decomposes_into_what_it_was():
    program = program_of(lambda x, conv, _norm: F.relu6(conv(x) + x))
    spelt_out = decompose(fused(program).program)
    assert targets(spelt_out) == targets(program)
    (y,), (expected,) = spelt_out(*program.examples), program(*program.examples)
    assert torch.equal(y, expected)


_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, -0.5, 0.25),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1),
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@settings(max_examples=35)
@given(
    st.sampled_from(sorted(_ACTIVATIONS)), st.booleans(),
    st.sampled_from(["", "left", "right", "last"]), st.integers(1, 3),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.integers(1, 2), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_any_combination(activation, normed, side, spatial, sizes, dilation, with_bias, seed):
    """Groups, depthwise ones among them, and dilation, in one to three dimensions."""
    channels, groups = sizes
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1](
        channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=with_bias
    )
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[spatial - 1](channels, eps=1e-3)

    def f(x, conv, norm):
        y = norm(conv(x)) if normed else conv(x)
        y = x + y if side == "left" else y + x if side == "right" else y
        y = _ACTIVATIONS[activation](y)
        return y + x if side == "last" else y

    program = program_of(f, conv=conv, norm=norm, shape=(2, channels, *[3] * spatial), seed=seed)
    found = targets(fused(program).program)
    lone = activation == "none" and not side
    assert found == ([FUSED] if not lone else targets(program))


def test_a_lone_convolution_stays():
    result = fused(program_of(lambda x, conv, norm: norm(conv(x)).exp()))
    assert not result.modified
    assert not result.remarks


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v3", "efficientnet", "densenet"])
def test_real_models(name):
    program = canonical(name)
    result = fused(program)
    assert targets(result.program).count(FUSED) >= 5


def test_a_residual_after_the_activation():
    program = program_of(lambda x, conv, norm: x + F.silu(norm(conv(x))))
    result = fused(program)
    assert targets(result.program) == [FUSED]
    (node,) = result.program.calls()
    assert node.args[-1] is True
    assert [r.message for r in result.remarks] == [
        "fused convolution, batch norm, silu into conv_act",
        "fused the residual after the activation of conv_act into conv_act_1",
    ]
    spelt_out = decompose(result.program)
    assert targets(spelt_out) == ["aten.conv2d", "aten.silu", "aten.add.Tensor"]


def test_a_residual_before_an_activation_goes_before_one_after():
    """The second convolution takes the sum, which an activation follows."""
    program = program_of(lambda x, conv, norm: torch.relu(F.silu(conv(x)) + norm(conv(x))))
    result = fused(program)
    assert targets(result.program) == [FUSED, FUSED]
    assert [str(node.args[8]) for node in result.program.calls()] == ["silu", "relu"]


def test_an_activation_read_twice_keeps_its_addition():
    def f(x, conv, _norm):
        y = torch.relu(conv(x))
        return y + x, y.exp()

    result = fused(program_of(f))
    assert targets(result.program).count(FUSED) == 1
    assert "aten.add.Tensor" in targets(result.program)


def test_of_two_convolutions_one_takes_the_other_as_residual():
    program = program_of(lambda x, conv, norm: torch.relu(conv(x) + norm(conv(x))))
    result = fused(program)
    assert targets(result.program) == ["aten.conv2d", "aten.batch_norm", FUSED]
    assert not missed(result)


# -- refusals ----------------------------------------------------------------------------------


def _read_twice(x, conv, _norm):
    y = conv(x)
    return torch.relu(y) + y.exp()


def _norm_read_twice(x, conv, norm):
    y = norm(conv(x))
    return torch.relu(y) + y.exp()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_read_twice, "conv2d is also read by exp"),
        (_norm_read_twice, "batch_norm is also read by exp"),
        (
            lambda x, conv, _norm: torch.relu(conv(x) + x[:, :1]),
            "the residual %slice_",
        ),
        (
            lambda x, conv, _norm: torch.relu(torch.add(conv(x), x, alpha=2)),
            "add adds with alpha=2",
        ),
        (
            lambda x, conv, _norm: conv(x) + x.double(),
            "the residual to is torch.float64, not torch.float32",
        ),
        (lambda x, conv, _norm: (lambda y: y + y)(conv(x)), "add adds conv2d to itself"),
        (lambda x, conv, _norm: torch.tanh(conv(x)), "tanh: conv_act has no tanh"),
        (lambda x, conv, norm: F.elu(norm(conv(x))), "elu: conv_act has no elu"),
        (
            lambda x, conv, _norm: torch.relu(
                F.batch_norm(conv(x), None, None, training=True)
            ),
            "batch norm has no running_mean and normalises with each batch's own statistics",
        ),
    ],
)
def test_refuses_with_the_reason(function, reason):
    result = fused(program_of(function))
    assert not result.modified
    (message,) = missed(result)
    assert message.startswith(reason)


def test_refuses_paddings_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU())
    result = apply(FuseConvBnRelu(), capture(model, (torch.ones(2, 3, 5, 5),)))
    assert missed(result) == ["its padding is given by name; run canonicalize first"]


def test_refuses_a_convolution_without_a_batch():
    program = program_of(lambda x, conv, _norm: torch.relu(conv(x[0])))
    assert missed(fused(program)) == ["it is called without a batch dimension"]


# -- training and controls ---------------------------------------------------------------------


def test_the_fused_program_trains():
    program = program_of(lambda x, conv, norm: torch.relu(norm(conv(x)) + x))
    (y,) = fused(program).program(*program.examples)
    y.square().sum().backward()


@pytest.mark.parametrize("wrong", ["no activation", "relu for relu6", "no residual"])
def test_the_check_sees_a_wrong_fusion(wrong, monkeypatch):
    program = program_of(lambda x, conv, _norm: F.relu6(conv(x) + x))
    right = fuse_conv_bn_relu._complete

    def complete(*args):
        found = right(*args)
        fields = dict(vars(found))
        if wrong == "no residual":
            fields["residual"] = None
        else:
            fields["activation"] = "none" if wrong == "no activation" else "relu"
        return fuse_conv_bn_relu._Match(**fields)

    monkeypatch.setattr(fuse_conv_bn_relu, "_complete", complete)
    result = apply(FuseConvBnRelu(), program)
    assert not check(FuseConvBnRelu(), program, result.program, exact=result.exact).passed

"""fuse-ffn: the feed-forward blocks of transformers in one operator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.decompose import decompose
from pruna_ir.passes import fuse_ffn
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_ffn import FuseFfn
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import canonical, targets

FUSED = "pruna.ffn"
C = math.sqrt(2 / math.pi)


class Net(nn.Module):
    """A function of an input and three linear layers."""

    def __init__(self, function, width=3, hidden=6, out=3, *, bias=True):
        super().__init__()
        self.function = function
        self.up = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x):
        return self.function(x, self.up, self.gate, self.down)


def program_of(function, *sizes: int, shape=(2, 5, 3), seed=0, train=False, **options) -> Program:
    torch.manual_seed(seed)
    program = capture(Net(function, *sizes, **options), (torch.randn(shape),), train=train)
    return apply(Canonicalize(), program).program


def fused(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FuseFfn(), program)
    verify(result.program)
    report = check(FuseFfn(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FuseFfn(), result.program).modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_before_and_after():
    program = program_of(lambda x, up, _gate, down: down(F.gelu(up(x))))
    result = fused(program)
    assert print_program(result.program) == (
        "program(x: float32[batch, 5, 3]) {\n"
        "  %ffn = pruna.ffn(%x, @up.weight, @up.bias, @down.weight, @down.bias, "
        "activation=gelu) : float32[batch, 5, 3]\n"
        "  return output=%ffn\n"
        "}\n"
        "@down.bias: float32[3]\n"
        "@down.weight: float32[3, 6]\n"
        "@up.bias: float32[6]\n"
        "@up.weight: float32[6, 3]\n"
    )
    assert [r.message for r in result.remarks] == ["fused a gelu feed-forward block into ffn"]


def test_decomposes_into_what_it_was():
    program = program_of(lambda x, up, gate, down: down(F.silu(gate(x)) * up(x)))
    spelt_out = decompose(fused(program).program)
    assert sorted(targets(spelt_out)) == sorted(targets(program))


def test_a_residual_before_and_after():
    program = program_of(lambda x, up, _gate, down: x + down(F.gelu(up(x))))
    result = fused(program)
    (line,) = [line for line in print_program(result.program).splitlines() if "ffn(" in line]
    assert line == (
        "  %ffn = pruna.ffn(%x, @up.weight, @up.bias, @down.weight, @down.bias, "
        "activation=gelu, %x) : float32[batch, 5, 3]"
    )
    assert targets(result.program) == [FUSED]
    (remark,) = result.remarks
    assert remark.message == "fused a gelu feed-forward block with its residual into ffn"
    assert targets(decompose(result.program))[-2:] == ["aten.linear", "aten.add.Tensor"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, up, _gate, down: torch.add(x, down(F.gelu(up(x))), alpha=2),
        lambda x, up, _gate, down: down(F.gelu(up(x))) + 1.0,
        lambda x, up, _gate, down: down(F.gelu(up(x))) + x[:, :1],
        lambda x, up, _gate, down: (lambda y: y + y)(down(F.gelu(up(x)))),
        lambda x, up, _gate, down: (lambda y: (y + x) * y)(down(F.gelu(up(x)))),
    ],
)
def test_other_sums_stay(function):
    result = fused(program_of(function))
    (node,) = (node for node in result.program.calls() if "ffn" in str(node.target))
    assert fuse_ffn.bind_arguments(node)["residual"] is None
    assert "aten.add.Tensor" in targets(result.program)


def test_what_became_of_norms_and_residuals_on_a_real_model():
    result = fused(canonical("gpt2"))
    blocks = result.program.calls(fuse_ffn.FFN)
    added = [fuse_ffn.bind_arguments(node)["residual"] for node in blocks]
    assert [node is not None for node in added] == [True, True]
    (note,) = [remark.message for remark in result.remarks if remark.kind == "note"]
    assert note == (
        "2 blocks read a norm's result; norms stay: matrix products do not normalise what they "
        "read"
    )


# -- several layers in one weight --------------------------------------------------------------


class Packed(nn.Module):
    """A block whose first layers are stored in one weight."""

    def __init__(self, function, *, bias=True):
        super().__init__()
        self.function = function
        self.both, self.down = nn.Linear(3, 12, bias=bias), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(self.function(self.both(x)))


def packed(function, *, bias=True) -> Program:
    torch.manual_seed(0)
    program = capture(Packed(function, bias=bias), (torch.randn(2, 5, 3),))
    return apply(Canonicalize(), program).program


def _chunk(h):
    gate, value = h.chunk(2, -1)
    return F.silu(gate) * value


def _split(h):
    value, gate = h.split(6, 2)
    return value * F.silu(gate)


def _sizes(h):
    value, gate = torch.split(h, [6, 6], -1)
    return F.silu(gate) * value


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("function", "gate"),
    [
        (_chunk, slice(0, 6)),
        (_split, slice(6, 12)),
        (_sizes, slice(6, 12)),
        (lambda h: F.silu(h[..., :6]) * h[..., 6:], slice(0, 6)),
        (lambda h: F.glu(h, -1), slice(6, 12)),
    ],
)
def test_packed_gates(function, gate, bias):
    before = packed(function, bias=bias)
    after = fused(before).program
    assert targets(after) == [FUSED]
    whole, value = before.tensor("both.weight"), slice(6 - gate.start, 12 - gate.start)
    assert torch.equal(after.tensor("both.weight_gate"), whole[gate])
    assert torch.equal(after.tensor("both.weight_value"), whole[value])
    assert after.tensor("both.weight_gate").requires_grad
    assert "both.weight" not in after.tensors()
    if bias:
        assert torch.equal(after.tensor("both.bias_gate"), before.tensor("both.bias")[gate])


def _third_part(h):
    return F.silu(h[..., :6]) * h[..., 6:] + h[..., :1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: torch.tanh(h[..., :6]) * h[..., 6:], "what tanh, mul computes between two"),
        (lambda h: F.silu(h[..., :6]), None),
        (lambda h: F.silu(h[..., :6]) * h[..., 6:7], "6 gates broadcast against 1 values"),
        (_third_part, "what silu, mul, add computes between two layers"),
        (lambda h: F.layer_norm(_chunk(h), [6]), "what silu, mul, layer_norm computes between"),
    ],
)  # fmt: skip
def test_other_parts(function, reason):
    result = fused(packed(function))
    messages = missed(result)
    assert result.modified is (reason is None)
    assert len(messages) == (reason is not None)
    assert all(message.startswith(reason) for message in messages)


def test_a_packed_weight_that_is_computed_stays():
    def f(x, up, gate, down):
        both = F.linear(x, torch.cat([up.weight, gate.weight]))
        return down(F.silu(both[..., :6]) * both[..., 6:])

    assert missed(fused(program_of(f))) == ["the weight of linear is computed in the graph"]


def test_a_convolution_between_two_layers_is_named():
    """As PVT v2's blocks have it."""
    conv = nn.Conv1d(6, 6, 3, padding=1, groups=6)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.conv, self.down = nn.Linear(3, 6), conv, nn.Linear(6, 3)

        def forward(self, x):
            return self.down(F.gelu(self.conv(self.up(x).mT).mT))

    program = apply(Canonicalize(), capture(Net(), (torch.randn(2, 5, 3),))).program
    assert missed(fused(program)) == [
        "what transpose, conv1d, transpose_1, gelu computes between two layers is no activation "
        "that ffn has"
    ]


# -- real models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("vit", 2), ("timm_vit", 2), ("swin", 3), ("gpt2", 2), ("bert", 2), ("llama", 2)],
)
def test_fires_on_real_models(name, blocks):
    result = fused(canonical(name))
    assert targets(result.program).count(FUSED) == blocks
    assert not missed(result)


def test_weights_of_addmm_are_transposed_under_a_name_of_their_own():
    before = canonical("gpt2")
    after = fused(before).program
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(after.tensor(f"{name}_transposed"), before.tensor(name).t())
    assert name not in after.tensors()
    assert after.tensor(f"{name}_transposed").requires_grad


_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}
_SPELT_OUT = [
    ("gelu", lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))),
    ("gelu", lambda h: h * 0.5 * (1.0 + torch.erf(h * math.sqrt(0.5)))),
    ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(C * (h + 0.044715 * torch.pow(h, 3.0))))),
    ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(C * (0.044715 * h * h * h + h)))),
    ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(h * 0.7978845608 * (1 + 0.044715 * h * h)))),
    ("silu", lambda h: h * torch.sigmoid(h)),
    ("quick_gelu", lambda h: h * torch.sigmoid(1.702 * h)),
    ("quick_gelu", lambda h: torch.sigmoid(h * 1.702) * h),
]


@settings(max_examples=20)
@given(
    st.sampled_from(sorted(_ACTIVATIONS)), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 5), st.integers(2, 7), st.integers(1, 5),
    st.lists(st.integers(2, 3), min_size=1, max_size=3), st.integers(0, 99),
)  # fmt: skip
def test_any_block(activation, gated, swapped, bias, width, hidden, out, lead, seed):
    act = _ACTIVATIONS[activation]

    def f(x, up, gate, down):
        if not gated:
            return down(act(up(x)))
        return down(up(x) * act(gate(x)) if swapped else act(gate(x)) * up(x))

    program = program_of(f, width, hidden, out, shape=(*lead, width), seed=seed, bias=bias)
    result = fused(program)
    assert targets(result.program) == [FUSED]
    (node,) = result.program.calls()
    assert activation in node.args


@pytest.mark.parametrize(("name", "formula"), _SPELT_OUT)
@pytest.mark.parametrize("gated", [False, True])
def test_formulas_are_recognised(name, formula, gated):
    def f(x, up, gate, down):
        return down(formula(gate(x)) * up(x)) if gated else down(formula(up(x)))

    result = fused(program_of(f))
    assert targets(result.program) == [FUSED]
    (node,) = result.program.calls()
    assert name in node.args


@pytest.mark.parametrize(
    "formula",
    [
        lambda h: 0.5 * h * (1 + torch.tanh(C * (h + 0.044 * torch.pow(h, 3.0)))),
        lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * torch.pow(h, 3.0)))),
        lambda h: 0.5 * h * (1 + torch.tanh(C * (h + 0.044715 * torch.pow(h, 2.0)))),
        lambda h: 0.5 * h * (2 + torch.tanh(C * (h + 0.044715 * torch.pow(h, 3.0)))),
        lambda h: 0.5 * h * (1 + torch.erf(h / 1.4)),
        lambda h: h * h * torch.sigmoid(h),
        lambda h: h * torch.sigmoid(1.7 * h),
        lambda h: 2 * h * torch.sigmoid(1.702 * h),
    ],
)
def test_other_formulas_are_left_alone(formula):
    result = fused(program_of(lambda x, up, _gate, down: down(formula(up(x)))))
    assert not result.modified
    (message,) = missed(result)
    assert message.endswith("between two layers is no activation that ffn has")


# -- refusals ----------------------------------------------------------------------------------


def _hidden_read_twice(x, up, _gate, down):
    h = F.gelu(up(x))
    return down(h) + h.sum(-1, keepdim=True)


def _layer_read_twice(x, up, _gate, down):
    h = up(x)
    return down(F.gelu(h)) + h.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_hidden_read_twice, "gelu is also read by sum_1"),
        (_layer_read_twice, "linear is also read by sum_1"),
        (
            lambda x, up, _gate, down: down(torch.tanh(up(x))),
            "what tanh computes between two layers is no activation that ffn has",
        ),
        (
            lambda x, up, gate, down: down(torch.tanh(gate(x)) * up(x)),
            "what tanh, mul computes between two layers is no activation that ffn has",
        ),
        (
            lambda x, up, gate, down: down(F.silu(gate(x)) * up(x.exp())),
            "the gate reads x, but the other layer reads exp",
        ),
    ],
)
def test_refuses_with_the_reason(function, reason):
    result = fused(program_of(function))
    assert not result.modified
    assert missed(result) == [reason]


def test_refuses_dropout_in_training():
    def f(x, up, _gate, down):
        return down(F.dropout(F.gelu(up(x)), 0.5, training=True))

    result = apply(FuseFfn(), program_of(f, train=True))
    assert missed(result) == ["dropout drops values in training mode"]


def test_refuses_dropout_that_canonicalize_removes():
    def f(x, up, _gate, down):
        return down(F.dropout(F.gelu(up(x)), 0.5, training=False))

    program = capture(Net(f), (torch.randn(2, 3),))
    result = apply(FuseFfn(), program)
    assert missed(result) == ["dropout stands in between; run canonicalize first"]


def test_refuses_scaled_products():
    def f(x, up, _gate, down):
        h = torch.addmm(up.bias, x, up.weight.t(), alpha=2)
        return down(F.gelu(h))

    program = program_of(f, shape=(2, 3))
    assert missed(fused(program)) == ["addmm has alpha=2 and beta=1"]


def test_two_layers_without_an_activation_stay():
    result = fused(program_of(lambda x, up, _gate, down: down(up(x))))
    assert not result.modified
    assert not result.remarks


# -- training and controls ---------------------------------------------------------------------


def test_the_fused_program_trains():
    program = fused(program_of(lambda x, up, gate, down: down(F.silu(gate(x)) * up(x)))).program
    (y,) = program(*program.examples)
    y.square().sum().backward()
    assert all(float(t.grad.abs().max()) > 0 for t in program.tensors().values())


@pytest.mark.parametrize("wrong", ["gelu for gelu_tanh", "gate and layer swapped"])
def test_the_check_sees_a_wrong_fusion(wrong, monkeypatch):
    program = program_of(
        lambda x, up, gate, down: down(F.gelu(gate(x), approximate="tanh") * up(x))
    )
    right = fuse_ffn._gated

    def gated(*args):
        found = right(*args)
        if found is None:
            return None
        fields = dict(vars(found))
        if wrong == "gelu for gelu_tanh":
            act = fields["act"]
            fields["act"] = fuse_ffn.Activation("gelu", act.input, act.nodes)
        else:
            fields["up"], fields["gate"] = fields["gate"], fields["up"]
        return fuse_ffn._Block(**fields)

    monkeypatch.setattr(fuse_ffn, "_gated", gated)
    result = apply(FuseFfn(), program)
    assert result.modified
    assert not check(FuseFfn(), program, result.program, exact=result.exact).passed

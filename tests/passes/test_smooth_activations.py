"""smooth-activations: factors move from activations to weights, and the function stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.equivalence import sqnr_db
from pruna_ir.errors import UsageError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.smooth_activations import SmoothActivations
from pruna_ir.transform import Context, Rewrite, apply
from pruna_ir.verify import verify
from tests.passes.low_bits import quantised

PASS = SmoothActivations()
functional = nn.functional


def captured(module, *shape, seed=0):
    """The captured module with seeded weights and norms away from their defaults."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    program = capture(module.eval(), (torch.randn(2, *shape),))
    return apply(Canonicalize(), program).program


def data(*shape, samples=40, batch=7):
    generator = torch.Generator().manual_seed(1)
    outliers = torch.exp(torch.arange(shape[-1]) % 4)
    x = torch.randn(samples, *shape, generator=generator) * outliers
    return Context(data=TensorData((x,), batch_size=batch))


def smoothed(program, where, pass_=PASS):
    result = apply(pass_, program, where)
    verify(result.program)
    report = check(pass_, program, result.program, context=where, exact=result.exact)
    assert report.passed, report
    return result


def messages(result, kind):
    return {r.node: r.message for r in result.remarks if r.kind == kind}


class Attention(nn.Module):
    """Pre-norm attention with shared key-value heads and a gated MLP; RMS norms spelled out."""

    def __init__(self, fused=False):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))
        self.q, self.k = nn.Linear(12, 12, bias=False), nn.Linear(12, 6, bias=False)
        self.v, self.o = nn.Linear(12, 6), nn.Linear(12, 12, bias=False)
        self.gate, self.up = nn.Linear(12, 20, bias=False), nn.Linear(12, 20, bias=False)
        self.down = nn.Linear(20, 12)
        self.fused = fused

    def norm(self, x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def forward(self, x):
        batch, length, _ = x.shape
        h = self.norm(x, self.one)
        q = self.q(h).view(batch, length, 4, 3).transpose(1, 2)
        k, v = (f(h).view(batch, length, 2, 3).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t[:, :, None].expand(batch, 2, 2, length, 3).reshape(batch, 4, length, 3)
                for t in (k, v))  # fmt: skip
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, 12))
        h = self.norm(x, self.two)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Gpt(nn.Module):
    """Layer norms, one addmm for queries, keys and values, and a GELU; input [batch, 5, 8]."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)
        shapes = {"attn": (8, 24), "proj": (8, 8), "fc": (8, 16), "out": (16, 8)}
        for name, (a, b) in shapes.items():
            self.register_parameter(f"{name}_w", nn.Parameter(torch.randn(a, b)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.randn(b)))

    def linear(self, name, x):
        weight, bias = getattr(self, f"{name}_w"), getattr(self, f"{name}_b")
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
        return y.reshape(*x.shape[:-1], -1)

    def forward(self, x):
        q, k, v = self.linear("attn", self.one(x)).split(8, dim=2)
        q, k, v = (t.reshape(*t.shape[:2], 2, 4).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.linear("proj", y.transpose(1, 2).reshape(x.shape))
        return x + self.linear("out", functional.gelu(self.linear("fc", self.two(x))))


def test_a_norm_and_its_layers_by_the_formula_of_the_paper():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(6, 3)

        def forward(self, x):
            x = self.norm(x)
            return self.a(x).sum(-1) + self.b(x).sum(-1)

    program, where = captured(Two(), 4, 6), data(4, 6)
    for alpha in (0.0, 0.3, 1.0):
        after = smoothed(program, where, SmoothActivations(alpha=alpha)).program
        with torch.no_grad():
            gamma, beta = program.tensor("norm.weight"), program.tensor("norm.bias")
            x = functional.layer_norm(where.data.inputs[0], (6,), gamma, beta)
            largest = torch.cat([program.tensor(f"{n}.weight") for n in "ab"]).abs().amax(0)
            s = x.abs().amax((0, 1)) ** alpha / largest ** (1 - alpha)
        torch.testing.assert_close(after.tensor("norm.weight"), gamma / s)
        torch.testing.assert_close(after.tensor("norm.bias"), beta / s)
        for name in ("a.weight", "b.weight"):
            torch.testing.assert_close(after.tensor(name), program.tensor(name) * s)


@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm_shared_heads_and_gates(fused):
    program, where = captured(Attention(fused), 5, 12), data(5, 12)
    result = smoothed(program, where)
    assert not messages(result, "missed")
    assert len(messages(result, "applied")) == 7
    same = {n for n, t in program.tensors().items() if torch.equal(t, result.program.tensor(n))}
    assert same == {"down.bias"}
    # Two heads of the output projection share the factors of one head of the values.
    ratio = result.program.tensor("v.bias") / program.tensor("v.bias")
    columns = (result.program.tensor("o.weight") / program.tensor("o.weight"))[0]
    expected = 1 / ratio.reshape(2, 1, 3).expand(2, 2, 3).reshape(12)
    torch.testing.assert_close(columns, expected, rtol=1e-4, atol=0)


def test_addmm_takes_factors_and_only_the_values_of_a_joint_projection_are_scaled():
    program, where = captured(Gpt(), 5, 8), data(5, 8)
    result = smoothed(program, where)
    assert set(messages(result, "applied")) == {"addmm", "addmm_1", "addmm_2"}
    ratio = result.program.tensor("attn_b") / program.tensor("attn_b")
    torch.testing.assert_close(ratio[:16], torch.ones(16))
    assert float((ratio[16:] - 1).abs().min()) > 1e-3
    (missed,) = messages(result, "missed").values()
    assert "(aten.gelu.default), through which no scale goes; insert=true would" in missed


def test_what_has_no_source_gets_a_product_on_request():
    program, where = captured(Gpt(), 5, 8), data(5, 8)
    result = smoothed(program, where, SmoothActivations(insert=True))
    assert not messages(result, "missed")
    assert len(list(result.program.calls(torch.ops.aten.mul.Tensor))) == 1
    assert len(result.program.tensors()) == len(program.tensors()) + 1


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.norm(x)
        return x + self.a(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(x + self.table.weight[0])
        return functional.linear(x, self.table.weight)


class Mixed(nn.Module):
    """The positions of a reshape decide which channel is where."""

    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.LayerNorm(6), nn.Linear(12, 2)

    def forward(self, x):
        return self.a(self.norm(x).transpose(1, 2).reshape(-1, 3, 12))


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (PostNorm(), (4, 6), "layer_norm is also read by add; insert=true"),
        (Tied(), (4, 6), "its weight is also read by select"),
        (Mixed(), (6, 6), "the channels of layer_norm are mixed on the way; insert=true"),
        (nn.Sequential(nn.Tanh(), nn.Linear(6, 2)), (6,), "its input comes from tanh"),
        (nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)), (6,),
         "its input comes from layer_norm"),
    ],
)  # fmt: skip
def test_near_misses_say_why(module, shape, reason):
    program, where = captured(module, *shape), data(*shape)
    result = apply(PASS, program, where)
    assert not result.modified
    (remark,) = result.remarks
    assert remark.kind == "missed"
    assert remark.message.startswith(reason)


def test_unused_channels_stay():
    module = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    program, where = captured(module, 4), data(4)
    rw = Rewrite(program, "cut", Context())
    weight, gamma = program.tensor("1.weight").detach().clone(), torch.tensor([1.0, 0.0, 2.0, 3.0])
    weight[:, 2] = 0
    rw.set_tensor("1.weight", weight)
    rw.set_tensor("0.weight", gamma)
    rw.set_tensor("0.bias", torch.zeros(4))
    after = smoothed(rw.finish(), where).program
    assert torch.equal(after.tensor("0.weight")[1:3], gamma[1:3])
    assert torch.equal(after.tensor("1.weight")[:, 1:3], weight[:, 1:3])


def test_a_second_run_over_layers_of_one_norm_changes_nothing():
    program, where = captured(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5)), 6), data(6)
    once = apply(PASS, program, where).program
    again = apply(PASS, once, where).program
    for name, tensor in once.tensors().items():
        torch.testing.assert_close(again.tensor(name), tensor, rtol=1e-5, atol=0)


def test_how_the_data_is_cut_into_batches_does_not_matter():
    program, where = captured(Attention(), 5, 12), data(5, 12)
    once = apply(PASS, program, where).program
    whole = Context(data=TensorData(where.data.inputs, batch_size=40))
    for name, tensor in apply(PASS, program, whole).program.tensors().items():
        torch.testing.assert_close(tensor, once.tensor(name), rtol=1e-5, atol=1e-7)


def test_outliers_cost_less_after_smoothing():
    module = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
    program, where = captured(module, 16), data(16)
    rw = Rewrite(program, "outlier", Context())
    gamma = torch.ones(16)
    gamma[3] = 100.0
    rw.set_tensor("0.weight", gamma)
    weight = program.tensor("1.weight").detach().clone()
    weight[:, 3] *= 0.01
    rw.set_tensor("1.weight", weight)
    program = rw.finish()
    (x,) = where.data.inputs
    plain, smooth = (
        sqnr_db(quantised(p, where, 8)(x)[0], program(x)[0])
        for p in (program, smoothed(program, where).program)
    )
    assert smooth > plain + 10


def test_a_factor_that_is_missing_on_one_side_breaks_the_promise():
    program, where = captured(Attention(), 5, 12), data(5, 12)
    result = smoothed(program, where)
    for name in ("one", "o.weight", "up.weight", "v.bias"):
        rw = Rewrite(result.program, "spoil", Context())
        rw.set_tensor(name, program.tensor(name).detach())
        exact = {n: t for n, t in result.exact.items() if n != name}
        report = check(PASS, program, rw.finish(), context=where, exact=exact)
        assert not report.passed


def test_bad_requests_are_refused():
    program, where = captured(Gpt(), 5, 8), data(5, 8)
    with pytest.raises(UsageError, match="smooth-activations needs calibration data"):
        apply(PASS, program, Context())
    with pytest.raises(UsageError, match=r"alpha must lie between 0 and 1, not 1\.5"):
        SmoothActivations(alpha=1.5)
    with pytest.raises(UsageError, match="samples must be at least 1"):
        SmoothActivations(samples=0)
    rw = Rewrite(program, "mark", Context())
    rw.set_attribute("quantized-for", "onnx")
    with pytest.raises(UsageError, match="run smooth-activations on the float program, before"):
        apply(PASS, rw.finish(), where)

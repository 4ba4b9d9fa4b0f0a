"""equalize-layers: ranges of neighbouring layers agree, and the function stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.checks import check
from pruna_ir.errors import UsageError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.equalize_layers import EqualizeLayers
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.transform import Context, Effect, Pass, Rewrite, apply
from pruna_ir.verify import verify
from tests.networks import conv_net
from tests.passes.compensation import Layers, program_of

PASS = EqualizeLayers()
aten = torch.ops.aten


def captured(module, *shape, seed=0):
    torch.manual_seed(seed)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
        if isinstance(child, nn.Conv2d | nn.Linear):
            # Ranges that differ by orders of magnitude, as after folding batch norms.
            factor = torch.exp(2 * torch.randn(len(child.weight)))
            child.weight.data *= factor.reshape(-1, *[1] * (child.weight.dim() - 1))
    program = capture(module.eval(), (torch.randn(2, *shape),))
    return apply(Canonicalize(), program).program


def equalised(program, pass_=PASS):
    result = apply(pass_, program)
    verify(result.program)
    report = check(pass_, program, result.program, exact=result.exact)
    assert report.passed, report
    return result


def missed(result):
    return [r.message for r in result.remarks if r.kind == "missed"]


def outs(weight):
    return weight.detach().abs().flatten(1).amax(1)


def ins(weight):
    return weight.detach().abs().transpose(0, 1).flatten(1).amax(1)


def test_a_pair_by_the_formula_of_the_paper():
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1))
    program = captured(module, 3, 7, 7)
    program = without_biases(program)
    after = equalised(program).program
    w1, w2 = program.tensor("0.weight").double(), program.tensor("2.weight").double()
    s = (outs(w1) * ins(w2)).sqrt() / ins(w2)
    torch.testing.assert_close(after.tensor("0.weight").double(), w1 / s.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(after.tensor("2.weight").double(), w2 * s.reshape(1, -1, 1, 1))
    torch.testing.assert_close(
        outs(after.tensor("0.weight")), ins(after.tensor("2.weight")), rtol=1e-6, atol=0
    )


def without_biases(program):
    """Biases of 0, which limit no factor."""
    rw = Rewrite(program, "no biases", Context())
    for name, tensor in program.tensors().items():
        if name.endswith("bias"):
            rw.set_tensor(name, torch.zeros_like(tensor.detach()))
    return rw.finish()


def test_biases_are_divided_and_that_of_a_nearly_dead_channel_outgrows_no_other():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    program = captured(module, 4)
    rw = Rewrite(program, "set", Context())
    rw.set_tensor("0.weight", torch.tensor([[4.0] * 4, [1e-6] * 4, [0.25] * 4]))
    rw.set_tensor("0.bias", torch.tensor([0.8, 0.2, -0.1]))
    rw.set_tensor("2.weight", torch.ones(2, 3))
    program = rw.finish()
    after = equalised(program).program
    # s would be 2, 1e-3 and 0.5; the second channel's bias would become 200.
    expected = torch.tensor([2.0, 0.5, 0.5])
    torch.testing.assert_close(after.tensor("2.weight"), expected.expand(2, 3))
    torch.testing.assert_close(after.tensor("0.bias"), torch.tensor([0.4, 0.4, -0.2]))


BLOCKS = {
    "conv": lambda a, b: nn.Conv2d(a, b, 3, padding=1),
    "pointwise": lambda a, b: nn.Conv2d(a, b, 1, bias=False),
    "grouped": lambda a, b: nn.Conv2d(a, b, 3, groups=2, padding=1),
    "depthwise": lambda a, b: nn.Sequential(nn.Conv2d(a, a, 3, groups=a), nn.Conv2d(a, b, 1)),
    "transposed": lambda a, b: nn.ConvTranspose2d(a, b, 2, groups=2),
}
BETWEEN = {
    "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "nothing": nn.Identity,
    "max": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1, 1)),
    "average": lambda: nn.AvgPool2d(2, 1), "prelu": nn.PReLU,
}  # fmt: skip


@given(
    blocks=st.lists(st.tuples(st.sampled_from(sorted(BLOCKS)), st.sampled_from(sorted(BETWEEN))),
                    min_size=2, max_size=4),
    tail=st.sampled_from(["mean", "flatten", "pool"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=15)
def test_chains_keep_their_function_and_end_up_equal(blocks, tail, seed):
    widths = [2, 6, 4, 6, 8]
    parts = []
    for (block, between), a, b in zip(blocks, widths, widths[1:], strict=False):
        parts += [BLOCKS[block](a, b), BETWEEN[between]()]
    channels = widths[len(blocks)]
    module = nn.Sequential(*parts)
    size = module(torch.zeros(1, 2, 9, 9)).shape[-1]
    features = channels * (size * size if tail == "flatten" else 1)
    ends = {"flatten": [nn.Flatten()], "mean": [Mean()],
            "pool": [nn.AdaptiveAvgPool2d(1), nn.Flatten()]}[tail]  # fmt: skip
    program = captured(nn.Sequential(module, *ends, nn.Linear(features, 3)), 2, 9, 9, seed=seed)
    result = equalised(program)
    layers = len(blocks) + sum(block == "depthwise" for block, _ in blocks) + 1
    assert len([r for r in result.remarks if r.kind == "applied"]) == layers - 1


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_in_a_chain_every_pair_is_equal_in_the_end():
    module = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    after = equalised(captured(module, 3, 5, 5)).program
    first, middle, last = (after.tensor(f"{i}.weight") for i in (0, 2, 4))
    torch.testing.assert_close(outs(first), outs(middle), rtol=1e-5, atol=0)
    torch.testing.assert_close(outs(middle), ins(last), rtol=1e-5, atol=0)


def test_flattened_channels_share_a_factor():
    module = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Flatten(),
                           nn.Linear(27, 4))  # fmt: skip
    program = captured(module, 2, 5, 5)
    after = equalised(program).program
    ratio = after.tensor("3.weight") / program.tensor("3.weight")
    blocks = ratio.detach().reshape(4, 3, 9)
    torch.testing.assert_close(blocks, blocks[:1, :, :1].expand(4, 3, 9), rtol=1e-5, atol=0)
    assert float((blocks[0, :, 0] - 1).abs().max()) > 0.1


def test_dead_channels_stay_as_they_are():
    program = without_biases(captured(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3))
    rw = Rewrite(program, "kill", Context())
    weight = program.tensor("0.weight").detach().clone()
    weight[1] = 0
    rw.set_tensor("0.weight", weight)
    second = program.tensor("1.weight").detach().clone()
    second[:, 2] = 0
    rw.set_tensor("1.weight", second)
    program = rw.finish()
    after = equalised(program).program
    assert torch.equal(after.tensor("0.weight")[1:3], weight[1:3])
    assert torch.equal(after.tensor("1.weight")[:, 1:3], second[:, 1:3])


def test_bias_added_behind_a_product_and_every_kind_of_layer():
    result = equalised(program_of(Layers, 3, 8, 8))
    assert missed(result) == [
        "batch_norm (aten.batch_norm.default) stands between; run fold-batch-norm first",
        "tanh (aten.tanh.default) is not homogeneous: no scale passes",
    ]

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
            self.v = nn.Parameter(torch.randn(5, 2))

        def forward(self, x):
            return torch.relu(x @ self.w + self.b) @ self.v

    program = program_of(Added, 3)
    after = equalised(program).program
    assert all(not torch.equal(after.tensor(n), program.tensor(n)) for n in ("w", "b", "v"))


class Two(nn.Module):
    def __init__(self, between=nn.ReLU):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.between = between()

    def forward(self, x):
        x = self.between(self.a(x))
        return self.b(x) + self.c(x)


class Skip(Two):
    def forward(self, x):
        x = torch.relu(self.a(x))
        return x + self.b(x)


class Twice(Two):
    def forward(self, x):
        return self.b(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)),
         "hardtanh (aten.hardtanh.default) clips its input, so that no scale passes; ReLU would "
         "let it"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)),
         "silu (aten.silu.default) is not homogeneous: no scale passes"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)),
         "batch_norm (aten.batch_norm.default) stands between; run fold-batch-norm first"),
        (Two(), "relu is read by conv2d_1, conv2d_2"),
        (Twice(), "conv2d_1: its weight is also read by conv2d_2"),
    ],
)  # fmt: skip
def test_near_misses_say_why(module, reason):
    result = apply(PASS, captured(module, 3, 5, 5))
    assert not result.modified
    assert missed(result)[0] == reason


def test_residual_streams_are_no_near_miss():
    result = apply(PASS, captured(Skip(), 3, 5, 5))
    assert not result.modified
    assert not result.remarks


def test_fused_convolutions():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(),
                           nn.Conv2d(4, 2, 1))  # fmt: skip
    fused = apply(FuseConvBnRelu(), captured(module, 3, 5, 5)).program
    result = equalised(fused)
    assert len([r for r in result.remarks if r.kind == "applied"]) == 1
    (why,) = missed(result)
    assert why.startswith("its activation") and why.endswith("lets no scale pass")


def test_a_second_run_changes_nothing():
    program = apply(FoldBatchNorm(), conv_net()).program
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6),
                           nn.Conv2d(6, 4, 1))  # fmt: skip
    for given_ in (program, captured(module, 3, 5, 5)):
        once = apply(PASS, given_).program
        assert not apply(PASS, once).modified


@dataclass(frozen=True)
class ThroughRelu6(Pass):
    """A planted bug: scales through an activation that saturates."""

    name: ClassVar[str] = "through-relu6"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def rewrite(self, rw: Rewrite) -> None:
        first, second = rw.calls(aten.conv2d.default)
        for node, name, factor in ((first, "weight", 0.5), (first, "bias", 0.5),
                                   (second, "weight", 2.0)):  # fmt: skip
            source = rw.call(node).producer(name)
            old = rw.program.tensor(str(source.target)).detach().double()
            rw.derive(source, old * factor, node)


def test_the_check_catches_a_scale_that_went_through_a_relu6():
    for activation, holds in ((nn.ReLU(), True), (nn.ReLU6(), False)):
        module = nn.Sequential(nn.Conv2d(3, 4, 1), activation, nn.Conv2d(4, 2, 1))
        program = captured(module, 3, 5, 5)
        result = apply(ThroughRelu6(), program)
        report = check(ThroughRelu6(), program, result.program, exact=result.exact)
        assert report.passed is holds


def test_a_quantised_program_and_no_sweeps_are_refused():
    program = captured(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3)
    rw = Rewrite(program, "mark", Context())
    rw.set_attribute("quantized-for", "onnx")
    with pytest.raises(UsageError, match="run equalize-layers on the float program, before"):
        apply(PASS, rw.finish())
    with pytest.raises(UsageError, match="sweeps must be at least 1"):
        EqualizeLayers(sweeps=0)

"""round-biases: the biases that integer kernels store stand in the program."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.build import build
from pruna_ir.certify import sqnr_db
from pruna_ir.errors import VerificationError
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.passes.round_biases import RoundBiases
from pruna_ir.pipeline import Pipeline
from pruna_ir.transform import Context, Rewrite, apply
from tests.passes.compensation import (
    Layers,
    Mlp,
    context,
    kept_promise,
    program_of,
    promise_of_spoilt,
)
from tests.passes.low_bits import quantised

PASS = RoundBiases()
LAYERS = (("one", ""), ("two", "linear"), ("three", "relu"))  # and what they read


def steps(program, layer, read):
    """What a unit of a layer's bias is worth, float32 as stored, in exact numbers."""
    x, weight = program.tensor(f"{read}_scale"), program.tensor(f"{layer}.weight_scale")
    return [Fraction(float(step)) for step in x.float() * weight.float()]


@given(bits=st.integers(2, 8), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_each_bias_is_the_nearest_multiple_of_the_product_of_both_scales(bits, seed):
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    low = quantised(program, where, bits)
    after = kept_promise(RoundBiases(sqnr_db=-40.0), low, where).program
    for layer, read in LAYERS:
        biases = low.tensor(f"{layer}.bias"), after.tensor(f"{layer}.bias")
        units = steps(low, layer, read or low.inputs[0].name)
        for old, new, step in zip(*biases, units, strict=True):
            wanted = round(Fraction(float(old.detach())) / step) * step
            assert float(new.detach()) == float(np.float32(float(wanted)))


def test_nothing_but_biases_changes_and_a_second_run_changes_nothing():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, 8)
    once = kept_promise(PASS, low, where)
    old, new = low.tensors(), once.program.tensors()
    assert {n for n in new if not torch.equal(new[n], old[n])} == {
        "one.bias", "two.bias", "three.bias"
    }
    assert once.program.origin is low.origin
    assert not apply(PASS, once.program, where).modified


def test_convolutions_and_fused_ones_have_their_biases_rounded_too():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval()
    program, where = capture(module, (torch.randn(2, 3, 7, 7),)), context(3, 7, 7)
    low = Pipeline.parse("insert-fake-quant{target=onnx}").run(program, where).program
    after = kept_promise(PASS, low, where)
    assert {r.node for r in after.remarks if r.kind == "applied"} == {"conv2d", "conv2d_1"}
    fused = apply(FuseConvBnRelu(), program, where).program
    low = Pipeline.parse("insert-fake-quant{target=openvino}").run(fused, where).program
    found = kept_promise(PASS, low, where).program
    assert next(found.calls(CONV_ACT.op), None) is not None
    assert torch.equal(found.tensor("0.bias"), after.program.tensor("0.bias"))


class Shared(nn.Module):
    """Two layers of one bias, on grids of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.bias = self.one.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def test_a_bias_of_two_layers_is_rounded_for_each():
    program, where = program_of(Shared, 4), context(4)
    low = quantised(program, where, 8)
    after = kept_promise(PASS, low, where).program
    linears = list(after.calls(torch.ops.aten.linear.default))
    names = {str(node.args[2].target) for node in linears}
    assert len(names) == 2
    assert not torch.equal(*(after.tensor(name) for name in names))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda _: quantised_weights_only(), "its input is not quantised"),
        (lambda low: with_tensor(low, "one.bias", torch.full((9,), 1e12)),
         "its bias exceeds 32 bits in steps of the scales' product"),
    ],
)  # fmt: skip
def test_what_has_no_integer_bias_is_left_with_its_reason(spoil, reason):
    where = context(3)
    low = spoil(quantised(program_of(Mlp, 3), where, 8))
    result = apply(PASS, low, where)
    assert reason in {r.message for r in result.remarks if r.kind == "missed"}
    assert torch.equal(result.program.tensor("one.bias"), low.tensor("one.bias"))


def quantised_weights_only():
    where = context(3)
    return quantised(program_of(Mlp, 3), where, 8, weight_only=True)


def with_tensor(program, name, value):
    rw = Rewrite(program, "set", Context())
    rw.set_tensor(name, value)
    return rw.finish()


@pytest.mark.parametrize("how", ["zeroed", "doubled", "a hundredth more", "NaN"])
@pytest.mark.parametrize("name", ["two.bias", "two.weight"])
def test_a_spoilt_result_breaks_the_promise(name, how):
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, 8)
    result = apply(PASS, low, where)
    assert not promise_of_spoilt(PASS, low, result, where, name, how)


def test_the_budget_is_the_users():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, 2)
    with pytest.raises(VerificationError, match="round-biases"):
        Pipeline.parse("round-biases{sqnr_db=300}").run(low, where)


def test_onnx_runtime_computes_the_program_more_nearly(tmp_path):
    where = context(3, 8, 8)
    program = Pipeline.parse("fold-batch-norm").run(program_of(Layers, 3, 8, 8)).program
    low = Pipeline.parse("insert-fake-quant{target=onnx,bits=[w4a4]}").run(program, where).program
    x = where.data.inputs[0]
    ratios = []
    for number, candidate in enumerate((low, apply(PASS, low, where).program)):
        runner = build(candidate, "onnx", tmp_path / str(number), verify=False).load()
        with torch.no_grad():
            truth = candidate(x)[0]
        ratios.append(sqnr_db(torch.from_numpy(runner.run([x.numpy()])[0]), truth.double()))
    assert ratios[1] > ratios[0] + 6

"""correct-bias: the mean of what quantisation took is given back, layer by layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.checks import check
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.passes.correct_bias import CorrectBias
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.pipeline import Pipeline
from pruna_ir.transform import Context, Rewrite, apply
from tests.passes.compensation import (
    SPOILT,
    Layers,
    Mlp,
    Residual,
    context,
    kept_promise,
    program_of,
    promise_of_spoilt,
)
from tests.passes.low_bits import quantised

PASS = CorrectBias()


def changed(before, after):
    old = before.tensors()
    return {n for n, t in after.tensors().items() if n not in old or not torch.equal(t, old[n])}


def outputs(program, where):
    with torch.no_grad():
        return torch.cat([program(*batch.inputs)[0] for batch in where.data])


def on_grid(program, name, low, high, axis):
    scale, zero = program.tensor(f"{name}_scale"), program.tensor(f"{name}_zero_point")
    return lambda x: fake_quant(x, scale, zero, axis, low, high)


@given(bits=st.integers(2, 8), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_each_layer_is_corrected_on_what_the_corrected_ones_before_it_yield(bits, seed):
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    low = quantised(program, where, bits)
    after = kept_promise(PASS, low, where).program
    limit = 2 ** (bits - 1) - 1
    x = was = where.data.inputs[0]
    names = [("one", "x"), ("two", None), ("three", "relu")]
    with torch.no_grad():
        for layer, read in names:
            weight, bias = program.tensor(f"{layer}.weight"), program.tensor(f"{layer}.bias")
            source = read or "linear"
            source = source if f"{source}_scale" in low.tensors() else low.inputs[0].name
            x = on_grid(low, source, 0, 255, None)(x)
            rounded = on_grid(low, f"{layer}.weight", -limit, limit, 0)(weight)
            product, was = x @ rounded.T, was @ weight.T + bias
            wanted = (was - product).double().mean(0)
            torch.testing.assert_close(
                after.tensor(f"{layer}.bias").double(), wanted, atol=3e-6, rtol=1e-5
            )
            x = product + wanted.float()
            if layer == "two":
                x, was = x.relu(), was.relu()
    assert changed(low, after) == {"one.bias", "two.bias", "three.bias"}


def test_a_padded_convolution_gets_the_mean_over_all_positions():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, stride=2)).eval()
    program, where = capture(module, (torch.randn(2, 2, 7, 7),)), context(2, 7, 7)
    low = quantised(program, where, 3)
    after = kept_promise(PASS, low, where).program
    wanted = outputs(program, where)
    gaps = [(wanted - outputs(p, where)).mean((0, 2, 3)).abs().max() for p in (after, low)]
    assert float(gaps[0]) < 1e-6
    assert float(gaps[1]) > 1e-3


def test_every_place_for_a_bias():
    program, where = program_of(Layers, 3, 8, 8), context(3, 8, 8)
    low = quantised(program, where, 3)
    after = kept_promise(PASS, low, where).program
    assert changed(low, after) == {
        "first.bias", "norm.running_mean", "bare.bias", "grouped.bias", "matmul_bias", "last.bias",
    }  # fmt: skip
    assert isinstance(after.tensor("bare.bias"), nn.Parameter)
    gaps = [(outputs(p, where) - outputs(program, where)).mean(0).norm() for p in (after, low)]
    assert gaps[0] < 0.01 * gaps[1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding="same"), (4, 9)),
        (nn.Linear(7, 3, bias=False), (5, 7)),
    ],
)
def test_kinds_of_layers(layer, shape):
    torch.manual_seed(0)
    layer.reset_parameters()
    program = capture(nn.Sequential(layer, nn.Tanh()).eval(), (torch.randn(2, *shape),))
    where = context(*shape)
    assert kept_promise(PASS, quantised(program, where, 2), where).modified


def test_layers_that_stay_float_and_those_without_a_counterpart_are_left_alone():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, leave=("linear_1",))
    after = kept_promise(PASS, low, where).program
    assert changed(low, after) == {"one.bias", "three.bias"}


def test_weights_alone_quantised_are_corrected_too():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, 3, weight_only=True)
    after = kept_promise(PASS, low, where).program
    assert len(changed(low, after)) == 3


def test_what_quantisation_did_not_change_is_hardly_moved():
    program, where = program_of(Mlp, 3), context(3)
    once = kept_promise(PASS, quantised(program, where), where).program
    twice = kept_promise(PASS, once, where).program
    for name, tensor in once.tensors().items():
        assert torch.allclose(tensor, twice.tensor(name), atol=1e-6), name


def test_a_fused_convolution_is_left_alone_with_a_remark():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    program, where = capture(module, (torch.randn(2, 2, 5, 5),)), context(2, 5, 5)
    fused = apply(FuseConvBnRelu(), program).program
    result = kept_promise(PASS, quantised(fused, where), where)
    assert changed(quantised(fused, where), result.program) == {"2.bias"}
    (remark,) = (r for r in result.remarks if r.kind == "missed")
    assert remark.message == "it is fused with its activation; run correct-bias before the fusion"


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["blocks.0.4.running_mean", "blocks.1.3.weight"])
def test_a_wrong_tensor_breaks_the_promise(how, name):
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    low = quantised(program, where)
    result = kept_promise(PASS, low, where)
    assert not promise_of_spoilt(PASS, low, result, where, name, how)


def test_the_wrong_sign_breaks_the_promise():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where)
    result = kept_promise(PASS, low, where)
    rw = Rewrite(result.program, "flip", Context())
    right, plain = result.program.tensor("three.bias"), low.tensor("three.bias")
    rw.set_tensor("three.bias", 2 * plain.detach() - right.detach())
    rw.set_origin(result.program.origin)
    report = check(PASS, low, rw.finish(), context=where, assurances=result.assurances)
    assert not report.passed
    assert report.where == "means of linear_2"


def test_it_needs_data_and_an_origin():
    program, where = program_of(Mlp, 3), context(3)
    with pytest.raises(UsageError, match="correct-bias needs calibration data"):
        apply(PASS, quantised(program, where), Context())
    with pytest.raises(PassError, match="correct-bias: the program does not know"):
        apply(PASS, program, where)


def test_data_that_overflows_is_refused_with_the_layer():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where)
    where.data.inputs[0][7] = float("nan")
    with pytest.raises(PassError, match=r"drives it to inf or NaN\n  %linear"):
        apply(PASS, low, where)


def test_in_a_pipeline_right_after_quantisation():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    text = "canonicalize,fold-batch-norm,insert-fake-quant,correct-bias"
    where = Context(data=where.data, target="onnx")
    result = Pipeline.parse(text).run(program, where)
    assert [step.check.effect.value for step in result.steps if step.modified] == [
        "rounding", "bounded", "fitted",
    ]  # fmt: skip

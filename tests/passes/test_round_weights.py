"""round-weights: weights go to the grid point, next below or above, that the outputs want."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.call import Call
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import KERNEL, fake_quant
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.passes.round_weights import RoundWeights
from pruna_ir.passes.weight_grids import rounded_layers
from pruna_ir.pipeline import Pipeline
from pruna_ir.transform import Context, Rewrite, apply
from tests.passes.compensation import Layers, Mlp, Residual, context, kept_promise, program_of
from tests.passes.low_bits import quantised

QUICK = RoundWeights(iterations=40, batch=64)


def changed(before, after):
    return {n for n, t in after.tensors().items() if not torch.equal(t, before.tensors()[n])}


def rounded(program, name, bits, axis=0):
    limit = 2 ** (bits - 1) - 1
    scale, zero = program.tensor(f"{name}_scale"), program.tensor(f"{name}_zero_point")
    return fake_quant(program.tensor(name).detach(), scale, zero, axis, -limit, limit)


def single(inputs=6, outputs=1, seed=0, rows=200):
    """One linear layer whose inputs depend on one another, and data for it."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs).eval()
    x = torch.randn(rows, 2) @ torch.randn(2, inputs)
    x = x + 0.1 * torch.randn(rows, inputs)
    return capture(layer, (x[:2],)), Context(data=TensorData((x,), batch_size=77))


def error(weight, program, low, where):
    """The mean squared error of the layer's output with a weight, on its quantised inputs."""
    with torch.no_grad():
        wanted = program(*where.data.inputs)[0]
        made = inputs_read(low, where) @ weight.T + low.tensor("bias")
        return float((wanted - made).double().square().mean())


def inputs_read(low, where):
    """What the first layer reads."""
    fake = Call(low, next(n for n in low.calls(KERNEL.op) if n.args[0].op == "placeholder"))
    scale, zero = fake.parameter("scale"), fake.parameter("zero_point")
    return fake_quant(where.data.inputs[0], scale, zero, None, 0, 255)


@given(bits=st.integers(2, 8), seed=st.integers(0, 9), clip=st.sampled_from([1.0, 0.7]))
@settings(deadline=None, max_examples=20)
def test_weights_end_on_the_grid_less_than_a_step_away(bits, seed, clip):
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    low = quantised(program, where, bits, clip=clip)
    after = kept_promise(QUICK, low, where).program
    limit = 2 ** (bits - 1) - 1
    for name in ("one.weight", "two.weight", "three.weight"):
        new, old = after.tensor(name), low.tensor(name)
        scale = low.tensor(f"{name}_scale")[:, None]
        assert torch.equal(rounded(after, name, bits), new)
        start = (old.double() / scale).clamp(-limit, limit)
        levels = (new.double() / scale).round()
        moved = (levels - start).abs()
        # Where a weight is an integer already, division may miss it by an ulp.
        integer = (start - start.round()).abs() < 1e-5
        assert bool((levels == start.round())[integer].all())
        assert bool((moved < 1.0)[~integer].all())
    assert changed(low, after) <= {"one.weight", "two.weight", "three.weight"}


def test_it_finds_roundings_that_are_near_the_best_of_all():
    gained = [share_of_the_possible_gain(seed) for seed in range(6)]
    assert min(gained) >= 0.0
    assert max(gained) <= 1.001
    assert sum(gained) / len(gained) > 0.5


def share_of_the_possible_gain(seed):
    program, where = single(inputs=9, seed=seed)
    low = quantised(program, where, 3)
    weight, scale = low.tensor("weight").detach(), low.tensor("weight_scale")
    floor = (weight / scale).floor()
    all_of_them = [
        ((floor + torch.tensor([ups])).clamp(-3, 3) * scale)
        for ups in itertools.product((0.0, 1.0), repeat=9)
    ]
    best = min(error(w, program, low, where) for w in all_of_them)
    plain = error(rounded(low, "weight", 3), program, low, where)
    after = kept_promise(RoundWeights(iterations=600), low, where).program
    found = error(after.tensor("weight"), program, low, where)
    return (plain - found) / (plain - best)


def test_the_error_falls_far_below_that_of_rounding_to_nearest():
    program, where = single(inputs=40, outputs=7)
    low = quantised(program, where, 4)
    result = kept_promise(RoundWeights(iterations=300), low, where)
    plain = error(rounded(low, "weight", 4), program, low, where)
    found = error(result.program.tensor("weight"), program, low, where)
    assert found < 0.1 * plain
    (remark,) = result.remarks
    assert remark.message == (
        f"squared error {found / plain:.3g} of that with rounding to nearest"
    )


def test_later_layers_are_fitted_on_what_the_rounded_ones_before_them_yield():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where, 3)
    whole = kept_promise(QUICK, low, where).program
    scope = apply(QUICK, low, where, scope=("one",)).program
    assert changed(low, scope) == {"one.weight"}
    assert torch.equal(scope.tensor("one.weight"), whole.tensor("one.weight"))
    rest = kept_promise(QUICK, scope, where).program
    for name in ("two.weight", "three.weight"):
        assert torch.equal(rest.tensor(name), whole.tensor(name))


def test_the_relu_behind_a_layer_counts():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    program, where = capture(module, (torch.randn(2, 12),)), context(12, samples=90)
    low = quantised(program, where, 3)
    behind = RoundWeights(iterations=200)
    before = RoundWeights(iterations=200, activations=False)
    lost = []
    for pass_ in (behind, before):
        after = kept_promise(pass_, low, where).program
        with torch.no_grad():
            made = inputs_read(low, where) @ after.tensor("0.weight").T + low.tensor("0.bias")
            wanted = module[0](where.data.inputs[0])
            lost.append(float((made.relu() - wanted.relu()).square().sum()))
    assert lost[0] < lost[1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 7)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
        (nn.Conv1d(3, 5, 4, padding="same", dilation=2), (3, 11)),
        (nn.Conv3d(2, 3, 2), (2, 3, 4, 4)),
        (nn.Linear(7, 3, bias=False), (5, 7)),
    ],
)
@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU6()])
def test_kinds_of_layers(layer, shape, behind):
    torch.manual_seed(0)
    layer.reset_parameters()
    program = capture(nn.Sequential(layer, behind, nn.Tanh()).eval(), (torch.randn(2, *shape),))
    where = context(*shape)
    low = quantised(program, where, 3)
    assert changed(low, kept_promise(QUICK, low, where).program) == {"0.weight"}


def test_matrix_products_of_every_spelling_and_layers_with_batch_norms():
    program, where = program_of(Layers, 3, 8, 8), context(3, 8, 8)
    low = quantised(program, where, 4)
    after = kept_promise(QUICK, low, where).program
    assert changed(low, after) == {
        "first.weight", "normed.weight", "bare.weight", "grouped.weight", "weight", "last.weight",
    }  # fmt: skip


class Addmm(nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))
        self.beta = beta

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, beta=self.beta)


def test_addmm_keeps_its_weight_the_other_way_round():
    program, where = program_of(Addmm, 6), context(6)
    low = quantised(program, where, 4)
    after = kept_promise(QUICK, low, where).program
    assert changed(low, after) == {"weight"}
    assert torch.equal(rounded(after, "weight", 4, axis=1), after.tensor("weight"))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.table = nn.ConvTranspose1d(3, 3, 2), nn.Embedding(4, 3)
        self.twice = nn.Conv1d(3, 3, 1)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.up(x)))).mean(2)
        return self.head(x + self.table(torch.zeros((), dtype=torch.int64)))


def test_what_is_left_alone_and_an_embedding_keeps_its_own_weight():
    program, where = program_of(Shared, 3, 5), context(3, 5)
    low = quantised(program, where, 3)
    result = kept_promise(QUICK, low, where)
    (layer,) = (
        layer for layer in rounded_layers(result.program, program)
        if not isinstance(layer, tuple)
    )  # fmt: skip
    assert not layer.off_grid()
    (table,) = result.program.calls(torch.ops.aten.embedding.default)
    kept = Call(result.program, table).producer("weight").target
    assert layer.source.target != kept
    assert torch.equal(result.program.tensor(kept), low.tensor(kept))
    reasons = {r.node: r.message for r in result.remarks if r.kind == "missed"}
    assert len(reasons) == 3
    assert reasons.pop("conv_transpose1d") == "it is a transposed convolution"
    assert all(why.startswith("its weight is also read by fake_quant") for why in reasons.values())


def test_addmm_that_scales_and_fused_convolutions_are_left_alone():
    torch.manual_seed(0)
    program, where = capture(Addmm(beta=0.5).eval(), (torch.randn(2, 6),)), context(6)
    result = apply(QUICK, quantised(program, where), where)
    assert [r.message for r in result.remarks] == ["it scales its operands"]
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).eval()
    fused = apply(FuseConvBnRelu(), capture(module, (torch.randn(2, 2, 5, 5),))).program
    where = context(2, 5, 5)
    result = apply(QUICK, quantised(fused, where), where)
    assert not result.modified
    assert [r.message for r in result.remarks] == [
        "it is fused with its activation; run round-weights before the fusion"
    ]


def test_a_second_run_changes_nothing():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    once = kept_promise(QUICK, quantised(program, where), where).program
    again = apply(QUICK, once, where)
    assert not again.modified
    assert {r.message for r in again.remarks} == {"its weights lie on the grid already"}


def test_the_same_seed_gives_the_same_weights_and_progress_is_told():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where)
    told = []
    where = Context(data=where.data, progress=lambda *what: told.append(what), seed=3)
    hasty = RoundWeights(iterations=9, batch=4)
    first, second = (apply(hasty, low, where).program for _ in range(2))
    assert first.hash() == second.hash()
    assert told[0] == ("round-weights", 1, 27)
    assert told[-1] == ("round-weights", 27, 27)


SPOILT = {
    "off the grid": lambda w, _: w * 1.01,
    "two steps away": lambda w, s: w + 2 * s * torch.where(w > 0, -1.0, 1.0),
    "NaN": lambda w, _: w * float("nan"),
    "another rounding": lambda w, s: w + s * torch.where(w > 0, -1.0, 1.0),
}


@pytest.mark.parametrize("how", SPOILT)
def test_wrong_weights_break_the_promise(how):
    program, where = single(inputs=12, outputs=4)
    low = quantised(program, where)
    result = kept_promise(QUICK, low, where)
    rw = Rewrite(result.program, "spoil", Context())
    scale = low.tensor("weight_scale")[:, None]
    rw.set_tensor("weight", SPOILT[how](result.program.tensor("weight").detach(), scale))
    rw.set_origin(result.program.origin)
    report = check(QUICK, low, rw.finish(), context=where, assurances=result.assurances)
    assert not report.passed


def test_a_worse_rounding_breaks_the_promise_though_it_is_on_the_grid():
    program, where = single(inputs=12, outputs=4)
    low = quantised(program, where)
    result = kept_promise(QUICK, low, where)
    scale = low.tensor("weight_scale")[:, None]
    up = (low.tensor("weight").detach() / scale).ceil().clamp(-7, 7) * scale
    rw = Rewrite(result.program, "spoil", Context())
    rw.set_tensor("weight", up)
    rw.set_origin(result.program.origin)
    report = check(QUICK, low, rw.finish(), context=where, assurances=result.assurances)
    assert not report.passed
    assert report.where == "error of linear over that of rounding to nearest"


def test_another_tensor_that_changed_breaks_the_promise():
    program, where = single()
    low = quantised(program, where)
    result = kept_promise(QUICK, low, where)
    rw = Rewrite(result.program, "spoil", Context())
    rw.set_tensor("bias", result.program.tensor("bias").detach() + 1e-6)
    rw.set_origin(result.program.origin)
    report = check(QUICK, low, rw.finish(), context=where, assurances=result.assurances)
    assert not report.passed


def test_it_needs_data_an_origin_and_sane_options():
    program, where = program_of(Mlp, 3), context(3)
    with pytest.raises(UsageError, match="round-weights needs calibration data"):
        apply(QUICK, quantised(program, where), Context())
    with pytest.raises(PassError, match="round-weights: the program does not know"):
        apply(QUICK, program, where)
    for options, message in [
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"positions": -1}, "positions must be at least 0, not -1"),
        ({"rate": 0.0}, "rate must be above 0, not 0.0"),
        ({"regularisation": float("nan")}, "regularisation must be above 0, not nan"),
    ]:
        with pytest.raises(UsageError, match=message):
            RoundWeights(**options)


def test_data_that_overflows_is_refused_with_the_layer():
    program, where = program_of(Mlp, 3), context(3)
    low = quantised(program, where)
    where.data.inputs[0][7] = float("nan")
    with pytest.raises(PassError, match=r"drives it to inf or NaN\n  %linear"):
        apply(QUICK, low, where)


def test_in_a_pipeline_behind_quantisation():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    text = "canonicalize,fold-batch-norm,insert-fake-quant"
    text += ",round-weights{iterations=9},correct-bias"
    result = Pipeline.parse(text).run(program, Context(data=where.data, target="onnx"))
    assert [step.check.effect.value for step in result.steps if step.modified] == [
        "rounding", "bounded", "fitted", "fitted",
    ]  # fmt: skip

"""What insert-fake-quant promises beside its noise budget, each with controls that must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pruna_ir.checks import CheckReport, check
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.quant_placement import is_quantised
from pruna_ir.program import Program
from pruna_ir.transform import Context, PassResult, Rewrite, apply
from tests.passes.test_insert_fake_quant import Net, captured, conv_acts, data, fused

aten = torch.ops.aten
CONTEXT = Context(data=data(3, 15, 15), target="onnx")


def run(pass_: InsertFakeQuant) -> tuple[Program, PassResult]:
    program = captured(Net(), 3, 15, 15)
    return program, apply(pass_, program, CONTEXT)


def judged(pass_: InsertFakeQuant, edit: Callable[[Rewrite], None]) -> CheckReport:
    """The check's report on the pass's result after an edit of ours."""
    program, result = run(pass_)
    rw = Rewrite(result.program, "edit", Context())
    edit(rw)
    return check(
        pass_, program, rw.finish(), context=CONTEXT, assurances=result.assurances
    )


def nothing(_rw: Rewrite) -> None:
    pass


def scaled(name: str, factor: float) -> Callable[[Rewrite], None]:
    return lambda rw: rw.set_tensor(name, rw.program.tensor(name) * factor)


def drop_relu(rw: Rewrite) -> None:
    relu = next(rw.calls(aten.relu.default))
    rw.replace(relu, relu.all_input_nodes[0])


def nudge_bias(rw: Rewrite) -> None:
    bias = rw.program.tensor("head.bias").clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(1e9))
    rw.set_tensor("head.bias", bias)


def nudge_weight(rw: Rewrite) -> None:
    weight = rw.program.tensor("head.weight").clone()
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(0.0))
    rw.set_tensor("head.weight", weight)


def fakes(rw: Rewrite, *, of_weights: bool) -> list[torch.fx.Node]:
    found = [node for node in rw.calls() if is_quantised(node)]
    return [n for n in found if (rw.call(n).parameter("x") is not None) is of_weights]


def other_bits(rw: Rewrite) -> None:
    rw.update(fakes(rw, of_weights=False)[2], qmax=127)


def other_weight_grid(rw: Rewrite) -> None:
    rw.update(fakes(rw, of_weights=True)[0], qmin=-128)


def other_axis(rw: Rewrite) -> None:
    """The block's convolution has as many inputs as outputs, so that either axis fits."""
    fake = next(f for f in fakes(rw, of_weights=True) if rw.call(f).parameter("x").shape[1] == 6)
    rw.update(fake, axis=1)


def bare_weight(rw: Rewrite) -> None:
    fake = fakes(rw, of_weights=True)[-1]
    rw.replace(fake, rw.call(fake).producer("x"))


def shifted_zero(rw: Rewrite) -> None:
    rw.set_tensor("head.weight_zero_point", rw.program.tensor("head.weight_zero_point") + 1)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a3"])
def test_they_hold(method: str, granularity: str, bits: str) -> None:
    pass_ = InsertFakeQuant(weights=method, granularity=granularity, bits=(bits,))
    report = judged(pass_, nothing)
    assert report.passed, report


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (drop_relu, "with all fake-quants taken out"),
        (nudge_bias, "with all fake-quants taken out"),
        (nudge_weight, "with all fake-quants taken out"),
        (other_bits, "off their grid"),
        (other_weight_grid, "off their grid"),
        (other_axis, "off their grid"),
        (shifted_zero, "off their grid"),
        (bare_weight, "weights without a fake-quant: linear"),
        (scaled("head.weight_scale", 0.0), "off their grid"),
        (scaled("head.weight_scale", 0.9), "largest value over the grid's reach"),
    ],
)
def test_controls_fail(edit: Callable[[Rewrite], None], what: str) -> None:
    report = judged(InsertFakeQuant(sqnr_db=-1000.0), edit)
    assert not report.passed
    assert what in report.where
    assert "dB" not in str(report)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", ["w8a8", "w3a4"])
def test_they_hold_for_powers_of_two(method: str, bits: str) -> None:
    pass_ = InsertFakeQuant(weights=method, scales="powers-of-two", bits=(bits,))
    report = judged(pass_, nothing)
    assert report.passed, report


@pytest.mark.parametrize("name", ["block.conv1.weight_scale", "head.weight_scale"])
def test_a_scale_that_is_no_power_of_two_fails_where_they_were_asked_for(name: str) -> None:
    pass_ = InsertFakeQuant(scales="powers-of-two", sqnr_db=-1000.0)
    report = judged(pass_, scaled(name, 1.01))
    assert not report.passed
    assert "off their grid" in report.where
    assert judged(InsertFakeQuant(sqnr_db=-1000.0), scaled(name, 1.01)).passed


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scale_that_costs_more_than_minmax_fails_for_mse(factor: float) -> None:
    pass_ = InsertFakeQuant(weights="mse", sqnr_db=-1000.0)
    report = judged(pass_, scaled("block.conv1.weight_scale", factor))
    assert not report.passed
    assert "squared error over that of minmax" in report.where


def test_fused_convolutions_that_were_spelt_out_are_told_apart() -> None:
    program = fused("relu", residual=True)
    context = Context(data=data(3, 7, 7), target="onnx")
    pass_ = InsertFakeQuant()
    result = apply(pass_, program, context)
    assert conv_acts(program)
    assert not conv_acts(result.program)
    report = check(pass_, program, result.program, context=context, assurances=result.assurances)
    assert report.passed, report


def test_a_second_scope_is_judged_on_what_it_inserted() -> None:
    program = captured(Net(), 3, 15, 15)
    first = apply(InsertFakeQuant(), program, CONTEXT, scope=("block",)).program
    pass_ = InsertFakeQuant(bits=("w4a4",))
    result = apply(pass_, first, CONTEXT)
    report = check(pass_, first, result.program, context=CONTEXT, assurances=result.assurances)
    assert report.passed, report

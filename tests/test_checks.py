"""Each effect's check: it accepts what keeps the promise, and its control fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.equivalence import run_float64
from pruna_ir.errors import PassError, VerificationError
from pruna_ir.transform import Context, Effect, Finding, Pass, Rewrite, apply
from tests.networks import DropRelu, ScaleHead, aten, conv_net, seeded


@dataclass(frozen=True)
class Exact(ScaleHead):
    effect: ClassVar[Effect] = Effect.EXACT


@dataclass(frozen=True)
class Bounded(ScaleHead):
    effect: ClassVar[Effect] = Effect.BOUNDED
    min_sqnr_db: ClassVar[float] = 40.0


@dataclass(frozen=True)
class HalveHead(ScaleHead):
    """States truthfully, or with a lie, that the head's weight is scaled."""

    effect: ClassVar[Effect] = Effect.ORACLE
    factor: float = 0.5
    stated: float = 0.5

    def rewrite(self, rw: Rewrite) -> None:
        super().rewrite(rw)
        bias = rw.before.tensor("head.bias").detach().double()
        rw.promise(
            lambda before, inputs: tuple(
                (y - bias) * self.stated + bias for y in run_float64(before, inputs)
            )
        )


def run(pass_, program=None, context=None):
    program = program or conv_net()
    result = apply(pass_, program, context)
    return check(pass_, program, result.program, result.oracle, context)


def test_exact_accepts_nothing_but_the_same_bits():
    assert run(Exact(factor=1.0)).passed
    report = run(Exact(factor=1 + 2**-23))
    assert not report.passed
    assert 0 < report.measured < 1e-6


def test_rounding_sees_a_change_far_below_float32_tolerances():
    report = run(ScaleHead(factor=1 + 1e-6))
    assert not report.passed
    assert 1e-8 < report.measured < 1e-5
    assert "output" in report.where


def test_rounding_accepts_another_order_of_operations():
    @dataclass(frozen=True)
    class Reorder(Pass):
        name: ClassVar[str] = "reorder"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def rewrite(self, rw):
            for node in rw.calls(aten.linear.default):
                call = rw.call(node)
                product = rw.insert(
                    aten.linear.default, before=node, like=node,
                    input=call.producer("input"), weight=call.producer("weight"),
                )  # fmt: skip
                total = rw.insert(
                    aten.add.Tensor, before=node, like=node,
                    self=product, other=call.producer("bias"),
                )  # fmt: skip
                rw.replace(node, total)

    report = run(Reorder())
    assert report.passed
    assert report.measured < 1e-12


def test_rounding_catches_a_dropped_relu():
    report = run(DropRelu())
    assert not report.passed
    assert report.measured > 1e-3


def test_rounding_catches_a_rewrite_that_loses_working_precision():
    """The real-number function stays, but the float32 result drowns in cancellation."""

    @dataclass(frozen=True)
    class Cancel(Pass):
        name: ClassVar[str] = "cancel"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def rewrite(self, rw):
            (node,) = rw.calls(aten.linear.default)
            away = rw.insert(aten.add.Tensor, before=node, like=node, self=node, other=4096.0)
            back = rw.insert(aten.sub.Tensor, before=node, like=node, self=away, other=4096.0)
            node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not away)
            node.append(away)
            away.append(back)

    report = run(Cancel())
    assert not report.passed
    assert "working precision" in report.where
    assert report.rounding > 8


def test_bounded_holds_its_budget_and_no_more():
    assert run(Bounded(factor=1.001)).passed
    report = run(Bounded(factor=1.2))
    assert not report.passed
    assert 5 < report.measured < 40


def test_bounded_is_judged_on_the_data_given():
    data = TensorData((torch.zeros(4, 3, 9, 9),), batch_size=4)
    assert run(Bounded(factor=1.001), context=Context(data=data)).where.startswith(
        "stimulus 'data'"
    )


def test_an_oracle_is_held_to_what_it_states():
    assert run(HalveHead()).passed
    assert not run(HalveHead(stated=0.5 + 1e-6)).passed


def test_an_oracle_pass_must_state_one():
    program = conv_net()
    with pytest.raises(VerificationError, match="did not state"):
        check(HalveHead(), program, apply(ScaleHead(), program).program)


def test_nan_never_passes():
    report = run(ScaleHead(factor=math.nan))
    assert not report.passed
    assert report.measured == math.inf


def test_the_program_is_compared_at_other_batch_sizes():
    """A rewrite that is right only at the example's batch is caught by the boundary sizes."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * x.shape[0]

    @dataclass(frozen=True)
    class Freeze(Pass):
        name: ClassVar[str] = "freeze-batch"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def rewrite(self, rw):
            for node in rw.calls(aten.mul.Tensor):
                rw.update(node, other=2)

    program = capture(Scaled(), (torch.randn(2, 3),))
    report = run(Freeze(), program)
    assert not report.passed
    assert "'large'" in report.where or "'normal'" in report.where


def test_gates_that_no_stimulus_reached_are_reported():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(nn.functional.relu6(x.tanh()))

    report = run(ScaleHead(factor=1.0), capture(seeded(Dead), (torch.randn(2, 3),)))
    assert report.passed
    assert next(iter(report.gates.one_sided.values())).startswith("never high")


def test_inputs_stay_as_they_are_when_a_program_writes_into_them():
    x = torch.linspace(-4, 4, 6).reshape(2, 3)
    program = capture(nn.Sequential(nn.ReLU(inplace=True), seeded(_Head)), (x,))
    report = run(ScaleHead(factor=1.0 + 1e-6), program)
    assert not report.passed
    assert float(x.min()) == float(program.examples[0].min()) == -4.0


class _Head(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


@dataclass(frozen=True)
class Fitted(ScaleHead):
    """Scales the head and states that its norm is what the factor makes of it, or a lie."""

    effect: ClassVar[Effect] = Effect.FITTED
    factor: float = 0.5
    stated: float = 0.5

    def rewrite(self, rw: Rewrite) -> None:
        super().rewrite(rw)
        rw.assure(lambda *_: [Finding("nothing of note", 0.0, 0.0)])
        rw.assure(self.holds)

    def holds(self, before, after, context):
        old, new = (p.tensor("head.weight").detach().norm() for p in (before, after))
        return [Finding("norm of the head", float((new / old - self.stated).abs()), 1e-6)]


def fitted_report(pass_):
    program = conv_net()
    result = apply(pass_, program)
    return check(pass_, program, result.program, assurances=result.assurances)


def test_fitted_runs_every_test_that_the_pass_states():
    assert fitted_report(Fitted()).passed
    report = fitted_report(Fitted(stated=0.6))
    assert not report.passed
    assert report.where == "norm of the head"
    assert report.measured == pytest.approx(0.1, abs=1e-6)


def test_fitted_figures_that_are_nan_fail():
    report = fitted_report(Fitted(factor=math.nan))
    assert not report.passed
    assert math.isnan(report.measured)


def test_a_fitted_pass_must_state_a_test():
    @dataclass(frozen=True)
    class Silent(ScaleHead):
        effect: ClassVar[Effect] = Effect.FITTED
        factor: float = 0.5

    with pytest.raises(PassError, match="scale-head changed the function without stating what h"):
        apply(Silent(), conv_net())
    with pytest.raises(VerificationError, match="did not state what holds"):
        check(Silent(), conv_net(), conv_net())

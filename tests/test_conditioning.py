"""Stimuli on which a program differs from itself: set aside with a note, never to pass a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.conditioning import movement
from pruna_ir.data import TensorData
from pruna_ir.equivalence import run_float64
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.transform import Context, Effect, Pass, apply
from tests.networks import ScaleHead, aten, conv_net


class NormTower(nn.Module):
    """Instance norms in a row: singular where the image is constant, harmless elsewhere."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 1)]
        for _ in range(depth):
            layers += [nn.InstanceNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)]
        self.tower = nn.Sequential(*layers)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.tower(x).square().mean((2, 3)))


def tower(x=None):
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1)) if x is None else x
    return capture(NormTower().eval(), (x,))


def pruned(program):
    """The report on the pruned program, and on that program with a head that is off by 1e-6."""
    result = apply(PruneChannels(), program)
    wrong = apply(ScaleHead(factor=1 + 1e-6), result.program).program
    return (
        check(PruneChannels(), program, result.program, result.oracle),
        check(PruneChannels(), program, wrong, result.oracle),
    )


def test_a_singular_stimulus_is_set_aside_with_a_note():
    report, _ = pruned(tower())
    assert report.passed, report
    assert "'zeros'" not in report.where
    (note,) = report.notes
    assert note.startswith("stimulus 'zeros' says nothing about 1 of 1 outputs: the program's own")
    assert note.endswith("when its roundings differ by 1e-14")
    assert note in str(report)


def test_a_wrong_program_is_caught_on_the_other_stimuli():
    _, wrong = pruned(tower())
    assert not wrong.passed
    assert 1e-7 < wrong.measured < 1e-5


def test_examples_and_data_are_never_set_aside():
    report, _ = pruned(tower(torch.zeros(2, 3, 9, 7)))
    assert not report.passed
    assert "'example'" in report.where
    assert "stimulus 'example' says nothing" in report.notes[0]
    assert report.notes[0].endswith("; give inputs where it is stable")

    program = tower()
    result = apply(PruneChannels(), program)
    zeros = Context(data=TensorData((torch.zeros(2, 3, 9, 7),)))
    report = check(PruneChannels(), program, result.program, result.oracle, zeros)
    assert not report.passed
    assert "'data'" in report.where


@dataclass(frozen=True)
class Replace(Pass):
    """Another operator for one, under the promise that it computes the same."""

    name: ClassVar[str] = "replace"
    effect: ClassVar[Effect] = Effect.ROUNDING
    old: str = ""
    new: str = ""

    def rewrite(self, rw):
        for node in rw.calls(getattr(aten, self.old).Scalar):
            arguments = {"self": node.args[0], "other": node.args[1]}
            target = getattr(aten, self.new).Scalar
            rw.replace(node, rw.insert(target, before=node, like=node, **arguments))


class Steps(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype).mean(-1) + x.sum(-1)


def test_a_step_at_zero_is_no_excuse():
    """Only zeros tell ``>`` from ``>=``; noise on the inputs would hide the difference."""
    program = capture(Steps(), (torch.randn(2, 5),))
    right, wrong = Replace(old="mul", new="mul"), Replace(old="gt", new="ge")
    assert check(right, program, apply(right, program).program).passed
    report = check(wrong, program, apply(wrong, program).program)
    assert not report.passed
    assert "'zeros'" in report.where
    assert not report.notes


class Chaos(nn.Module):
    """The logistic map: doubles every rounding error, or nearly, in every step."""

    def forward(self, x):
        x = x.sigmoid()
        for _ in range(90):
            x = (1 - x) * 3.99 * x
        return x.mean(-1)


@dataclass(frozen=True)
class Reorder(Pass):
    """(1 - x) 3.99 x as (1 - x) x 3.99: the same over the real numbers."""

    name: ClassVar[str] = "reorder"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def rewrite(self, rw):
        for node in rw.calls(aten.mul.Tensor):
            scaled = node.args[0]
            if isinstance(scaled, torch.fx.Node) and scaled.target is aten.mul.Tensor:
                first, factor = scaled.args
                product = rw.insert(
                    aten.mul.Tensor, before=node, like=node, self=first, other=node.args[1]
                )
                rw.update(node, self=product, other=factor)


def test_a_program_that_is_unstable_everywhere_does_not_pass():
    program = capture(Chaos(), (torch.randn(2, 3),))
    result = apply(Reorder(), program)
    assert result.modified
    report = check(Reorder(), program, result.program)
    assert not report.passed
    assert "'example'" in report.where
    assert "'example' says nothing" in report.notes[0]


def test_not_a_number_is_no_instability():
    class Direction(nn.Module):
        def forward(self, x):
            return x / x.norm() * 2

    program = capture(Direction(), (torch.randn(2, 3),), dynamic_batch=False)
    pass_ = Replace(old="mul", new="mul")
    report = check(pass_, program, apply(pass_, program).program)
    assert not report.passed
    assert "'zeros'" in report.where
    assert not report.notes


@pytest.mark.parametrize("build", [conv_net, tower])
def test_networks_move_far_less_than_the_tolerance(build):
    program = build()
    (moved,) = movement(program, program.examples)
    assert 1e-15 < moved < 1e-11
    assert movement(program, program.examples) == [moved]


def test_exact_zeros_stay_exact():
    program = tower(torch.zeros(1, 3, 9, 7))
    zeros = capture(nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU()), (torch.zeros(2, 3),))
    assert movement(zeros, zeros.examples) == [0.0]
    assert movement(program, program.examples)[0] > 1e-3
    assert torch.isfinite(run_float64(program, program.examples)[0]).all()

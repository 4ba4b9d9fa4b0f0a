"""fold-constants: stores what depends on constants only, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_constants import FoldConstants
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import NAMES, canonical, targets


class Net(nn.Module):
    """A function of an input and one parameter, float32[3, 4]."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4) / 7)

    def forward(self, x):
        return self.function(x, self.weight)


def program_of(function) -> Program:
    generator = torch.Generator().manual_seed(0)
    program = capture(Net(function), (torch.randn(2, 4, generator=generator),))
    return apply(Canonicalize(), program).program


def folded(program: Program, **options: int) -> PassResult:
    """The result of one run, checked bit for bit and for a second run."""
    pass_ = FoldConstants(**options)
    result = apply(pass_, program)
    verify(result.program)
    report = check(pass_, program, result.program)
    assert report.passed, report
    assert not apply(pass_, result.program).modified
    return result


def reasons(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_before_and_after():
    program = program_of(lambda x, _w: x + torch.arange(4.0) / 3)
    assert print_program(program) == (
        "program(x: float32[batch, 4]) {\n"
        "  %arange = aten.arange(4.0, device=cpu, pin_memory=False) : float32[4]\n"
        "  %div = aten.div.Tensor(%arange, other=3) : float32[4]\n"
        "  %add = aten.add.Tensor(%x, %div) : float32[batch, 4]\n"
        "  return output=%add\n"
        "}\n"
    )
    result = folded(program)
    assert print_program(result.program) == (
        "program(x: float32[batch, 4]) {\n"
        "  %add = aten.add.Tensor(%x, @div) : float32[batch, 4]\n"
        "  return output=%add\n"
        "}\n"
        "@div: float32[4]\n"
    )
    assert [r.message for r in result.remarks] == ["stored its value, [4]"]


@pytest.mark.parametrize("name", NAMES)
def test_real_models_stay_bit_for_bit_the_same(name):
    folded(canonical(name))


def test_swin_builds_its_masks_ahead_of_time():
    found = targets(folded(canonical("swin")).program)
    assert not {"aten.slice_scatter", "aten.full_like", "aten.new_zeros"} & set(found)


def test_a_parameter_read_through_one_view_becomes_the_view():
    program = program_of(lambda x, w: x @ w.t())
    result = folded(program)
    assert targets(result.program) == ["aten.matmul"]
    weight = result.program.tensor("weight")
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad
    assert weight.shape == (4, 3)
    assert torch.equal(weight, program.tensor("weight").t())


def test_refuses_a_view_of_a_parameter_with_another_reader():
    result = folded(program_of(lambda x, w: (x @ w.t()) + w.sum()), freeze=False)
    assert not result.modified
    assert reasons(result) == [
        "it is a view of weight, which others read too",
        "it is computed from weight, which would no longer train (freeze=false)",
    ]


def test_what_is_computed_from_parameters_is_frozen_with_a_note():
    result = folded(program_of(lambda x, w: x + w.exp().sum(0)))
    assert targets(result.program) == ["aten.add.Tensor"]
    notes = [remark.message for remark in result.remarks if remark.kind == "note"]
    assert notes == ["what it takes from weight no longer trains"]


def test_refuses_to_grow_beyond_the_limit():
    def f(x, w):
        return x + torch.arange(400.0).reshape(100, 4).sum(0) + torch.zeros(50, 1, 4)

    result = folded(program_of(f), max_bytes=100)
    assert reasons(result) == ["its value would grow the program by 800 bytes, beyond max_bytes"]
    assert "aten.zeros" in targets(result.program)
    assert "aten.arange" not in targets(result.program), "16 bytes fit"


def test_random_operators_never_fold():
    result = apply(FoldConstants(), program_of(lambda x, _w: x + torch.rand(4)))
    assert targets(result.program) == ["aten.rand", "aten.add.Tensor"]


def test_uninitialised_memory_never_folds():
    result = apply(FoldConstants(), program_of(lambda x, _w: x + torch.empty(4)))
    assert "aten.empty.memory_format" in targets(result.program)


def test_values_of_dynamic_size_stay():
    result = folded(program_of(lambda x, _w: x + torch.arange(x.shape[0])[:, None]))
    assert "aten.arange" in targets(result.program)


def test_parts_of_a_split_fold_one_by_one():
    result = folded(program_of(lambda x, _w: x + torch.arange(8.0).split(4)[1]))
    assert targets(result.program) == ["aten.add.Tensor"]


_STEPS = {
    "exp": torch.exp, "neg": torch.neg, "t": lambda a: a.t(), "flip": lambda a: a.flip(0),
    "half": lambda a: a * 0.5, "cumsum": lambda a: a.cumsum(0),
    "cast": lambda a: a.double().float(), "square": lambda a: a @ a,
}  # fmt: skip


@settings(max_examples=25)
@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=6), st.integers(2, 5))
def test_any_chain_of_constants_folds_away(names, size):
    def f(x, w):
        value = torch.arange(float(size * size)).reshape(size, size) / size**2
        for name in names:
            value = _STEPS[name](value)
        return x.sum() + value

    found = targets(folded(program_of(f)).program)
    assert found == ["aten.sum", "aten.add.Tensor"]


def test_the_check_sees_a_wrong_constant():
    """A control: one changed bit in a stored value is caught by the check used above."""
    program = program_of(lambda x, _w: x + torch.arange(4.0) / 3)
    wrong = apply(FoldConstants(), program).program
    with torch.no_grad():
        wrong.tensor("div")[1] += 2**-24
    assert not check(FoldConstants(), program, wrong).passed

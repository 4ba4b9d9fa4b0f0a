"""eliminate-dead-code: removes what nobody reads, and nothing else."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.passes.eliminate_dead_code import EliminateDeadCode
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import apply
from pruna_ir.verify import verify

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x, y):
        return x * self.used


def with_dead_chain(target=aten.exp.default, *args) -> Program:
    """A program with two calls that nobody reads: a target and a relu of it."""
    torch.manual_seed(0)
    program = capture(Net(), (torch.randn(2, 3), torch.randn(2, 3))).fork()
    (mul,) = program.calls(aten.mul.Tensor)
    x = program.placeholders()[0]
    with program.graph.inserting_after(mul):
        first = program.graph.call_function(target, (x, *args))
    with program.graph.inserting_after(first):
        second = program.graph.call_function(aten.relu.default, (first,))
    for node in (first, second):
        node.meta["val"] = mul.meta["val"]
    program.module.recompile()
    return program


def test_before_and_after():
    program = with_dead_chain()
    assert print_program(program) == (
        "program(x: float32[batch, 3], y: float32[y_batch, 3]) {\n"
        "  %mul = aten.mul.Tensor(%x, @used) : float32[batch, 3]\n"
        "  %exp_default = aten.exp(%x) : float32[batch, 3]\n"
        "  %relu_default = aten.relu(%exp_default) : float32[batch, 3]\n"
        "  return output=%mul\n"
        "}\n"
        "@used: float32[3]\n"
    )
    result = apply(EliminateDeadCode(), program)
    assert print_program(result.program) == (
        "program(x: float32[batch, 3], y: float32[y_batch, 3]) {\n"
        "  %mul = aten.mul.Tensor(%x, @used) : float32[batch, 3]\n"
        "  return output=%mul\n"
        "}\n"
        "@used: float32[3]\n"
    )
    assert [str(r) for r in result.remarks] == [
        "eliminate-dead-code: applied: relu_default: removed: nobody reads its result",
        "eliminate-dead-code: applied: exp_default: removed: nobody reads its result",
    ]


def test_keeps_the_function_bit_for_bit():
    program = with_dead_chain()
    result = apply(EliminateDeadCode(), program)
    verify(result.program)
    assert check(EliminateDeadCode(), program, result.program).passed


def test_unused_inputs_stay():
    result = apply(EliminateDeadCode(), with_dead_chain())
    assert [node.name for node in result.program.placeholders()] == ["x", "y"]


def test_random_operators_stay():
    """Without the draw, a later draw would give other numbers."""
    program = with_dead_chain(aten.dropout.default, 0.5, True)  # noqa: FBT003
    found = [str(n.target) for n in apply(EliminateDeadCode(), program).program.calls()]
    assert found == ["aten.mul.Tensor", "aten.dropout.default"]


def test_writes_stay():
    program = with_dead_chain(aten.add_.Tensor, 1)
    found = [str(n.target) for n in apply(EliminateDeadCode(), program).program.calls()]
    assert found == ["aten.mul.Tensor", "aten.add_.Tensor"]


def test_second_run_changes_nothing():
    once = apply(EliminateDeadCode(), with_dead_chain()).program
    assert not apply(EliminateDeadCode(), once).modified

"""The rewriter: fresh shapes, kept provenance, tied weights, near misses with their source."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.context import Context
from pruna_ir.errors import InvalidIRError
from pruna_ir.printer import print_program
from pruna_ir.program import module_path, shape_of, source_line
from pruna_ir.rewrite import Rewrite
from pruna_ir.verify import verify
from tests.networks import aten, conv_net


def rewriting(program, scope=()):
    return Rewrite(program, "test", Context(), scope)


def test_an_inserted_call_has_its_shape_and_provenance():
    rw = rewriting(conv_net())
    (linear,) = rw.calls(aten.linear.default)
    node = rw.insert(aten.relu.default, before=linear, like=linear, self=linear.args[0])
    assert shape_of(node)[1:] == (8,)
    assert module_path(node) == "head"
    assert source_line(node) == source_line(linear)


def test_an_argument_of_a_wrong_name_is_refused():
    rw = rewriting(conv_net())
    (linear,) = rw.calls(aten.linear.default)
    with pytest.raises(InvalidIRError, match=r"aten.relu.default has no argument named x"):
        rw.insert(aten.relu.default, before=linear, like=linear, x=linear.args[0])


def test_an_operand_of_a_wrong_shape_is_refused_with_node_and_source():
    rw = rewriting(conv_net())
    conv = next(rw.calls(aten.conv2d.default))
    (linear,) = rw.calls(aten.linear.default)
    with pytest.raises(InvalidIRError, match=r"(?s)aten.linear.default.*tests/networks.py"):
        rw.insert(aten.linear.default, before=linear, like=linear, input=conv,
                  weight=linear.args[1])  # fmt: skip


def test_shapes_downstream_follow_a_changed_parameter():
    rw = rewriting(conv_net())
    rw.set_tensor("head.weight", torch.zeros(7, 8))
    rw.set_tensor("head.bias", torch.zeros(7))
    rw.refresh()
    (linear,) = rw.calls(aten.linear.default)
    assert shape_of(linear)[1:] == (7,)
    assert isinstance(rw.program.tensor("head.weight"), nn.Parameter)


def test_a_tied_weight_is_changed_for_one_reader_only():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    program = capture(Tied(), (torch.randn(2, 4),))
    rw = rewriting(program)
    first, second = rw.calls(aten.linear.default)
    weight = rw.call(second).producer("weight")
    rw.update(second, weight=rw.derive(weight, torch.zeros(4, 4), second))
    after = rw.finish()
    verify(after)
    assert set(after.tensors()) == {"layer.weight", "layer.weight_1", "layer.bias"}
    assert torch.equal(after.tensor("layer.weight"), program.tensor("layer.weight"))
    assert not after.tensor("layer.weight_1").any()
    assert first.args[1] is not second.args[1]


def test_scopes_confine_a_pass_to_matching_submodules():
    program = conv_net()
    inside = list(rewriting(program, ("block*",)).calls(aten.conv2d.default))
    assert [module_path(node) for node in inside] == ["block.0"]
    assert len(list(rewriting(program).calls(aten.conv2d.default))) == 2
    assert not list(rewriting(program, ("block", "stem")).calls(aten.conv2d.default))


def test_a_near_miss_names_node_reason_and_source():
    rw = rewriting(conv_net())
    (linear,) = rw.calls(aten.linear.default)
    rw.skip(linear, "no reason")
    assert str(rw.remarks[0]).startswith("test: missed: linear (tests/networks.py:")
    assert str(rw.remarks[0]).endswith("): no reason")


def test_an_error_shows_the_ir_line_and_the_source():
    rw = rewriting(conv_net())
    (linear,) = rw.calls(aten.linear.default)
    text = str(rw.error(linear, "the head is too wide"))
    assert text.startswith("test: the head is too wide\n  %linear = aten.linear(%mean")
    assert "model source: tests/networks.py:" in text


def test_inlining_replaces_a_call_by_what_a_function_calls():
    program = conv_net()
    rw = rewriting(program)
    (linear,) = rw.calls(aten.linear.default)

    def spelt_out(**arguments):
        product = aten.matmul.default(arguments["input"], aten.t.default(arguments["weight"]))
        return aten.add.Tensor(product, arguments["bias"])

    from pruna_ir.call import bind_arguments

    rw.inline(linear, spelt_out, bind_arguments(linear))
    after = rw.finish()
    verify(after)
    assert "aten.linear" not in print_program(after)
    x = torch.randn(3, 3, 9, 9)
    assert torch.allclose(after(x)[0], program(x)[0], atol=1e-5)


def test_dead_nodes_and_their_tensors_vanish():
    rw = rewriting(conv_net())
    (linear,) = rw.calls(aten.linear.default)
    rw.update(linear, bias=None)
    assert "head.bias" not in rw.finish().tensors()

"""The verifier: every rule has a program that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pruna_ir.errors import InvalidIRError
from pruna_ir.verify import verify
from tests.networks import aten, conv_net


def broken(edit):
    program = conv_net().fork()
    edit(program)
    return program


def find(program, target):
    return next(program.calls(target))


def test_a_captured_program_is_valid():
    verify(conv_net())


def test_a_use_before_its_definition():
    program = broken(lambda p: find(p, aten.linear.default).append(find(p, aten.mean.dim)))
    with pytest.raises(InvalidIRError, match="not well formed"):
        verify(program)


def test_a_function_that_is_no_operator():
    def edit(program):
        node = find(program, aten.relu.default)
        node.target = torch.nn.functional.relu

    with pytest.raises(InvalidIRError, match="is not an operator of the IR"):
        verify(broken(edit))


def test_a_shape_that_is_not_what_the_node_computes():
    def edit(program):
        node = find(program, aten.relu.default)
        node.meta["val"] = find(program, aten.linear.default).meta["val"]

    with pytest.raises(InvalidIRError, match=r"relu claims to be float32\[.*but computes"):
        verify(broken(edit))


def test_a_node_without_a_shape():
    def edit(program):
        del find(program, aten.relu.default).meta["val"]

    with pytest.raises(InvalidIRError, match="has no meta"):
        verify(broken(edit))


def test_an_operand_that_the_operator_refuses():
    def edit(program):
        node = find(program, aten.linear.default)
        node.args = (find(program, aten.conv2d.default), *node.args[1:])

    with pytest.raises(InvalidIRError, match=r"does not accept its operands"):
        verify(broken(edit))


def test_an_output_that_differs_from_its_spec():
    program = conv_net()
    spec = replace(program.outputs[0], shape=("batch", 6))
    with pytest.raises(InvalidIRError, match=r"output output: float32\[batch, 6\] is computed as"):
        verify(replace(program, outputs=(spec,)))


def test_a_missing_output_spec():
    with pytest.raises(InvalidIRError, match="1 results, but 0 output specs"):
        verify(replace(conv_net(), outputs=()))


def test_a_parameter_with_nan():
    program = conv_net()
    bad = program.tensor("head.bias").detach().clone()
    bad[0] = torch.nan
    program.module.head.bias = torch.nn.Parameter(bad)
    with pytest.raises(InvalidIRError, match="head.bias holds NaN"):
        verify(program)

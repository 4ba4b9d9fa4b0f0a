"""Programs are values: forks share tensors, hashes see content, inputs are checked."""

from __future__ import annotations

import pytest
import torch

from pruna_ir.errors import UsageError
from pruna_ir.program import module_path, source_line, tensor_digest
from pruna_ir.transform import apply
from tests.networks import ConvNet, ScaleHead, conv_net, seeded


def test_a_fork_has_its_own_nodes_and_the_same_tensors():
    program = conv_net()
    fork = program.fork()
    assert set(fork.graph.nodes).isdisjoint(program.graph.nodes)
    assert all(fork.tensor(name) is program.tensor(name) for name in program.tensors())


def test_a_pass_leaves_its_input_as_it_was():
    program = conv_net()
    x = torch.randn(3, 3, 9, 9)
    before, weight, digest = program(x)[0], program.tensor("head.weight").clone(), program.hash()
    result = apply(ScaleHead(factor=2.0), program)
    assert result.modified
    assert not torch.equal(result.program(x)[0], before)
    assert torch.equal(program(x)[0], before)
    assert torch.equal(program.tensor("head.weight"), weight)
    assert program.hash() == digest


def test_the_hash_is_of_structure_and_content_not_of_names():
    program = conv_net()
    renamed = program.fork()
    for number, node in enumerate(renamed.calls()):
        node.name = f"n{number}"
    assert renamed.hash() == program.hash() == conv_net().hash()
    assert apply(ScaleHead(factor=1.5), program).program.hash() != program.hash()


def test_a_digest_follows_a_write():
    tensor = torch.zeros(3)
    before = tensor_digest(tensor)
    tensor[0] = 1
    assert tensor_digest(tensor) != before
    assert tensor_digest(torch.zeros(3)) == before
    assert tensor_digest(torch.zeros(3, 1)) != before
    assert tensor_digest(torch.zeros(3, dtype=torch.int32)) != before


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_runs_at_any_batch(batch):
    module, x = seeded(ConvNet), torch.randn(batch, 3, 9, 9)
    assert torch.equal(conv_net()(x)[0], module(x))


def test_inputs_by_name():
    program, x = conv_net(), torch.randn(2, 3, 9, 9)
    assert torch.equal(program(x=x)[0], program(x)[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "0 inputs were given, but the program takes 1"),
        ((torch.zeros(2, 3, 9, 8),), "dimension 3 must be 9"),
        ((torch.zeros(2, 3, 9),), "input x is float32[2, 3, 9]"),
        ((torch.zeros(2, 3, 9, 9, dtype=torch.float64),), "input x is float64[2, 3, 9, 9]"),
        ((torch.zeros(0, 3, 9, 9),), "dimension batch is 0, outside"),
    ],
)
def test_a_wrong_input_is_named(inputs, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[").replace("]", r"\]")):
        conv_net()(*inputs)


def test_an_unknown_input_is_named():
    with pytest.raises(UsageError, match="unknown input 'y'; the inputs are x"):
        conv_net()(y=torch.zeros(2, 3, 9, 9))


def test_every_node_knows_where_it_comes_from():
    program = conv_net()
    (linear,) = program.calls(torch.ops.aten.linear.default)
    assert module_path(linear) == "head"
    assert source_line(linear).startswith("tests/networks.py:")
    conv = next(program.calls(torch.ops.aten.conv2d.default))
    assert module_path(conv) == "stem"

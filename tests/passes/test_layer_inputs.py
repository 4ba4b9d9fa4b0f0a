"""The frontier: every batch at one node, one run in all, edits ahead of it are seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.passes.layer_inputs import Frontier, batches_of, observed
from tests.networks import conv_net
from tests.quantised import quantised_net


def test_it_yields_what_the_program_computes():
    program = conv_net()
    batches = batches_of(program, TensorData((torch.randn(7, 3, 9, 9),), batch_size=3))
    frontier = Frontier(program, batches)
    *_, last = program.calls()
    frontier.pass_by(last)
    for inputs, value in zip(batches, frontier.values(last), strict=True):
        with torch.no_grad():
            assert torch.equal(value, program(*inputs)[0])
            assert torch.equal(observed(program, inputs, [last])[last], value)


def test_nothing_runs_twice_and_dead_values_are_freed():
    program = conv_net()
    frontier = Frontier(program, batches_of(program, TensorData((torch.randn(2, 3, 9, 9),))))
    runs = []
    evaluate = frontier.evaluate
    frontier.evaluate = lambda node, *rest: (runs.append(node), evaluate(node, *rest))[1]
    nodes = list(program.calls())
    for node in nodes:
        frontier.reach(node)
        assert all(set(n.users) & set(nodes[nodes.index(node) :]) for n in frontier._env)
    assert runs == nodes[:-1]


def test_a_tensor_is_read_when_its_reader_runs():
    program = capture(nn.Linear(2, 2), (torch.zeros(2, 2),)).fork()
    frontier = Frontier(program, [(torch.ones(1, 2),)])
    (node,) = program.calls()
    frontier.reach(node)
    program.module.register_parameter("bias", nn.Parameter(torch.tensor([7.0, 9.0])))
    program.module.register_parameter("weight", nn.Parameter(torch.zeros(2, 2)))
    assert frontier.evaluate(node, 0).tolist() == [[7.0, 9.0]]


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="dimension 1 must be 3"):
        batches_of(conv_net(), TensorData((torch.randn(2, 4, 9, 9),)))


def test_a_quantised_weight_runs_once_for_all_batches_and_again_on_request():
    program = quantised_net().fork()
    batches = batches_of(program, TensorData((torch.randn(6, 3, 9, 9),), batch_size=2))
    frontier = Frontier(program, batches)
    conv = next(program.calls(torch.ops.aten.conv2d.default))
    frontier.reach(conv)
    fake = conv.args[1]
    before = frontier.values(fake)
    assert all(value is before[0] for value in before)
    program.module.first.weight = nn.Parameter(torch.zeros(8, 3, 3, 3))
    assert frontier.values(fake)[0].any()
    frontier.again(fake)
    assert not frontier.values(fake)[0].any()

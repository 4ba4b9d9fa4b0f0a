"""The proof against the truth: where it holds, a row does not change with its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.program import Program
from pruna_ir.row_independence import rows_are_independent


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = forward
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(6)
        self.table = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def captured(forward, *, train: bool = False) -> Program:
    module = Net(forward)
    module.train(train)
    return capture(module, (torch.randn(3, 4, 6, 6),), dynamic_batch=True)


def claimed(program: Program) -> bool:
    return rows_are_independent(program, set(program.graph.nodes))


INDEPENDENT = {
    "convolution": lambda m, x: torch.relu(m.conv(x)) + x,
    "norm": lambda m, x: m.norm(x),
    "linear": lambda m, x: m.layer_norm(m.linear(x)),
    "table": lambda m, x: x * m.table + m.table[:1],
    "pools": lambda _, x: nn.functional.adaptive_avg_pool2d(nn.functional.max_pool2d(x, 2), 1),
    "flatten": lambda _, x: x.flatten(1).flatten(-1),
    "softmax": lambda _, x: torch.softmax(x, -1).mean((2, 3)),
    "channels": lambda _, x: torch.cat([x, x.sigmoid()], 1),
}

DEPENDENT = {
    "mean over the batch": lambda _, x: x - x.mean(0, keepdim=True),
    "mean over all": lambda _, x: x - x.mean(),
    "softmax over the batch": lambda _, x: torch.softmax(x, 0),
    "order": lambda _, x: x.flip(0) + x,
    "running sum": lambda _, x: x.cumsum(0),
    "rows against rows": lambda _, x: x.flatten(1) @ x.flatten(1).T @ x.flatten(1),
    "last rank": lambda _, x: x[..., 0, 0, 0] + x.mean((1, 2, 3))[:, None],
    "batch as width": lambda _, x: x.transpose(0, 1).relu().transpose(0, 1),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_holds(name: str) -> None:
    program = captured(INDEPENDENT[name])
    assert claimed(program)
    x = torch.randn(5, 4, 6, 6)
    (whole,) = program(x)
    for rows in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(program(x[rows])[0], whole[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DEPENDENT)
def test_is_not_claimed(name: str) -> None:
    assert not claimed(captured(DEPENDENT[name]))


def test_only_the_nodes_in_question_count() -> None:
    program = captured(lambda m, x: (m.conv(x).relu(), x.cumsum(0)))
    assert not claimed(program)
    (node,) = program.calls(torch.ops.aten.conv2d.default)
    assert rows_are_independent(program, {node, *node.all_input_nodes})


def test_a_constant_may_have_no_rows() -> None:
    """A table whose first dimension happens to be a batch's size is not one row for each."""
    module = Net(lambda m, x: x * m.table)
    module.table = nn.Parameter(torch.randn(3, 4, 6, 6))
    program = capture(module, (torch.randn(3, 4, 6, 6),), dynamic_batch=False)
    assert not claimed(program)


def test_fixed_batches_and_unequal_inputs_are_not_split() -> None:
    fixed = capture(Net(lambda m, x: m.conv(x)), (torch.randn(3, 4, 6, 6),), dynamic_batch=False)
    assert not claimed(fixed)


def test_training_batch_norms_look_at_all_rows() -> None:
    class Train(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.batch_norm(x, None, None, training=True)

    program = capture(Train(), (torch.randn(3, 4, 6, 6),), dynamic_batch=True)
    assert not claimed(program)

"""Consumers: which contractions are found, and whose channels they read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.consumers import consumers, readings
from pruna_ir.passes.scored_members import Candidates
from pruna_ir.transform import Context, apply
from tests.passes.scored_networks import shared


class Product(nn.Module):
    """A linear layer whose 6 channels something multiplies."""

    def __init__(self, read, shape):
        super().__init__()
        self.fc = nn.Linear(3, 6)
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[-1]))
        self.read = read

    def forward(self, x):
        return self.read(self, self.fc(x))


def convolved(layer):
    def read(module, y):
        return layer(y[:, :, None].expand(-1, -1, 5), module.weight)

    return read


READS = {
    "linear": (lambda m, y: F.linear(y, m.weight), (4, 6), 1, (4, 6)),
    "matmul": (lambda m, y: y @ m.weight, (6, 4), 1, (4, 6)),
    "addmm": (lambda m, y: torch.addmm(m.bias, y, m.weight), (6, 4), 1, (4, 6)),
    "from the left": (lambda m, y: m.weight @ y.T, (4, 6), 1, (4, 6)),
    "conv1d": (convolved(F.conv1d), (4, 6, 3), 1, (12, 6)),
    "grouped": (convolved(lambda y, w: F.conv1d(y, w, groups=2)), (4, 3, 3), 1, (6, 6)),
    "transposed": (convolved(F.conv_transpose1d), (6, 4, 3), 1, (12, 6)),
    "transposed groups": (
        convolved(lambda y, w: F.conv_transpose1d(y, w, groups=2)), (6, 2, 3), 1, (6, 6),
    ),
    "depthwise": (convolved(lambda y, w: F.conv1d(y, w, groups=6)), (6, 1, 3), 0, None),
    "computed": (lambda m, y: F.linear(y, m.weight / m.weight.norm()), (4, 6), 1, (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_contractions_with_a_constant_are_consumers(name):
    read, shape, count, sizes = READS[name]
    torch.manual_seed(0)
    module = Product(read, shape)
    program = apply(Canonicalize(), capture(module, (torch.randn(2, 3),))).program
    found = [c for c in consumers(program) if c.source.name != "x"]
    assert len(found) == count
    for consumer in found:
        columns = consumer.columns(program)
        assert tuple(columns.T.shape) == sizes


@pytest.mark.parametrize("name", [name for name, case in READS.items() if case[2]])
def test_the_columns_of_a_channel_are_what_it_is_multiplied_by(name):
    """The response to a unit of channel c, at a place where all taps of a convolution meet it."""
    read, shape, _, _ = READS[name]
    torch.manual_seed(0)
    module = Product(read, shape).double()
    program = capture(module, (torch.randn(2, 3).double(),))
    (consumer,) = [c for c in consumers(program) if c.source.name != "x"]
    columns = consumer.columns(program)
    taps = shape[2] if len(shape) == 3 else 1
    for c in range(6):
        one = torch.eye(6).double()[c : c + 1]
        response = read(module, one) - read(module, torch.zeros_like(one))
        middle = response[..., response.shape[-1] // 2] if taps > 1 else response
        expected = columns[c].reshape(-1, taps).sum(1)
        found = middle.flatten()[middle.flatten() != 0]
        torch.testing.assert_close(found.sort().values, expected.sort().values)


def test_a_unit_reads_all_columns_of_its_flattened_channel():
    scored = shared("images")
    found = readings(scored.candidates())
    group = next(k for k, g in enumerate(scored.groups) if len(g.units) == 5)
    (reading,) = found[group]
    assert reading.table.tolist() == [[4 * c + k for k in range(4)] for c in range(5)]
    assert reading.per_unit(np.arange(20.0)).tolist() == [6.0, 22.0, 38.0, 54.0, 70.0]


def test_a_key_value_head_reads_the_columns_of_its_query_heads():
    scored = shared("language")
    found = readings(scored.candidates())
    group = next(k for k, g in enumerate(scored.groups) if len(g.units) == 2)
    (reading,) = found[group]
    assert reading.table.tolist() == [list(range(6)), list(range(6, 12))]


def test_residual_width_is_read_by_every_layer_and_the_tied_head():
    scored = shared("language")
    found = readings(scored.candidates())
    group = next(k for k, g in enumerate(scored.groups) if len(g.units) == 12)
    weights = [str(reading.consumer.weight.target) for reading in found[group]]
    assert len(weights) == 6
    assert {"q.weight", "k.weight", "v.weight", "gate.weight", "up.weight"} < set(weights)


def test_groups_that_are_not_asked_for_are_not_read():
    scored = shared("language")
    some = Candidates(scored.program, scored.coupling, scored.groups[1:2], Context())
    every = readings(scored.candidates())
    assert [r.table.tolist() for r in readings(some)[0]] == [r.table.tolist() for r in every[1]]


def test_products_of_two_activations_are_no_consumers():
    class Attention(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2)

    program = capture(Attention(), (torch.randn(2, 3, 4),))
    assert consumers(program) == []
    assert not couple(program).groups

"""Insertion: what stays float between layers that stay float; the noise budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.errors import UsageError
from pruna_ir.passes.quant_insertion import Insertion, near, noise_budget
from pruna_ir.passes.quant_placement import KINDS, is_quantised
from pruna_ir.program import Program
from tests.passes.test_insert_fake_quant import Net, captured, data, quantised

aten = torch.ops.aten


def reads_fake_quants(program: Program, *targets: object) -> list[bool]:
    return [any(map(is_quantised, node.all_input_nodes)) for node in program.calls(*targets)]


@pytest.mark.parametrize(
    ("bits", "add", "pool"),
    [
        ((), True, True),
        (("stem:float", "block.conv1:float", "block.conv2:float"), False, True),
        (("stem:float", "block.conv1:float", "head:float"), True, True),
        (("block.conv1:float", "block.conv2:float", "head:float"), True, True),
        (("stem:float", "block.conv2:float", "head:float"), False, False),
    ],
)
def test_adds_and_pools_are_quantised_next_to_a_quantised_layer_only(
    bits: tuple[str, ...], add: bool, pool: bool
) -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15), bits=bits).program
    # ONNX Runtime wants the result of a quantised add quantised too, and the pool reads it.
    assert reads_fake_quants(program, aten.add.Tensor) == [add]
    assert reads_fake_quants(program, aten.adaptive_avg_pool2d.default) == [pool]


class Shifted(nn.Module):
    """Between the layers and the residual add stand adds of a number and of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(x) + self.shift)
        return x + (self.two(x) + 1.0) * 2.0


def test_layers_are_near_through_adds_of_constants() -> None:
    program = captured(Shifted(), 4, 5, 5)
    *_, residual = program.calls(aten.add.Tensor)
    assert near(residual) == set(program.calls(*KINDS))


def test_a_layer_quantised_before_on_another_scope_counts() -> None:
    source = data(4, 5, 5)
    first = quantised(captured(Shifted(), 4, 5, 5), source, bits=("float", "one:w8a8")).program
    again = quantised(first, source, exclude=("one", "two")).program
    assert reads_fake_quants(again, aten.add.Tensor)[-1]
    float_program = quantised(captured(Shifted(), 4, 5, 5), source, exclude=("one", "two")).program
    assert not any(reads_fake_quants(float_program, aten.add.Tensor))


def test_each_bit_less_may_cost_6_db() -> None:
    assert noise_budget(8) == 20.0
    assert noise_budget(4) == pytest.approx(20.0 - 4 * 6.02)


def test_messages_name_the_owner() -> None:
    with pytest.raises(UsageError, match="my-pass: percentile must be above 50"):
        Insertion("my-pass", percentile=1.0)

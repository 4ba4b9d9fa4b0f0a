"""Costs of widths: bytes as the program's own cost counts them, bit operations, measured times."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.pareto import bits_option
from pruna_ir.passes.bit_costs import Costs, Priced, costs_of, inserted_cost
from pruna_ir.passes.bit_sensitivity import layer_groups, without_fake_quants
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Program
from pruna_ir.transform import apply
from tests.passes.test_bit_sensitivity import chain, quantised, samples
from tests.passes.test_insert_fake_quant import Net, captured, data

WIDTHS = ("w8a8", "w4a8", "w3a4")


def priced(program: Program, source: TensorData, target: str = "onnx") -> Priced:
    programs = {width: quantised(program, source, width, target=target) for width in WIDTHS}
    base = without_fake_quants(programs["w8a8"])
    return Priced(base, layer_groups(base, list(programs.values())), {**programs, "float": base})


CHAIN, SOURCE = chain(), samples(7)
PRICED = priced(CHAIN, SOURCE)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from([*WIDTHS, "float"]), min_size=3, max_size=3))
def test_sizes_add_up_to_what_the_quantised_program_stores(widths: list[str]) -> None:
    costs = costs_of("size", PRICED, "onnx", 0)
    bits = bits_option(dict(zip("abc", widths, strict=True)))
    program = quantised(CHAIN, SOURCE, *bits)
    found = costs.fixed + sum(row[w] for row, w in zip(costs.table, widths, strict=True))
    assert found == cost(program).bytes
    assert inserted_cost("size", program, PRICED.base, costs, 0.0, "onnx", 0) == found
    assert costs.reference == cost(CHAIN).bytes


def test_sizes_of_a_convolutional_net_leave_out_the_grids_of_adds_alone() -> None:
    program, source = captured(Net(), 3, 15, 15), data(3, 15, 15)
    found = priced(program, source)
    costs = costs_of("size", found, "onnx", 0)
    for width in WIDTHS:
        missing = cost(found.programs[width]).bytes - costs.fixed - sum(
            row[width] for row in costs.table
        )  # fmt: skip
        assert missing in (8, 16, 24)


class Tied(nn.Module):
    """A head that is the embedding's table, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight, self.other.weight = self.table.weight, self.one.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(self.table(tokens)))
        return self.head(torch.relu(self.other(x)))


def test_a_shared_weight_counts_once_and_one_that_stays_float_for_others_counts_fully() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (40, 5))
    program = apply_canonical(capture(Tied().eval(), (tokens[:2],)))
    found = priced(program, TensorData((tokens,), batch_size=16))
    costs = costs_of("size", found, "onnx", 0)
    by_name = {group.names[0]: row for group, row in zip(found.groups, costs.table, strict=True)}
    assert by_name["one"]["float"] == 6 * 6 * 4
    assert by_name["head"]["float"] == 0
    assert by_name["head"]["w4a8"] == 8 * 11 + 8  # scales of 11 channels and of the input
    for width in WIDTHS:
        total = costs.fixed + sum(row[width] for row in costs.table)
        assert total == cost(found.programs[width]).bytes


def apply_canonical(program: Program) -> Program:
    return apply(Canonicalize(), program).program


def test_bit_operations_are_products_of_bits() -> None:
    costs = costs_of("operations", PRICED, "onnx", 0)
    macs = [7 * 9, 9 * 9, 9 * 5]
    for row, count in zip(costs.table, macs, strict=True):
        assert row == {"w8a8": 64 * count, "w4a8": 32 * count, "w3a4": 12 * count,
                       "float": 1024 * count}  # fmt: skip
    assert costs.fixed == 0
    assert costs.reference == 1024 * sum(macs)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_latency_is_each_layers_own_time_on_the_target() -> None:
    torch.manual_seed(0)
    program = apply_canonical(capture(Wide().eval(), (torch.randn(2, 3, 18, 18),)))
    found = priced(program, samples(3, 18, 18), "openvino")
    costs = costs_of("latency", found, "openvino", 0)
    assert costs.unit == "ms"
    for row in costs.table:
        assert row.keys() == {*WIDTHS, "float"}
        assert min(row.values()) > 0
    layers = sum(row["float"] for row in costs.table)
    assert costs.reference >= layers * (1 - 1e-9)  # sums of the same times, in two orders
    whole = inserted_cost("latency", found.base, found.base, costs, 0.0, "openvino", 0)
    assert 0 < whole < float("inf")


def test_a_whole_programs_latency_is_given_in_the_float_programs_milliseconds() -> None:
    """The clock has slowed down threefold since the layers were timed."""

    def profiler(programs, target, folder, seed):
        assert {width: p is PRICED.base for width, p in programs.items()} == {
            "float": True, "mixed": False,
        }  # fmt: skip
        return {"float": {"a": 3.0, "b": 6.0}, "mixed": {"a": 1.5, "other": 0.75}}

    costs = Costs("ms", (), 0.0, reference=3.0)
    program = PRICED.programs["w8a8"]
    whole = inserted_cost("latency", program, PRICED.base, costs, 0.0, "onnx", 0, profiler)
    assert whole == 0.75


def test_a_target_without_a_profiler_is_refused() -> None:
    with pytest.raises(UsageError, match="'tvm' has no profiler of layers here"):
        costs_of("latency", PRICED, "tvm", 0)


def test_the_sums_notice_another_width() -> None:
    costs = costs_of("size", PRICED, "onnx", 0)
    row = random.Random(0).choice(costs.table)
    assert row["w3a4"] < row["w4a8"] < row["w8a8"] < row["float"]

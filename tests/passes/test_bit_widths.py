"""Widths per layer: the option's grammar, which rule wins, and what the program then holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.build import build
from pruna_ir.call import Call
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.errors import UsageError
from pruna_ir.lowering import Verdict
from pruna_ir.options import make_pass
from pruna_ir.passes.bit_widths import Width, WidthRules, end_layers, parse_rules, parse_width
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.quant_placement import KINDS, is_quantised, layers_of
from pruna_ir.program import Program
from pruna_ir.quantization import describe
from pruna_ir.spec import parse_pipeline, print_pass
from pruna_ir.transform import Context, apply
from pruna_ir.verify import verify
from tests.passes.test_insert_fake_quant import Net, captured, data, fake, quantised

aten = torch.ops.aten
widths = st.builds(Width, st.integers(2, 8), st.integers(2, 8)).map(str) | st.just("float")
globs = st.from_regex(r"[a-z*][a-z0-9_.*:]{0,9}", fullmatch=True)
entries = st.one_of(widths, st.tuples(globs, widths).map(":".join))


@cache
def net() -> Program:
    """The captured `Net`."""
    return captured(Net(), 3, 15, 15)


def bits_of(program: Program) -> dict[str, str]:
    """The width of each quantised layer, read off the program."""
    found: dict[str, dict[str, int]] = {}
    for row in describe(program):
        if row.operator in ("aten.conv2d", "aten.linear"):
            kind = "w" if row.operand == "weight" else "a"
            found.setdefault(row.node, {})[kind] = row.bits
    return {node: f"w{bits['w']}a{bits['a']}" for node, bits in found.items()}


# -- the option ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(entries, max_size=4), st.just("") | widths)
def test_widths_round_trip_through_pipeline_text(bits: list[str], ends: str) -> None:
    pass_ = InsertFakeQuant(bits=tuple(bits), ends=ends)
    (spec,) = parse_pipeline(print_pass(pass_))
    assert make_pass(spec) == pass_


@given(st.tuples(globs, widths))
def test_an_entry_is_a_glob_and_a_width(entry: tuple[str, str]) -> None:
    (rule,) = parse_rules([":".join(entry)], "bits")
    assert (rule.glob, rule.width) == (entry[0], parse_width(entry[1], "bits"))


def test_a_single_width_needs_no_list() -> None:
    (spec,) = parse_pipeline("insert-fake-quant{bits=w4a8}")
    assert make_pass(spec) == InsertFakeQuant(bits=("w4a8",))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("w4", "'w4' is no width; write w<bits>a<bits>, such as w4a8, or float"),
        ("head:int8", "'int8' is no width"),
        (":w4a4", "names no layer before the colon"),
        ("w1a8", r"'w1a8' asks for 1-bit weights; integer grids have 2 to 8 bits"),
        ("head:w8a16", r"'w8a16' asks for 16-bit activations"),
        ("", "'' is no width"),
    ],
)
def test_malformed_entries_are_refused_when_the_pass_is_made(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InsertFakeQuant(bits=(entry,))


def test_an_unknown_layer_is_refused_before_any_work() -> None:
    program = net()
    pass_ = InsertFakeQuant(target="onnx", bits=("block.conv3:w4a4",))
    with pytest.raises(UsageError, match=r"bits: unknown layer 'block\.conv3'; did you mean 'bl"):
        apply(pass_, program, Context(data=data(3, 15, 15)))
    with pytest.raises(UsageError, match=r"unknown layer 'aten\.adddmm'"):
        apply(InsertFakeQuant(target="onnx", exclude=("aten.adddmm",)), program)


# -- which rule wins -----------------------------------------------------------------------------


def rule_names(bits: list[str], ends: str = "") -> list[str]:
    program = net()
    layers = layers_of(program)
    rules = WidthRules.parse(bits, ends)
    marked = end_layers(layers) if ends else set()
    return [str(rules.rule_for(node, marked)) for node in layers]


def test_later_entries_win_and_globs_cover_what_is_inside() -> None:
    assert rule_names(["w4a8"]) == ["w4a8"] * 4
    assert rule_names(["block:w4a4", "block.conv1:w8a8"]) == [
        "None", "block.conv1:w8a8", "block:w4a4", "None",
    ]  # fmt: skip
    assert rule_names(["block.conv1:w8a8", "block:w4a4"])[1:3] == ["block:w4a4"] * 2
    assert rule_names(["w4a4", "w2a2"]) == ["w2a2"] * 4


def test_globs_name_operators_too() -> None:
    assert rule_names(["w4a4", "aten.linear:float"])[-1] == "aten.linear:float"
    assert rule_names(["aten.conv*:w4a4"]) == ["aten.conv*:w4a4"] * 3 + ["None"]


def test_the_ends_win_over_widths_for_all_and_lose_to_globs() -> None:
    assert rule_names(["w4a4"], ends="w8a8") == ["w8a8", "w4a4", "w4a4", "w8a8"]
    assert rule_names(["head:float"], ends="w8a8")[-1] == "head:float"


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.middle = (nn.Linear(4, 4) for _ in range(3))
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.middle(torch.relu(self.left(x) + self.right(y)))
        return self.one(z), self.two(z)


def test_ends_are_found_by_data_flow() -> None:
    program = capture(TwoHeads().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    layers = layers_of(program)
    found = end_layers(layers)
    assert [node in found for node in layers] == [True, True, False, True, True]
    assert end_layers([]) == set()


# -- the program ---------------------------------------------------------------------------------


def test_layers_get_their_bits_and_remarks_say_so() -> None:
    result = quantised(
        net(), data(3, 15, 15), bits=("w4a4", "block.conv2:w3a5"), ends="w8a8"
    )
    wanted = ["w8a8", "w4a4", "w3a5", "w8a8"]
    assert list(bits_of(result.program).values()) == wanted
    applied = [r.message.split(": ")[1] for r in result.remarks if r.kind == "applied"]
    assert applied == [f"{width} for onnx" for width in wanted]


def test_a_tensor_is_quantised_once_for_each_width_of_its_readers() -> None:
    program = quantised(net(), data(3, 15, 15), bits=("block:w4a4",)).program
    (pool,) = program.calls(aten.max_pool2d.default)
    grids = {Call(program, user).number("qmax") for user in pool.users}
    # The block's first convolution reads 4 bits; the residual add keeps the target's 8.
    assert grids == {15, 255}
    (add,) = program.calls(aten.add.Tensor)
    assert {Call(program, source).number("qmax") for source in add.all_input_nodes} == {255}


def test_a_float_layer_has_no_fake_quant_and_a_remark() -> None:
    result = quantised(net(), data(3, 15, 15), bits=("w4a8", "head:float"))
    (linear,) = result.program.calls(aten.linear.default)
    assert not any(is_quantised(source) for source in linear.all_input_nodes)
    assert [r.message for r in result.remarks if r.kind == "missed"] == [
        "kept float by 'head:float'"
    ]


def test_layers_are_excluded_by_operator() -> None:
    result = quantised(net(), data(3, 15, 15), exclude=("aten.conv*",))
    weights = [row.operator for row in describe(result.program) if row.operand == "weight"]
    assert weights == ["aten.linear"]


@pytest.mark.parametrize("target", ["onnx", "openvino", "tensorrt", "tvm"])
@pytest.mark.parametrize("bits", ["w2a2", "w3a7", "w4a4"])
def test_every_scheme_takes_narrow_grids(target: str, bits: str) -> None:
    program = net()
    context = Context(data=data(3, 15, 15), target=target)
    pass_ = InsertFakeQuant(bits=(bits,), weights="mse")
    result = apply(pass_, program, context)
    verify(result.program)
    assert set(bits_of(result.program).values()) == {bits}
    pools = list(result.program.calls(aten.max_pool2d.default))
    assert all(is_quantised(source) for pool in pools for source in pool.all_input_nodes)
    report = check(pass_, program, result.program, context=context, assurances=result.assurances)
    assert report.passed, report
    assert not apply(pass_, result.program, context).modified


def test_the_budget_falls_by_six_db_for_each_missing_bit() -> None:
    assert InsertFakeQuant().min_sqnr_db == 20.0
    assert InsertFakeQuant(bits=("head:float",)).min_sqnr_db == 20.0
    narrow = InsertFakeQuant(bits=("w8a8", "head:w4a6"))
    assert narrow.min_sqnr_db == pytest.approx(20 - 4 * 6.02)
    assert InsertFakeQuant(bits=("w4a4",), sqnr_db=7.0).min_sqnr_db == 7.0


# -- weights and grids ---------------------------------------------------------------------------


def test_one_scale_for_each_weight() -> None:
    before = net()
    program = quantised(before, data(3, 15, 15), granularity="tensor").program
    for node in program.calls():
        if node.target in KINDS:
            call = fake(program, node, "weight")
            scale, weight = call.parameter("scale"), call.parameter("x")
            assert call.arg("axis") is None
            assert scale.shape == ()
            assert float(scale) == pytest.approx(float(weight.detach().abs().max()) / 127)


def test_activations_are_symmetric_where_asked_for() -> None:
    program = net()
    result = quantised(program, data(3, 15, 15), activations="symmetric", bits=("w8a4",))
    rows = [row for row in describe(result.program) if row.operand == "input"]
    assert {row.grid for row in rows} == {"s4[-8, 7]"}
    assert all(row.zero_point == (0, 0) for row in describe(result.program))
    same = quantised(program, data(3, 15, 15), activations="asymmetric").program
    assert same.hash() == quantised(program, data(3, 15, 15)).program.hash()


def test_tensorrt_takes_no_zero_points() -> None:
    with pytest.raises(UsageError, match=r"'tensorrt' takes zero points of 0 only; leave the opt"):
        quantised(
            net(), data(3, 15, 15), target="tensorrt",
            activations="asymmetric",
        )  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("bits", ["w4a4", "w4a8"])
def test_narrow_grids_are_lowered_right(target: str, bits: str, tmp_path: Path) -> None:
    """Both store integers of 8 bits: what lies beyond the narrow grid must be cut before."""
    context = Context(data=data(3, 15, 15), target=target)
    pass_ = InsertFakeQuant(bits=(bits,), weights="mse", ranges="percentile", percentile=99.0)
    program = apply(pass_, net(), context).program
    artifact = build(program, target, tmp_path / target, context)
    assert artifact.certificate.verdict is Verdict.PASSED, artifact.certificate.summary()

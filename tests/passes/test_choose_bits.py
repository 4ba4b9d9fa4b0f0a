"""choose-bits: who gets few bits, what is kept and saved, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.options import make_pass
from pruna_ir.pareto import BitSearch
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.choose_bits import ChooseBits
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.quantization import describe
from pruna_ir.spec import parse_pipeline, print_pass
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify
from tests.passes.test_bit_sensitivity import chain, quantised, samples

WIDTHS = ("w8a8", "w4a8", "w2a8", "float")


class Planted(nn.Module):
    """Three layers of one size; what ``faint`` adds to the output is a thousandth of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.faint, self.other = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 1e-3 * self.faint(x) + self.other(torch.tanh(x))


def planted() -> Program:
    torch.manual_seed(0)
    return apply(Canonicalize(), capture(Planted().eval(), (torch.randn(2, 12),))).program


def chosen(program: Program, source: TensorData, **options) -> PassResult:
    options = {"target": "onnx", "widths": WIDTHS} | options
    result = apply(ChooseBits(**options), program, Context(data=source))
    verify(result.program)
    return result


def weight_bits(program: Program) -> dict[str, int]:
    return {row.layer: row.bits for row in describe(program) if row.operand == "weight"}


def searched(tmp_path: Path, program: Program, source: TensorData, **options) -> BitSearch:
    file = tmp_path / "bits.json"
    chosen(program, source, save=str(file), **options)
    return BitSearch.from_json(file.read_text())


# -- the choice ----------------------------------------------------------------------------------


def test_an_insensitive_layer_gets_few_bits() -> None:
    result = chosen(planted(), samples(12), budget=0.345)
    assert weight_bits(result.program) == {"loud": 4, "faint": 2, "other": 4}
    assert cost(result.program).bytes <= 0.345 * cost(planted()).bytes


def test_by_default_a_quarter_of_the_size_is_kept() -> None:
    program = chain()
    result = chosen(program, samples(7), widths=("w8a8", "w2a8"), granularity="tensor")
    found = weight_bits(result.program)
    assert len(found) == 3
    assert cost(result.program).bytes <= 0.25 * cost(program).bytes < cost(program).bytes


def test_with_room_for_all_nothing_is_quantised() -> None:
    program = planted()
    result = chosen(program, samples(12), budget=1.0)
    assert result.program is program


def test_a_limit_takes_the_cheapest_program_that_keeps_it(tmp_path: Path) -> None:
    program, source = planted(), samples(12)
    costs = []
    for limit in (1e-5, 1e-3, 1e-1):
        found = searched(tmp_path, program, source, limit=limit)
        assert found.chosen.predicted <= limit
        costs.append(found.chosen.cost)
    assert costs[0] > costs[1] > costs[2]


def test_the_program_is_that_of_insert_fake_quant_with_the_saved_bits(tmp_path: Path) -> None:
    program, source = planted(), samples(12)
    file = tmp_path / "bits.json"
    result = chosen(program, source, budget=0.4, save=str(file))
    again = quantised(program, source, *BitSearch.from_json(file.read_text()).bits())
    assert result.program.hash() == again.hash()
    assert result.program.origin.program.hash() == program.hash()


def test_bit_operations_and_the_loss(tmp_path: Path) -> None:
    program, source = chain(), samples(7, labels=5)
    found = searched(tmp_path, program, source, budget=0.05, of="operations", measure="loss",
                     widths=("w8a8", "w4a4", "w2a2"))  # fmt: skip
    assert found.chosen.cost <= 0.05 * found.reference
    assert set(found.layers[0].lost) == {"noise", "loss"}
    assert found.inserted.keys() == {"noise", "loss"}


def test_a_scope_leaves_the_rest_float() -> None:
    program, source = planted(), samples(12)
    text = "submodule<faint>(choose-bits{budget=0.9, widths=[w8a8, w2a8], target=onnx})"
    found = Pipeline.parse(text).run(program, Context(data=source)).program
    assert weight_bits(found) == {"faint": 2} or weight_bits(found) == {"faint": 8}


def test_layers_that_are_excluded_stay_float() -> None:
    result = chosen(planted(), samples(12), budget=0.9, widths=("w8a8", "w4a8"), exclude=("loud",))
    assert set(weight_bits(result.program)) == {"faint", "other"}


# -- what is saved -------------------------------------------------------------------------------


def test_the_front_is_monotone_and_holds_the_choice(tmp_path: Path) -> None:
    found = searched(tmp_path, planted(), samples(12), budget=0.4, points=9)
    assert len(found.front) >= 5
    for a, b in pairwise(found.front):
        assert a.cost < b.cost
        assert a.predicted > b.predicted
    assert found.chosen in found.front
    assert [point.label for point in found.uniform] == list(WIDTHS)
    for point in found.uniform:
        within = [p for p in found.front if p.cost <= point.cost]
        assert min(p.predicted for p in found.front) <= point.predicted
        assert set(point.widths.values()) == {point.label}
        assert within or point.cost < found.front[0].cost


def test_predictions_are_near_what_is_measured(tmp_path: Path) -> None:
    found = searched(tmp_path, chain(), samples(7, rows=64), budget=0.45)
    for point in (*found.front, *found.uniform):
        if point.predicted < 0.02:
            assert point.measured == pytest.approx(point.predicted, rel=0.5)
    # Nothing but layers is quantised here, so the program as inserted is the point.
    assert found.inserted["noise"] == pytest.approx(found.chosen.measured, rel=1e-5)
    assert found.inserted_cost == found.chosen.cost


def test_the_picture_stands_beside_the_data(tmp_path: Path) -> None:
    found = searched(tmp_path, planted(), samples(12), budget=0.4)
    root = ET.fromstring((tmp_path / "bits.svg").read_text())
    marks = [g for g in root.iter("{http://www.w3.org/2000/svg}g") if g.get("class") == "front"]
    assert len(marks) == len(found.front)


def test_the_same_search_twice_gives_the_same_file(tmp_path: Path) -> None:
    first = searched(tmp_path, planted(), samples(12), budget=0.4)
    assert searched(tmp_path, planted(), samples(12), budget=0.4) == first


def test_the_pipeline_holds_it_to_a_noise_budget() -> None:
    program, source = planted(), samples(12)
    pass_ = ChooseBits(budget=0.4, widths=("w8a8", "w4a8"), target="onnx")
    context = Context(data=source)
    result = apply(pass_, program, context)
    report = check(pass_, program, result.program, None, context, result.exact, result.assurances)
    assert report.passed
    assert pass_.min_sqnr_db == pytest.approx(20 - 4 * 6.02)
    strict = ChooseBits(budget=0.4, widths=("w8a8", "w4a8"), target="onnx", sqnr_db=90.0)
    assert not check(
        strict, program, result.program, None, context, result.exact, result.assurances
    ).passed


def test_a_whole_program_above_its_budget_is_remarked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slack below 0 stands for a target on which costs do not add up."""
    monkeypatch.setattr("pruna_ir.passes.choose_bits.TOLERATED", -0.3)
    remarks = [r for r in chosen(planted(), samples(12), budget=0.4).remarks if r.kind == "missed"]
    assert any("costs do not add up" in remark.message for remark in remarks)
    monkeypatch.undo()
    remarks = [r for r in chosen(planted(), samples(12), budget=0.4).remarks if r.kind == "missed"]
    assert not any("costs do not add up" in remark.message for remark in remarks)


def test_progress_is_reported_to_the_end() -> None:
    seen: dict[str, tuple[int, int]] = {}
    context = Context(data=samples(12), progress=lambda w, d, t: seen.update({w: (d, t)}))
    apply(ChooseBits(budget=0.5, target="onnx"), planted(), context)
    assert seen["sensitivity to bits"] == (3, 3)


def test_options_round_trip_through_pipeline_text() -> None:
    pass_ = ChooseBits(limit=0.01, of="latency", measure="divergence", widths=("w8a8", "w2a4"),
                       save="out/bits.json", exclude=("head",))  # fmt: skip
    (spec,) = parse_pipeline(print_pass(pass_))
    assert make_pass(spec) == pass_


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "limit": 0.1}, "give either budget, a share of the float program's cost"),
        ({"budget": 0.0}, "budget must be above 0, not 0"),
        ({"limit": -1.0}, "limit must be at least 0, not -1"),
        ({"budget": 0.5, "points": 1}, "points must be at least 2, not 1"),
        ({"budget": 0.5, "save": "bits.txt"}, "save must name a .json file, not 'bits.txt'"),
        ({"budget": 0.5, "widths": ("w8a8",)}, "at least two different ones"),
        ({"budget": 0.5, "widths": ("w8a8", "w8a8")}, "at least two different ones"),
        ({"budget": 0.5, "widths": ("w8a8", "int4")}, "widths: 'int4' is no width"),
        ({"budget": 0.5, "widths": ("w8a8", "w1a8")}, "asks for 1-bit weights"),
        ({"budget": 0.5, "samples": 0}, "samples must be at least 1"),
    ],
)
def test_bad_options_are_refused_when_the_pass_is_made(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChooseBits(**options)


def test_a_budget_out_of_reach_says_what_can_be_reached() -> None:
    message = (
        r"budget=0.1 of the size cannot be kept: the widths reach from 3\d.\d% \(\d+ bytes\) to "
        r"100.0% \(1872 bytes\) of the float program's 1872; raise the budget"
    )
    with pytest.raises(UsageError, match=message):
        chosen(planted(), samples(12), budget=0.1)


def test_a_limit_out_of_reach_says_what_can_be_reached() -> None:
    with pytest.raises(UsageError, match="limit=1e-12 of the noise cannot be kept: the widths"):
        chosen(planted(), samples(12), limit=1e-12, widths=("w8a8", "w4a8"))


def test_a_loss_without_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="measure=loss needs labels, and the data has none"):
        chosen(planted(), samples(12), budget=0.5, measure="loss")


def test_there_must_be_data_a_target_and_layers() -> None:
    program = planted()
    with pytest.raises(UsageError, match="choose-bits calibrates activation ranges on data"):
        apply(ChooseBits(budget=0.5, target="onnx"), program)
    with pytest.raises(UsageError, match="choose-bits must know its target"):
        apply(ChooseBits(budget=0.5), program, Context(data=samples(12)))
    nothing = capture(nn.Tanh(), (torch.randn(2, 12),))
    with pytest.raises(UsageError, match="no layer here that could be quantised"):
        chosen(nothing, samples(12), budget=0.5)


def test_a_quantised_program_is_refused() -> None:
    program, source = planted(), samples(12)
    with pytest.raises(UsageError, match="starts from a float program"):
        chosen(quantised(program, source, "w8a8"), source, budget=0.5)


def test_it_is_registered_and_depends_on_the_target() -> None:
    (spec,) = parse_pipeline("choose-bits{budget=0.5}")
    assert make_pass(spec) == ChooseBits(budget=0.5)
    assert make_pass(spec).depends_on_target

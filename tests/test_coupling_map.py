"""The coupling map: what the table, the JSON document and the drawing say of a program."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.coupling import couple
from pruna_ir.coupling_drawing import drawing, lanes, svg
from pruna_ir.coupling_map import CouplingMap, coupling_map, table, why_not
from pruna_ir.errors import UsageError
from tests.coupling.synthetic import deep_network
from tests.networks import conv_net

SVG = "{http://www.w3.org/2000/svg}"


class Heads(nn.Module):
    """Three heads of size four over a width of twelve; input float32[batch, 5, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(-1, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 12))


def mapped(module: nn.Module, *shape: int) -> CouplingMap:
    torch.manual_seed(0)
    program = capture(module.eval(), (torch.randn(shape),))
    return coupling_map(program, couple(program), "net")


@pytest.fixture(scope="module")
def found() -> CouplingMap:
    program = conv_net()
    return coupling_map(program, couple(program), "net")


def test_layers_stand_in_program_order_with_operator_shape_and_source(found: CouplingMap) -> None:
    assert [layer.name for layer in found.layers] == ["stem", "bn", "block.0", "block.1", "head"]
    stem = found.layers[0]
    assert (stem.operator, stem.shape) == ("conv2d", (8, 3, 3, 3))
    assert re.fullmatch(r"tests/networks\.py:\d+", stem.source)


def test_the_order_is_that_of_use_not_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    assert [layer.name for layer in mapped(Backwards(), 2, 3).layers] == ["first", "last"]


def test_a_tensor_of_the_model_itself_is_a_layer_under_its_own_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    (layer,) = mapped(Scaled(), 2, 3).layers
    assert (layer.name, layer.title, layer.operator) == ("scale", "scale", "mul")


def test_the_document_holds_the_whole_coupling(found: CouplingMap) -> None:
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (document["format"], document["model"]) == (1, "net")
    groups = {group["name"]: group for group in document["groups"]}
    trunk = groups["stem.weight[0]"]
    assert (trunk["kind"], trunk["units"], trunk["prunable"]) == ("conv", 8, True)
    assert trunk["reason"] is None
    members = {(m["tensor"], m["dim"]): m for m in trunk["members"]}
    assert members["stem.weight", 0]["produced"]
    assert members["stem.weight", 0]["shape"] == [8, 3, 3, 3]
    assert not members["head.weight", 1]["produced"]
    assert members["head.weight", 1]["layer"] == "head"
    assert members["block.0.weight", 0]["produced"]
    logits = groups["head.weight[0]"]
    assert not logits["prunable"]
    assert logits["reason"]["text"] == "program output output"
    assert logits["reason"]["source"].startswith("tests/networks.py:")


def test_units_that_take_many_indices_say_how_many() -> None:
    found = mapped(Heads(), 2, 5, 12)
    (heads,) = (g for g in found.to_json()["groups"] if g["kind"] == "heads")
    assert heads["units"] == 3
    assert {m["tensor"]: m["indices_per_unit"] for m in heads["members"]} == {
        "qkv.weight": 12, "qkv.bias": 12, "out.weight": 4,
    }  # fmt: skip
    _, columns, rows = table(found)
    row = dict(zip(columns, next(row for row in rows if row[1] == "heads"), strict=True))
    assert (row["channels"], row["of indices"], row["prunable"]) == ("3", "4-12", "yes")


def test_a_row_of_the_table_names_producers_readers_and_reasons(found: CouplingMap) -> None:
    _, columns, rows = table(found)
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    trunk = cells["stem.weight[0]"]
    assert trunk["members"].startswith("made by stem.weight[0], block.0.weight[0]; in ")
    assert "head.weight[1]" in trunk["members"] or " more" in trunk["members"]
    assert re.fullmatch(
        r"no: program output output \(aten\.linear\.default, tests/networks\.py:\d+\)",
        cells["head.weight[0]"]["prunable"],
    )


def test_names_that_differ_in_numbers_share_an_entry_but_layers_keep_theirs() -> None:
    found = mapped(deep_network(7 * 4), 2, 3, 8, 8)
    _, _, rows = table(found)
    trunk = max(rows, key=lambda row: len(row[-1]))[-1]
    assert "made by 0.weight[0], 4x *.second.weight[0]" in trunk
    assert "4x *.first.weight[1]" in trunk


def test_one_unit_stays_and_says_why() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).cumsum(1)[:, 3:])

    found = mapped(Mean(), 2, 3)
    reasons = [reason for group in found.groups if (reason := why_not(group)) is not None]
    assert len(reasons) == len(found.groups)
    assert all(reason.text for reason in reasons)


def test_filters_leave_what_they_match_and_refuse_nothing(found: CouplingMap) -> None:
    some = found.only(["block.1"])
    assert [group.name for group in some.groups] == ["stem.weight[0]"]
    assert [layer.name for layer in found.only(["head"], ["conv"]).layers][-1] == "head"
    assert found.only() == found
    with pytest.raises(UsageError, match="no group has a tensor or layer that matches 'neck.*'"):
        found.only(["neck.*"])
    with pytest.raises(UsageError, match="of kind heads; kinds here: conv, ffn, other"):
        found.only(kinds=["heads"])


# -- the drawing ---------------------------------------------------------------------------------


def test_the_drawing_is_one_page_without_scripts_or_links(found: CouplingMap) -> None:
    page = drawing(found)
    assert "<script" not in page
    assert "href" not in page
    assert "src=" not in page
    # The only address is the name of the format, which nobody loads.
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    picture = ET.fromstring(svg(found, lanes(found)))
    groups = [g for g in picture.iter() if g.get("class") == "group"]
    assert len(groups) == len(found.groups)


def test_every_layer_is_a_row_and_every_member_a_mark(found: CouplingMap) -> None:
    picture = ET.fromstring(svg(found, lanes(found)))
    texts = ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]
    assert [text for text in texts if text in {layer.title for layer in found.layers}] == [
        layer.title for layer in found.layers
    ]
    tips = [tip.text or "" for tip in picture.iter(f"{SVG}title")]
    for group in found.groups:
        for member in group.members:
            assert any(f"{member.tensor}, dimension {member.dim}:" in tip for tip in tips)


def test_frozen_groups_are_grey_and_dashed_and_say_why(found: CouplingMap) -> None:
    made = lanes(found)
    stays = {lane.group.name: lane.colour for lane in made if why_not(lane.group)}
    free = {lane.colour for lane in made if not why_not(lane.group)}
    assert set(stays) == {"stem.weight[1]", "head.weight[0]"}
    assert len(set(stays.values())) == 1
    assert not free & set(stays.values())
    assert "stay: program output output" in svg(found, made)


def test_lines_in_one_column_never_overlap() -> None:
    made = lanes(mapped(deep_network(7 * 30), 2, 3, 8, 8))
    columns: dict[int, list[tuple[int, int]]] = {}
    for lane in made:
        columns.setdefault(lane.column, []).append((lane.first, lane.last))
    for spans in columns.values():
        spans.sort()
        assert all(low[1] < high[0] for low, high in pairwise(spans))
    trunk = max(made, key=lambda lane: lane.last - lane.first)
    assert trunk.column == 0
    assert max(columns) <= 2


def test_names_are_escaped() -> None:
    program = conv_net()
    found = coupling_map(program, couple(program), "<b>&net.py:make")
    page = drawing(found)
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;net.py:make" in page

"""The picture of a front: well-formed SVG in which each mark stands where its figures say."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings

from pruna_ir.pareto import BitSearch, FrontPoint
from pruna_ir.pareto_drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, drawing, scales_of
from tests.test_pareto import saved, searches

SVG = "{http://www.w3.org/2000/svg}"


def search() -> BitSearch:
    found = BitSearch.from_json(json.dumps(saved()))
    points = tuple(
        FrontPoint(100.0 * n, 10.0**-n, 1.5 * 10.0**-n, {"a": "w4a8", "b": "w8a8"})
        for n in (1, 2, 3)
    )
    uniform = (FrontPoint(150.0, 0.5, 0.5, {}, "w4a4"), FrontPoint(400.0, 0.0, 0.0, {}, "float"))
    return replace(found, front=points, uniform=uniform, chosen=points[1], reference=400.0)


def marks(text: str, kind: str) -> list[ET.Element]:
    return [g for g in ET.fromstring(text).iter(f"{SVG}g") if g.get("class") == kind]


def test_every_point_has_a_mark_with_its_figures() -> None:
    text = drawing(search())
    assert [len(marks(text, kind)) for kind in ("front", "uniform", "chosen")] == [3, 2, 1]
    (chosen,) = marks(text, "chosen")
    assert chosen.find(f"{SVG}title").text == (
        "chosen\n1 x w4a8, 1 x w8a8\ncost 200\npredicted 0.01\nmeasured 0.015"
    )
    labels = [g.find(f"{SVG}text").text for g in marks(text, "uniform")]
    assert labels == ["w4a4", "float"]


def test_marks_stand_where_their_figures_say() -> None:
    found = search()
    scales = scales_of(found)
    for point, mark in zip(found.front, marks(drawing(found), "front"), strict=True):
        disc, ring = mark.findall(f"{SVG}circle")
        assert float(disc.get("cx")) == pytest.approx(scales.x(point.cost), abs=0.1)
        assert float(disc.get("cy")) == pytest.approx(scales.y(point.predicted), abs=0.1)
        assert float(ring.get("cy")) == pytest.approx(scales.y(point.measured), abs=0.1)
    costs = [float(m.find(f"{SVG}circle").get("cx")) for m in marks(drawing(found), "front")]
    heights = [float(m.find(f"{SVG}circle").get("cy")) for m in marks(drawing(found), "front")]
    assert costs == sorted(costs)
    assert heights == sorted(heights)  # less is lost further down


def test_nothing_lost_stands_on_the_lowest_line() -> None:
    assert scales_of(search()).y(0.0) == HEIGHT - BOTTOM


@settings(deadline=None, max_examples=25)
@given(searches())
def test_any_search_gives_well_formed_xml_inside_the_picture(found: BitSearch) -> None:
    root = ET.fromstring(drawing(found))
    assert root.tag == f"{SVG}svg"
    for mark in root.iter(f"{SVG}circle"):
        assert LEFT <= float(mark.get("cx")) <= WIDTH - RIGHT + 20
        assert TOP - 0.1 <= float(mark.get("cy")) <= HEIGHT - BOTTOM + 0.1


def test_names_are_escaped() -> None:
    text = drawing(replace(search(), target="<a & b>"))
    assert "&lt;a &amp; b&gt;" in text
    ET.fromstring(text)

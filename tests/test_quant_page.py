"""The quantisation page: well-formed, alone in the world, escaped, and true to its report."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
import torch

from pruna_ir.data import TensorData
from pruna_ir.quant_page import histogram, page, picture
from pruna_ir.quant_report import Bars, FloatLayer, OperandRow, QuantReport, quant_report
from tests.quantised import quantised_net

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "hr", "img", "link"}


class Strict(HTMLParser):
    """Fails where a tag is closed that is not open, or stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def report() -> QuantReport:
    generator = torch.Generator().manual_seed(1)
    data = TensorData((torch.randn(7, 3, 9, 9, generator=generator),), batch_size=3)
    found = quant_report(quantised_net(), data)
    left = FloatLayer("head.<b>out</b>", "linear_9", "aten.linear", "1 < 2", "float32")
    return replace(found, floats=(left,))


def test_the_page_is_well_formed_and_alone_in_the_world(report: QuantReport) -> None:
    text = page(report, "net")
    found = read(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not found.seen & {"script", "link", "img", "iframe", "object", "embed"}
    assert found.links == []
    assert set(re.findall(r"https?://[^\"' <]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text
    for drawn in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(drawn)


def test_the_checker_sees_a_page_that_is_not(report: QuantReport) -> None:
    text = page(report, "net")
    with pytest.raises(AssertionError):
        read(text.replace("</svg>", "", 1))
    assert read(text.replace("<p>", '<p><a href="http://x">x</a>', 1)).links == ["http://x"]


def test_names_are_escaped(report: QuantReport) -> None:
    wicked = '<script>alert("&")</script>'
    rows = tuple(replace(row, layer=wicked, source=wicked, kernel=wicked) for row in report.layers)
    text = page(replace(report, layers=rows, target=wicked, reference=wicked), wicked)
    found = read(text)
    assert "script" not in found.seen
    assert "<b>out" not in text
    assert wicked in "".join(found.text)
    assert "head.<b>out</b>" in "".join(found.text)


def test_layers_stand_in_network_order_in_the_picture_and_worst_first_below(
    report: QuantReport,
) -> None:
    drawn = ET.fromstring(picture(report))
    names = [g.find(f"{SVG}text").text for g in drawn.iter(f"{SVG}g")]  # type: ignore[union-attr]
    assert names == [row.layer for row in report.in_order()]
    text = page(report, "net")
    below = re.findall(r"<h3>(.*?)</h3>", text)
    assert below == [row.layer for row in report.layers]
    assert below != names


def test_bars_are_as_long_as_their_decibels(report: QuantReport) -> None:
    drawn = ET.fromstring(picture(report))
    bars = [r for r in drawn.iter(f"{SVG}rect") if r.get("class") == "own"]
    lengths = [float(bar.get("width", "")) for bar in bars]
    noise = [row.own_db for row in report.in_order()]
    ratios = [length / value for length, value in zip(lengths, noise, strict=True) if value]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.01)


def operand(reach: tuple[float, float], bars: Bars) -> OperandRow:
    return OperandRow("input", constant=False, bits=8, grid="u8[0, 255]", granularity="per tensor",
                      scale=(0.1, 0.1), zero_point=(0, 0), reach=reach, range=(0.0, 4.0),
                      clipped=0.0, sqnr_db=30.0, bars=bars)  # fmt: skip


def test_a_histogram_marks_the_reach_of_the_grid() -> None:
    drawn = ET.fromstring(histogram(operand((0.0, 2.0), Bars(0.0, 1.0, (3, 0, 0, 8), 5))))
    boxes = {kind: [r for r in drawn.iter(f"{SVG}rect") if r.get("class") == kind]
             for kind in ("bar", "reach")}  # fmt: skip
    (reach,) = boxes["reach"]
    first, last = boxes["bar"]
    assert float(reach.get("x", "")) == float(first.get("x", "")) == 0.0
    assert float(reach.get("width", "")) == pytest.approx(180)
    assert float(last.get("x", "")) == pytest.approx(270)
    tall = [float(bar.get("height", "")) for bar in (first, last)]
    assert tall[0] / tall[1] == pytest.approx(math.log1p(3) / math.log1p(8), rel=0.01)


@pytest.mark.parametrize("value", [math.inf, -math.inf, None])
def test_figures_without_a_place_on_the_axis_still_draw(
    report: QuantReport, value: float | None
) -> None:
    rows = tuple(replace(row, own_db=value, accumulated_db=value) for row in report.layers)
    found = read(page(replace(report, layers=rows), "net"))
    assert "svg" in found.seen


def test_empty_things_draw() -> None:
    empty = operand((0.0, 0.0), Bars(0.0, 1.0, (), 0))
    ET.fromstring(histogram(empty))
    read(page(QuantReport("", 1, "the float program", (), (), {}), ""))

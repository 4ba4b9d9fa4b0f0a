"""A saved search: JSON round trips, its widths as an option, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.pareto import BitSearch, FrontPoint, LayerChoices, bits_option, literal
from pruna_ir.passes.bit_widths import parse_rules

numbers = st.floats(0, 1e12)
names = st.text("ab.[]*?_0", min_size=1, max_size=8)
words = st.sampled_from(["w8a8", "w4a8", "w4a4", "float"])
by_width = st.dictionaries(words, numbers, min_size=1)
points = st.builds(
    FrontPoint, numbers, numbers, st.floats(-1, 1e3), st.dictionaries(names, words, max_size=3),
    st.just("") | words,
)  # fmt: skip
layers = st.builds(
    LayerChoices, names, by_width, st.dictionaries(st.just("noise"), by_width, min_size=1)
)


@st.composite
def searches(draw: st.DrawFn) -> BitSearch:
    many = st.lists(points, min_size=1, max_size=4).map(tuple)
    return BitSearch(
        target="onnx", cost="size", unit="bytes", measure=draw(st.sampled_from(["noise", "loss"])),
        samples=draw(st.integers(1, 99)), reference=draw(st.floats(1, 1e9)),
        fixed=draw(numbers), layers=draw(st.lists(layers, max_size=3).map(tuple)),
        front=draw(many), uniform=draw(many), chosen=draw(points),
        inserted={"noise": draw(numbers)}, inserted_cost=draw(numbers),
    )  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(searches())
def test_json_round_trips(found: BitSearch) -> None:
    assert BitSearch.from_json(found.to_json()) == found


@settings(deadline=None, max_examples=40)
@given(searches())
def test_a_changed_figure_is_seen(found: BitSearch) -> None:
    assert BitSearch.from_json(replace(found, fixed=found.fixed + 1e9).to_json()) != found


def saved() -> dict:
    point = FrontPoint(1.0, 0.1, 0.2, {"conv": "w8a8"})
    layer = LayerChoices("conv", {"w8a8": 1.0}, {"noise": {"w8a8": 0.1}})
    found = BitSearch(
        "onnx", "size", "bytes", "noise", 3, 4.0, 0.0, (layer,), (point,), (), point,
        {"noise": 0.2}, 1.0,
    )  # fmt: skip
    return json.loads(found.to_json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9, but 1 is read here"),
        ({"layers": 3}, "not a saved bit search"),
        ({"extra": 1}, "a saved BitSearch has the entries"),
        ({"chosen": {"cost": 1.0}}, "a saved FrontPoint has the entries"),
    ],
)
def test_other_files_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BitSearch.from_json(json.dumps(saved() | change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a saved bit search"):
        BitSearch.from_json(text)


def test_the_summary_tells_prediction_and_measurement() -> None:
    assert BitSearch.from_json(json.dumps(saved())).summary() == (
        "1 bytes (25.0% of float), noise 0.1 predicted, 0.2 measured for the layers together"
    )


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(names, words, min_size=1, max_size=6))
def test_each_layer_gets_its_width_whatever_its_name_and_what_is_around_it(
    widths: dict[str, str],
) -> None:
    rules = parse_rules(bits_option(widths), "bits")
    for name, width in widths.items():
        hits = [r for r in rules if fnmatchcase(name, r.glob) or fnmatchcase(name, f"{r.glob}.*")]
        assert str(hits[-1].width or "float") == width


def test_a_literal_glob_names_nothing_else() -> None:
    assert fnmatchcase("a[0]*", literal("a[0]*"))
    assert not fnmatchcase("a0b", literal("a[0]*"))

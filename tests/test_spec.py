"""Pipeline text: every pipeline prints and parses back; every error points at its place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.spec import FileValue, PassSpec, ScopeSpec, parse_pipeline, print_pipeline

names = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
numbers = st.integers() | st.floats(allow_nan=False)
texts = st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.builds(FileValue, texts),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
options = st.dictionaries(names, values, max_size=3).map(lambda d: tuple(d.items()))
passes = st.builds(PassSpec, names, options)
globs = st.text(alphabet="abc.*?[]0_", min_size=0, max_size=6)
items = st.recursive(
    passes,
    lambda inner: st.builds(ScopeSpec, names, globs, st.lists(inner, max_size=3).map(tuple)),
    max_leaves=5,
)


@given(st.lists(items, max_size=4).map(tuple))
def test_every_pipeline_parses_back_from_its_text(pipeline):
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


@given(st.lists(items, max_size=3).map(tuple))
def test_types_survive_the_text(pipeline):
    again = parse_pipeline(print_pipeline(pipeline))
    assert repr(again) == repr(pipeline)


@given(st.text(alphabet='ab{}=,"[]<>()@1 .\\-', max_size=14))
def test_any_text_parses_or_is_a_usage_error(text):
    try:
        pipeline = parse_pipeline(text)
    except UsageError:
        return
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


def test_reads_every_kind_of_value():
    text = 'p{a=1,b=0.5,c=true,d=none,e=word,f="two words",g=[1,[x]],h=@limits.json,i=1e-5,j=inf}'
    (spec,) = parse_pipeline(text)
    assert isinstance(spec, PassSpec)
    assert dict(spec.options) == {
        "a": 1, "b": 0.5, "c": True, "d": None, "e": "word", "f": "two words",
        "g": (1, ("x",)), "h": FileValue("limits.json"), "i": 1e-5, "j": math.inf,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fold{x=1", "expected '}' to close the options of fold\n  fold{x=1\n          ^"),
        ("a,,b", "expected the name of a pass or scope\n  a,,b\n    ^"),
        ("a b", "expected ',' or the end of the pipeline\n  a b\n    ^"),
        ("a{x=1,x=2}", "option x of a is given twice\n  a{x=1,x=2}\n        ^"),
        ('a{x="open}', 'expected a quoted string that ends\n  a{x="open}\n      ^'),
        ("submodule<l*", "expected '>'\n  submodule<l*\n            ^"),
        ("submodule<l*>a", "expected '(' after submodule<l*>\n  submodule<l*>a\n               ^"),
    ],
)
def test_an_error_points_at_its_place(text, message):
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == message

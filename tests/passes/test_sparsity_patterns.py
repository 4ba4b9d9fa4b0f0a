"""Patterns: what stays equals a naive reference's choice, for any shape, with ties and edges."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.errors import UsageError
from pruna_ir.passes.sparsity_patterns import (
    Blocks,
    Grouped,
    Unstructured,
    kept,
    parse_pattern,
    share,
)
from pruna_ir.sparse_layouts import Layout

LINEAR, ADDMM = Layout("linear", 0, 1), Layout("linear", 1, 0)
CONV, TRANSPOSED = Layout("conv", 0, 1), Layout("transposed", 1, 0)


@st.composite
def scored(draw: st.DrawFn) -> tuple[torch.Tensor, Layout]:
    """A weight's scores, few distinct values for many ties, in any layout."""
    kind = draw(st.sampled_from(["linear", "addmm", "conv", "transposed"]))
    groups = draw(st.integers(1, 3)) if kind == "transposed" else 1
    inputs, outputs = draw(st.integers(1, 9)) * groups, draw(st.integers(1, 9))
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    shape, layout = {
        "linear": ([outputs, inputs], LINEAR),
        "addmm": ([inputs, outputs], ADDMM),
        "conv": ([outputs, inputs, *kernel], CONV),
        "transposed": ([inputs, outputs, *kernel], Layout("transposed", 1, 0, groups)),
    }[kind]
    size = math.prod(shape)
    values = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return torch.tensor(values, dtype=dtype).reshape(shape), layout


def weakest(units: list[tuple[float, int]], count: int) -> set[int]:
    """The ``count`` lowest of (score, place) pairs; of equal ones the first."""
    return {place for _, place in sorted(units)[:count]}


def groups_of(shape: torch.Size, layout: Layout, size: int) -> list[list[tuple[int, ...]]]:
    """The indices of every group of consecutive inputs, by loops."""
    each = shape[layout.inputs] // layout.groups
    others = [range(n) if k != layout.inputs else [0] for k, n in enumerate(shape)]
    found = []
    for place in product(*others):
        for part in range(layout.groups):
            for start in range(0, each, size):
                found.append([
                    (*place[: layout.inputs], part * each + i, *place[layout.inputs + 1 :])
                    for i in range(start, min(start + size, each))
                ])  # fmt: skip
    return found


@settings(max_examples=150)
@given(scored(), st.integers(1, 6), st.integers(1, 6))
def test_n_of_m_keeps_the_n_best_of_every_group(
    drawn: tuple[torch.Tensor, Layout], first: int, second: int
) -> None:
    score, layout = drawn
    pattern = Grouped(min(first, second), max(first, second) + (first == second))
    (keep,) = kept([score], [layout], pattern, 0.0, "layer")
    expected = torch.ones(score.shape, dtype=torch.bool)
    for group in groups_of(score.shape, layout, pattern.group):
        scores = [(float(score[index]), i) for i, index in enumerate(group)]
        for place in weakest(scores, max(0, len(group) - pattern.kept)):
            expected[group[place]] = False
        assert int(sum(keep[index] for index in group)) == min(len(group), pattern.kept)
    assert torch.equal(keep, expected)


@settings(max_examples=100)
@given(scored(), st.floats(0, 1, exclude_max=True), st.sampled_from(["layer", "output"]))
def test_unstructured_removes_the_weakest_share(
    drawn: tuple[torch.Tensor, Layout], sparsity: float, ranking: str
) -> None:
    score, layout = drawn
    (keep,) = kept([score], [layout], Unstructured(), sparsity, ranking)
    expected = torch.ones(score.numel(), dtype=torch.bool)
    places = torch.arange(score.numel()).reshape(score.shape)
    rows = [places] if ranking == "layer" else list(places.unbind(layout.outputs))
    for row in rows:
        units = [(float(score.flatten()[i]), int(i)) for i in row.flatten()]
        count = share(sparsity, len(units))
        for place in weakest(units, count):
            expected[place] = False
    assert torch.equal(keep.flatten(), expected)


@settings(max_examples=50)
@given(st.lists(scored(), min_size=1, max_size=3), st.floats(0, 1, exclude_max=True))
def test_a_global_ranking_compares_all_layers(
    drawn: list[tuple[torch.Tensor, Layout]], sparsity: float
) -> None:
    scores, layouts = [s for s, _ in drawn], [lay for _, lay in drawn]
    keep = torch.cat([k.flatten() for k in kept(scores, layouts, Unstructured(), sparsity,
                                                "global")])  # fmt: skip
    flat = torch.cat([s.flatten().double() for s in scores]).tolist()
    gone = weakest([(value, i) for i, value in enumerate(flat)], share(sparsity, len(flat)))
    assert {i for i, stays in enumerate(keep.tolist()) if not stays} == gone


@settings(max_examples=100)
@given(
    scored(),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.floats(0, 1, exclude_max=True),
)
def test_blocks_stay_or_go_as_a_whole_by_their_mean(
    drawn: tuple[torch.Tensor, Layout], size: tuple[int, int], sparsity: float
) -> None:
    score, layout = drawn
    (keep,) = kept([score], [layout], Blocks(*size), sparsity, "layer")
    each = score.shape[layout.inputs] // layout.groups
    units, indices = [], []
    for part, row, column in product(
        range(layout.groups),
        range(0, score.shape[layout.outputs], size[0]),
        range(0, each, size[1]),
    ):
        mask = torch.zeros(score.shape, dtype=torch.bool)
        end = min(column + size[1], each)
        inputs = slice(part * each + column, part * each + end)
        mask.movedim((layout.outputs, layout.inputs), (0, 1))[row : row + size[0], inputs] = True
        units.append((float(score[mask].double().mean()), len(units)))
        indices.append(mask)
    gone = [i for i, mask in enumerate(indices) if not bool(keep[mask].any())]
    for mask in indices:
        assert bool(keep[mask].all()) or not bool(keep[mask].any())
    count = share(sparsity, len(units))
    assert len(gone) == count
    # Means that differ by rounding only may come in either order.
    limit = sorted(value for value, _ in units)[count - 1] if count else -1.0
    assert all(units[i][0] <= limit + 1e-9 for i in gone)


@settings(max_examples=50)
@given(
    scored(),
    st.sampled_from([Unstructured(), Grouped(2, 4), Grouped(1, 3), Blocks(2, 3)]),
    st.floats(0, 1, exclude_max=True),
)
def test_what_is_gone_stays_gone(
    drawn: tuple[torch.Tensor, Layout],
    pattern: Unstructured | Grouped | Blocks,
    sparsity: float,
) -> None:
    score, layout = drawn
    (first,) = kept([score], [layout], pattern, sparsity, "layer")
    (again,) = kept([score.masked_fill(~first, -math.inf)], [layout], pattern, sparsity, "layer")
    assert torch.equal(first & again, first)


def test_entries_of_score_minus_infinity_go_before_padding_counts() -> None:
    # A tail of one entry, already dead: it keeps its place, padding does not take it.
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0, -math.inf]])
    (keep,) = kept([score], [LINEAR], Grouped(2, 4), 0.0, "layer")
    assert keep.tolist() == [[False, False, True, True, True]]


def test_a_control_with_shifted_groups_is_not_the_same() -> None:
    torch.manual_seed(0)
    score = torch.rand(4, 12)
    (keep,) = kept([score], [LINEAR], Grouped(2, 4), 0.0, "layer")
    (shifted,) = kept([score.roll(1, 1)], [LINEAR], Grouped(2, 4), 0.0, "layer")
    assert not torch.equal(keep, shifted.roll(-1, 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", Unstructured()),
        ("2:4", Grouped(2, 4)),
        ("1:8", Grouped(1, 8)),
        ("16x16", Blocks(16, 16)),
        ("1x4", Blocks(1, 4)),
    ],
)
def test_texts_name_patterns(text: str, expected: object) -> None:
    assert parse_pattern(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("structured", "unknown pattern 'structured'; known: unstructured, N:M such as 2:4"),
        ("4:2", "pattern 4:2: N:M keeps N of M entries, with 0 < N < M"),
        ("4:4", "with 0 < N < M"),
        ("0:4", "with 0 < N < M"),
        ("0x4", "pattern 0x4: a block has at least 1x1 entries"),
        ("2:4:8", "unknown pattern"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pattern(text)

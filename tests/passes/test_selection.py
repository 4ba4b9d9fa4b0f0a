"""Selections obey their limits and grow with what is asked; budgets are found by bisection."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import Group, Member, couple
from pruna_ir.errors import UsageError
from pruna_ir.passes.selection import (
    Candidate,
    Limits,
    Selector,
    floor_share,
    kind_names,
    names_tensor,
    own_ratio,
    parse_ratios,
    reach,
)


def mlp(*widths):
    """A program with one group of each inner width, and its coupling."""
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    program = capture(nn.Sequential(*layers), (torch.randn(2, widths[0]),))
    return program, couple(program)


COUPLING = mlp(3, 13, 8, 30, 2)[1]
GROUPS = [group for group in COUPLING.groups if group.reason is None]
SIZES = [13, 8, 30]


def selector(scores=None, ratios=(None, None, None), own=1.0, **limits):
    limits = Limits(**limits)
    if scores is None:
        scores = [np.arange(size, dtype=np.float64) for size in SIZES]
    candidates = [Candidate(g, "ffn", r) for g, r in zip(GROUPS, ratios, strict=True)]
    capped = limits.max_ratio < 1
    return Selector(COUPLING, candidates, scores, limits, capped, own)


def counts(mask):
    return [int(mask[group.units].sum()) for group in GROUPS]


def test_the_groups_of_the_example_have_the_sizes_that_these_tests_assume():
    assert [len(group.units) for group in GROUPS] == SIZES


@pytest.mark.parametrize(
    ("share", "size", "number"), [(0.5, 3, 1), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29)]
)
def test_a_share_is_rounded_down_but_not_by_binary_fractions(share, size, number):
    assert floor_share(share, size) == number


@pytest.mark.parametrize(
    ("share", "limits", "gone"),
    [
        (0.0, {}, [0, 0, 0]),
        (0.5, {}, [6, 4, 15]),
        (0.5, {"min_channels": 10}, [3, 0, 15]),
        (0.5, {"round_to": 8}, [5, 0, 14]),
        (0.5, {"round_to": 16}, [0, 0, 14]),
        (1.0, {"max_ratio": 0.5}, [6, 4, 15]),
        (1.0, {"max_ratio": 0.9, "round_to": 4, "min_channels": 2}, [9, 4, 26]),
        # The scores of 0 .. 12, 0 .. 7 and 0 .. 29: 25 of 51 are below 8 or 9.
        (0.5, {"ranking": "global"}, [9, 8 - 1, 8]),
        (0.5, {"ranking": "global", "max_ratio": 0.5}, [6, 4, 15]),
    ],
)
def test_how_many_go(share, limits, gone):
    assert counts(selector(**limits).at(share)) == gone


def test_the_weakest_go():
    scores = [np.array([5.0, 1, 4, 1, 3] + [9] * 8), np.ones(8), np.ones(30)]
    mask = selector(scores, max_ratio=0.99).at(0.25)
    assert mask[GROUPS[0].units].tolist() == [False, True, False, True, True] + [False] * 8


def test_a_dimension_never_loses_everything():
    scores = [np.arange(13.0), np.arange(8.0), np.arange(30.0)]
    mask = selector(scores, min_channels=1).at(1.0)
    assert counts(mask) == [12, 7, 29]
    assert not any(mask[group.units[-1]] for group in GROUPS)


def test_a_ratio_of_its_own_holds_whatever_is_asked():
    for share in (0.0, 0.3, 1.0):
        for ranking in ("layer", "global"):
            mask = selector(ratios=(None, 0.25, 0.1), ranking=ranking, max_ratio=0.9).at(share)
            assert counts(mask)[1:] == [2, 3]
    assert counts(selector(ratios=(None, 0.5, 0.1), own=0.5, max_ratio=0.9).at(0.0)) == [0, 2, 1]


def test_units_that_are_gone_go_first():
    scores = [np.arange(13.0), np.arange(8.0), np.arange(30.0)]
    scores[2][7] = -np.inf
    assert selector(scores).at(1 / 30)[GROUPS[2].units[7]]


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=51, max_size=51),
    st.sampled_from(["layer", "global"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.1, 1.0),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_selections_obey_their_limits_and_are_nested(
    values, ranking, min_channels, round_to, max_ratio, shares
):
    scores = [np.array(part) for part in np.split(np.array(values), [13, 21])]
    limits = {
        "ranking": ranking, "min_channels": min_channels, "round_to": round_to,
        "max_ratio": max_ratio,
    }  # fmt: skip
    few, many = (selector(scores, **limits).at(share) for share in shares)
    assert not (few & ~many).any()
    for group, size in zip(GROUPS, SIZES, strict=True):
        gone = int(many[group.units].sum())
        kept = size - gone
        assert gone <= floor_share(max_ratio if max_ratio < 1 else shares[1], size) or (
            ranking == "global"
        )
        if gone:
            assert kept >= min_channels
            # A dimension that would be empty keeps its strongest unit, multiple or not.
            assert kept % round_to == 0 or kept == 1


def test_units_of_several_indices_need_no_rounding_of_their_own():
    def group(*per_unit):
        members = tuple(
            Member(f"w{k}", 0, np.zeros((6, n), np.int64), produced=True)
            for k, n in enumerate(per_unit)
        )
        return Candidate(Group(np.arange(6), members, None), "heads")

    assert [group(64).multiple(m) for m in (8, 32, 48)] == [1, 1, 3]
    assert [group(256, 64).multiple(m) for m in (32, 128)] == [1, 2]
    assert group(1).multiple(8) == 8


# -- budgets -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=51, max_size=51),
    st.sampled_from(["layer", "global"]),
    st.sampled_from([1, 4]),
    st.floats(0, 1),
)
def test_a_budget_is_reached_by_the_smallest_selection(values, ranking, round_to, wanted):
    scores = [np.array(part) for part in np.split(np.array(values), [13, 21])]
    weights = np.random.default_rng(0).random(len(COUPLING.solved.frozen))
    weights[np.concatenate([group.units for group in GROUPS])] += 0.1
    weights /= weights.sum()
    chosen = selector(scores, ranking=ranking, round_to=round_to, max_ratio=0.9)

    def removed(mask):
        return float(weights[mask].sum())

    mask = reach(chosen, removed, wanted)
    if mask is None:
        assert removed(chosen.at(1.0)) < wanted
        return
    assert removed(mask) >= wanted
    assert not (mask & ~chosen.at(1.0)).any()
    if mask.any():
        # Nothing needless: what is too much is less than one part.
        parts = chosen.between(np.zeros_like(mask), mask)
        largest = max(removed(np.isin(np.arange(len(mask)), part)) for part in parts)
        assert removed(mask) - wanted < largest + 1e-12


def test_parts_of_a_selection_keep_multiples():
    chosen = selector(round_to=8, max_ratio=0.9)
    few, many = chosen.at(0.0), chosen.at(1.0)
    assert counts(many) == [5, 0, 22]
    parts = chosen.between(few, many)
    # 13 -> 8 in one part, 30 -> 24 -> 16 -> 8 in three.
    assert sorted(map(len, parts)) == [5, 6, 8, 8]
    assert len(np.unique(np.concatenate(parts))) == int(many.sum())


def test_what_is_gone_already_is_part_of_the_result():
    gone = np.zeros(len(COUPLING.solved.frozen), np.bool_)
    gone[GROUPS[2].units[-3:]] = True
    size = float(sum(SIZES))
    mask = reach(selector(max_ratio=0.9), lambda m: m.sum() / size, 10 / size, gone)
    assert mask is not None
    assert (mask & gone).sum() == 3
    assert mask.sum() == 10


# -- which groups ------------------------------------------------------------------------------


def test_ratios_are_read():
    given_ = ("conv=0.4", "layer4.*=0", "a=b.weight=0.5")
    assert parse_ratios(given_) == (("conv", 0.4), ("layer4.*", 0.0), ("a=b.weight", 0.5))


@pytest.mark.parametrize("entry", ["conv", "=0.5", "conv=", "conv=1.0", "conv=-0.1", "conv=nan"])
def test_a_ratio_of_another_form_is_refused(entry):
    with pytest.raises(UsageError, match=r'such as "conv=0\.4".*, not '):
        parse_ratios((entry,))


def test_the_last_matching_entry_holds():
    group = GROUPS[1]
    assert group.name == "1.weight[0]"

    def ratio(*entries, kind="ffn"):
        return own_ratio(group, kind, parse_ratios(entries))

    assert ratio("ffn=0.2", "1.*=0.3") == 0.3
    assert ratio("1.*=0.3", "ffn=0.2") == 0.2
    assert ratio("transformer=0.2") == 0.2
    assert ratio("transformer=0.2", kind="conv") is None
    # The module that only reads the channels has no say.
    assert ratio("2.*=0.3") is None
    assert ratio("1=0.3") == 0.3


def test_names():
    assert kind_names("transformer") == ("heads", "head-size", "ffn", "width")
    assert kind_names("conv") == ("conv",)
    assert kind_names("layer1") == ()
    assert names_tensor("layer1.*", "layer1.0.conv1.weight")
    assert names_tensor("layer1.0.conv1", "layer1.0.conv1.weight")
    assert not names_tensor("conv1", "layer1.0.conv1.weight")

"""Criteria of the weights against loops over units, written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.errors import UsageError
from pruna_ir.passes.criteria import distances
from pruna_ir.passes.importance import refusals, scores
from pruna_ir.passes.norm_scales import norm_scales
from pruna_ir.transform import Context
from tests.passes.scored_networks import assert_same, shared

NETWORKS = ("images", "language")


def raw(scored, criterion, groups=None, **options):
    """Scores as the criterion gives them, summed over the members."""
    return scores(
        scored.program, scored.coupling, scored.groups if groups is None else groups, criterion,
        context=Context(seed=3), aggregate="sum", normalise="none", **options,
    )  # fmt: skip


def producing(scored, group):
    weights = [m for m in scored.members(group) if scored.program.tensor(m.tensor).dim() > 1]
    return [m for m in weights if m.produced]


def naive(scored, size):
    """The sum over producing weights of a size of each unit's entries."""
    return [
        [
            sum(
                size(scored.unit_entries(m, u, scored.module.get_parameter(m.tensor)).tolist())
                for m in producing(scored, group)
            )
            for u in range(len(group.units))
        ]
        for group in scored.groups
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_l1_sums_absolute_weights(network):
    scored = shared(network)
    assert_same(raw(scored, "l1"), naive(scored, lambda w: sum(map(abs, w))))


@pytest.mark.parametrize("network", NETWORKS)
def test_l2_is_the_euclidean_norm(network):
    scored = shared(network)
    assert_same(raw(scored, "l2"), naive(scored, lambda w: math.sqrt(sum(x * x for x in w))))


@pytest.mark.parametrize("network", NETWORKS)
def test_fpgm_sums_distances_to_the_other_units(network):
    scored = shared(network)
    expected = []
    for group in scored.groups:
        totals = [0.0] * len(group.units)
        for member in producing(scored, group):
            weight = scored.module.get_parameter(member.tensor)
            rows = [scored.unit_entries(member, u, weight) for u in range(len(group.units))]
            for u, row in enumerate(rows):
                totals[u] += sum(float((row - other).detach().norm()) for other in rows)
        expected.append(totals)
    assert_same(raw(scored, "fpgm"), expected, 1e-7)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 5), st.floats(-1e3, 1e3))
def test_distances_are_those_of_cdist_far_from_the_origin_too(seed, count, size, offset):
    points = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    truth = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sum(0)
    np.testing.assert_allclose(distances(points + offset), truth, rtol=1e-6, atol=1e-6)


def test_the_redundant_filter_has_the_least_distance():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [-5.0, 4.0]])
    assert int(np.argmin(distances(points))) in (0, 1)


def test_bn_scale_reads_the_scales_of_the_norms():
    scored = shared("images")
    groups = [g for g, why in zip(scored.groups, refused(scored), strict=True) if not why]
    scales = [[scored.module.bn.weight], [scored.module.bn_mix.weight]]
    expected = []
    for group, weights in zip(groups, scales, strict=True):
        # The first of the units' tensors with the order of their channels.
        member = next(m for m in group.members if m.tensor.startswith("bn"))
        expected.append(
            [
                sum(abs(float(w[int(i)])) for w in weights for i in member.indices[u])
                for u in range(len(group.units))
            ]
        )
    assert_same(raw(scored, "bn-scale", groups), expected)


def refused(scored):
    return refusals(scored.program, scored.coupling, scored.groups, "bn-scale")


def test_bn_scale_finds_norms_that_are_spelled_out():
    scored = shared("language")
    assert norm_scales(scored.program) == {"norm.weight", "norm_ffn.weight", "norm_out.weight"}
    (width,) = [g for g in scored.groups if len(g.units) == 12]
    expected = [
        sum(float(n.weight[u]) for n in (scored.module.norm, scored.module.norm_ffn,
                                         scored.module.norm_out))
        for u in range(12)
    ]  # fmt: skip
    assert_same(raw(scored, "bn-scale", [width]), [expected])


def test_a_scale_of_something_unnormalised_is_no_norm_scale():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
            self.gamma = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.out(self.gamma * self.fc(x))

    from pruna_ir import capture

    assert not norm_scales(capture(Scaled(), (torch.zeros(2, 3),)))


def test_bn_scale_refuses_groups_without_a_norm_by_name():
    scored = shared("images")
    assert [bool(why) for why in refused(scored)].count(True) == 1
    with pytest.raises(UsageError) as error:
        raw(scored, "bn-scale")
    assert str(error.value) == (
        "bn-scale cannot score 1 of 3 groups, such as hidden.weight[0] (no norm with a scale runs "
        "over its channels, or it was folded); exclude them or choose another criterion"
    )


def test_random_depends_on_the_seed_and_not_on_the_other_groups():
    scored = shared("images")
    first, again = raw(scored, "random"), raw(scored, "random")
    alone = raw(scored, "random", scored.groups[1:2])
    other = scores(
        scored.program, scored.coupling, scored.groups, "random", context=Context(seed=4)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (alone[0] == first[1]).all()
    assert not (np.argsort(other[0]) == np.argsort(first[0])).all()


def test_the_comparison_of_these_tests_sees_a_swap_of_two_units():
    scored = shared("images")
    swapped = [row.copy() for row in raw(scored, "l1")]
    swapped[0][[0, 1]] = swapped[0][[1, 0]]
    with pytest.raises(AssertionError):
        assert_same(swapped, naive(scored, lambda w: sum(map(abs, w))))

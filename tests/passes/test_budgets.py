"""Costs after removal are those of the program that is really pruned; budgets are reached."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.cost import cost
from pruna_ir.coupling import couple
from pruna_ir.errors import UsageError
from pruna_ir.passes.budgets import (
    LATENCY_BUILDS,
    LATENCY_TOLERANCE,
    cost_after,
    reach_measured,
)
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.transform import Context, apply
from tests.coupling.random_networks import networks
from tests.coupling.random_removal import applied, program_of, some_units
from tests.networks import ConvNet, seeded

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


@settings(max_examples=15, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([0.0, 0.3, 0.7]), st.integers(0, 9))
def test_the_cost_after_removal_is_that_of_the_pruned_program(network, share, seed):
    program = program_of(network)
    coupling = couple(program)
    gone = some_units(coupling, share, seed)
    small = applied(program, coupling.plan(np.flatnonzero(gone)))
    predicted, actual = cost_after(program, coupling, gone), cost(small)
    assert (predicted.flops, predicted.parameters) == (actual.flops, actual.parameters)
    # Where a slice became uneven, removal stores the places that it reads.
    added = [t for name, t in small.tensors().items() if name not in program.tensors()]
    assert all(tensor.dtype == torch.int64 for tensor in added)
    assert predicted.bytes == actual.bytes - sum(8 * tensor.numel() for tensor in added)


def convnet():
    torch.manual_seed(0)
    return apply(Canonicalize(), capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))).program


def mlp(*widths):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(widths)
              for layer in (nn.Linear(a, b), nn.ReLU())]
    return capture(nn.Sequential(*layers[:-1]), (torch.randn(2, widths[0]),))


@pytest.mark.parametrize("of", ["flops", "parameters", "bytes"])
@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_a_budget_is_reached_and_one_unit_less_would_miss_it(of, ranking, ratio):
    program = mlp(17, 90, 41, 66, 5)
    result = apply(PruneChannels(ratio=ratio, of=of, ranking=ranking), program)
    left = getattr(cost(result.program), of) / getattr(cost(program), of)
    # A unit is an entry of a bias, a row and a column.
    unit = max(17 + 41, 90 + 66, 41 + 5) + 1
    slack = unit / cost(program).parameters
    assert 1 - ratio - 2 * slack < left <= 1 - ratio


def test_the_remark_tells_the_share_that_went():
    result = apply(PruneChannels(ratio=0.5, of="flops"), convnet())
    (note,) = [remark for remark in result.remarks if remark.kind == "note"]
    before, after = cost(convnet()).flops, cost(result.program).flops
    assert note.message == f"{1 - after / before:.1%} of the flops go (50.0% asked)"


def test_rounding_holds_under_a_budget():
    program = mlp(10, 64, 64, 10)
    small = apply(PruneChannels(ratio=0.5, of="flops", round_to=8), program).program
    assert [len(small.tensor(f"{k}.weight")) % 8 for k in (0, 2)] == [0, 0]
    assert cost(small).flops <= 0.5 * cost(program).flops


def test_groups_with_a_ratio_of_their_own_are_outside_of_the_search():
    program = mlp(10, 64, 64, 10)
    pass_ = PruneChannels(ratio=0.5, of="flops", ratios=("0=0.25",))
    small = apply(pass_, program).program
    assert len(small.tensor("0.weight")) == 48
    assert cost(small).flops <= 0.5 * cost(program).flops


@pytest.mark.parametrize("steps", [2, 3])
def test_rounds_end_at_the_same_budget(steps):
    program = mlp(17, 90, 41, 66, 5)
    small = apply(PruneChannels(ratio=0.5, of="flops", steps=steps), program).program
    assert 0.48 < cost(small).flops / cost(program).flops <= 0.5


def test_an_impossible_budget_says_what_can_go_and_what_remains():
    program = mlp(10, 8, 40, 10)
    with pytest.raises(
        UsageError,
        match=r"prune-channels: 90\.0% of the flops cannot go: .* max_ratio=0\.5, "
        r"min_channels=1 and round_to=1, at most 6\d\.\d% can; what remains is mostly "
        r"linear_2 \(4\) \d\d%, .* Ask for less, or loosen these",
    ):
        apply(PruneChannels(ratio=0.9, of="flops", max_ratio=0.5), program)


def test_an_excluded_layer_makes_a_budget_impossible():
    with pytest.raises(UsageError, match=r"50\.0% of the parameters cannot go"):
        apply(PruneChannels(of="parameters", exclude=("*",)), mlp(10, 8, 40, 10))


# -- latency -----------------------------------------------------------------------------------


def channels(share):
    """The first of 400 channels."""
    return np.arange(400) < round(share * 400)


def search(saves, wanted, at=channels):
    """What the chosen selection saves, and how many were measured."""
    measured = []

    def removed(mask):
        measured.append(mask)
        return saves(mask.mean())

    mask, most = reach_measured(at, removed, wanted)
    return None if mask is None else saves(mask.mean()), most, len(measured)


@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    "saves", [lambda s: s, lambda s: 1 - (1 - s) ** 2, lambda s: s**3, lambda s: max(0, 2 * s - 1)]
)
def test_a_latency_search_ends_within_its_tolerance_after_a_few_builds(saves, wanted):
    saved, _, builds = search(saves, wanted)
    assert abs(saved - wanted) <= LATENCY_TOLERANCE
    assert builds <= LATENCY_BUILDS


def test_coarse_channels_end_at_the_nearest_latency_above():
    saved, _, builds = search(lambda s: s, 0.4, lambda share: np.arange(4) < int(share * 4))
    assert saved == 0.5
    assert builds <= LATENCY_BUILDS


def test_a_latency_that_nothing_reaches_is_an_error():
    assert search(lambda s: s / 2, 0.7)[:2] == (None, 0.5)


def test_latency_is_measured_on_the_target_side_by_side():
    # Big enough that multiplying outweighs calling.
    program = mlp(64, 3000, 3000, 64)
    pass_ = PruneChannels(ratio=0.5, of="latency")
    result = apply(pass_, program, Context(target="eager"))
    (note,) = [remark.message for remark in result.remarks if remark.kind == "note"]
    assert "of the latency go, measured on eager beside the unpruned program: " in note
    assert note.endswith("builds (50.0% asked)")
    assert 0.2 < cost(result.program).flops / cost(program).flops < 0.8

"""Random networks out of the whole rule table keep their oracle, whatever is removed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pruna_ir import capture, verify
from pruna_ir.coupling import couple, remove
from pruna_ir.equivalence import relative_error, run_float64
from pruna_ir.masked_reference import masked_reference
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.transform import Context, Rewrite, apply
from tests.coupling.random_networks import CONV_LAYERS, TOKEN_LAYERS, Network, networks

TOLERANCE = 1e-11

# Shrinking repeats captures for minutes; the networks are small enough to read as they are.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


def program_of(network):
    return apply(Canonicalize(), capture(network, (torch.randn(2, 3, 6, 6),))).program


def pruned(program, share, seed):
    """The program without a random share of the units of every free group, and the plan."""
    coupling = couple(program)
    rng = np.random.default_rng(seed)
    gone = [
        unit
        for group in coupling.groups
        if group.reason is None
        for unit in rng.permutation(group.units)[: int(share * len(group.units))]
    ]
    mask = np.zeros(len(coupling.solved.frozen), bool)
    mask[gone] = True
    for _, units in coupling.emptied(mask):
        mask[units[0]] = False
    plan = coupling.plan(np.flatnonzero(mask))
    rw = Rewrite(program, "remove", Context())
    remove(rw, coupling, plan)
    return rw.finish(), plan


def worst_error(program, small, plan):
    errors = []
    for batch in (1, 3):
        torch.manual_seed(batch)
        x = (torch.randn(batch, 3, 6, 6, dtype=torch.float64),)
        truth = masked_reference(program, x, plan.removed)
        for actual, expected in zip(run_float64(small, x), truth, strict=True):
            errors.append(relative_error(actual, expected))
    return max(errors)


def check(network, share, seed):
    program = program_of(network)
    small, plan = pruned(program, share, seed)
    verify(small)
    assert worst_error(program, small, plan) < TOLERANCE
    return plan


@settings(max_examples=60, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 9))
def test_what_is_left_computes_what_the_oracle_says(network, share, seed):
    check(network, share, seed)


@pytest.mark.nightly
@settings(max_examples=2000, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 9))
def test_many_networks_compute_what_the_oracle_says(network, share, seed):
    check(network, share, seed)


@pytest.mark.parametrize("name", sorted(set(CONV_LAYERS) - {"statistic"}))
def test_every_convolutional_layer_can_be_pruned(name):
    network = Network([name, "conv", "relu"], [], "mean", 1)
    plan = check(network, 0.5, 0)
    assert parameters(network, "convs.1.") <= set(plan.removed)


@pytest.mark.parametrize("name", sorted(set(TOKEN_LAYERS) - {"attention-shared-keys"}))
def test_every_token_layer_can_be_pruned(name):
    network = Network(["relu"], ["linear", name], "mean", 1)
    plan = check(network, 0.5, 0)
    # A norm over the head size keeps it while heads go.
    whole = {"tokens.1.head_norm.weight", "tokens.1.head_norm.bias"}
    assert parameters(network, "tokens.1.") - whole <= set(plan.removed)


def test_statistics_over_channels_leave_the_channels_free():
    assert check(Network(["statistic"], [], "mean", 1), 0.5, 0).removed["convs.0.weight"]


def test_one_key_head_for_all_query_heads():
    network = Network(["relu"], ["linear", "attention-shared-keys"], "mean", 1)
    plan = check(network, 0.5, 0)
    assert len(plan.removed["tokens.1.qkv.weight"][0]) == 4
    assert 0 not in plan.removed["tokens.1.keys.weight"]


def parameters(network, prefix):
    return {name for name, _ in network.named_parameters() if name.startswith(prefix)}

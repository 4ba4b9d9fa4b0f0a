"""Criteria of activations against loops over units, written from the formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.passes import criteria_activations
from pruna_ir.passes.criteria_activations import DAMPING, removal_cost
from pruna_ir.passes.importance import scores
from pruna_ir.transform import Context
from tests.passes.scored_networks import Scored, assert_same, shared

NETWORKS = ("images", "language")
CRITERIA = ("activation-mean", "activation-rms", "activation-zeros", "wanda", "obs")


def raw(scored, criterion, batch_size=3, **options):
    return scores(
        scored.program, scored.coupling, scored.groups, criterion,
        context=scored.context(batch_size), aggregate="sum", normalise="none", **options,
    )  # fmt: skip


def statistics(scored, statistic):
    """The sum over distinct inputs of a statistic of a unit's values."""
    reads = scored.reads()
    expected = []
    for group in scored.groups:
        totals = [0.0] * len(group.units)
        seen = []
        for layer, channels in scored.readers(group):
            x = reads[layer]
            if any(x.shape == other.shape and torch.equal(x, other) for other in seen):
                continue
            seen.append(x)
            for u, own in enumerate(channels):
                totals[u] += statistic([float(v) for c in own for v in x[:, c]])
        expected.append(totals)
    return expected


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("criterion", "statistic"),
    [
        ("activation-mean", lambda values: sum(map(abs, values)) / len(values)),
        ("activation-rms", lambda values: math.sqrt(sum(v * v for v in values) / len(values))),
        ("activation-zeros", lambda values: sum(v != 0 for v in values) / len(values)),
    ],
)
def test_statistics_of_what_consumers_read(network, criterion, statistic):
    scored = shared(network)
    assert_same(raw(scored, criterion), statistics(scored, statistic))


def columns(layer, channel):
    """The entries of a layer's weight that meet one input channel."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        return weight[:, channel].flatten()
    local, rows = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    group = channel // local
    return weight[group * rows : (group + 1) * rows, channel % local].flatten()


@pytest.mark.parametrize("network", NETWORKS)
def test_wanda_multiplies_magnitudes_by_input_norms(network):
    scored = shared(network)
    reads = scored.reads()
    expected = [
        [
            sum(
                float(columns(layer, c).abs().sum() * reads[layer][:, c].norm())
                for layer, channels in scored.readers(group)
                for c in channels[u]
            )
            for u in range(len(group.units))
        ]
        for group in scored.groups
    ]
    assert_same(raw(scored, "wanda"), expected)


def damped(x, groups=1):
    """H = X X^T / N + damping, of each group of channels alone."""
    moment = x.T @ x / len(x)
    local = len(moment) // groups
    for c in range(len(moment)):
        for d in range(len(moment)):
            if c // local != d // local:
                moment[c, d] = 0
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).double()


@pytest.mark.parametrize("network", NETWORKS)
def test_obs_is_the_error_left_after_the_survivors_are_refitted(network):
    """trace(W_S (H_SS - H_SR H_RR^-1 H_RS) W_S^T): least squares of the gone on the survivors."""
    scored = shared(network)
    reads = scored.reads()
    expected = []
    for group in scored.groups:
        totals = [0.0] * len(group.units)
        for layer, channels in scored.readers(group):
            moment = damped(reads[layer], getattr(layer, "groups", 1))
            for u, gone in enumerate(channels):
                kept = [c for c in range(len(moment)) if c not in gone]
                refit = torch.linalg.solve(moment[kept][:, kept], moment[kept][:, gone])
                left = moment[gone][:, gone] - moment[gone][:, kept] @ refit
                weight = torch.stack([columns(layer, c) for c in gone], 1)
                totals[u] += float(torch.trace(weight @ left @ weight.T))
        expected.append(totals)
    assert_same(raw(scored, "obs"), expected)


def test_obs_is_the_least_squares_error_on_the_data_itself():
    """With hardly any damping: min over V of |W X - V X_kept|^2 / N, by lstsq."""
    torch.manual_seed(0)
    x = torch.randn(40, 6).double() @ torch.randn(6, 6).double()
    weight = torch.randn(3, 6).double()
    table = np.array([[0, 3], [1, 4], [2, 5]])
    expected = []
    for gone in table.tolist():
        kept = [c for c in range(6) if c not in gone]
        target = x @ weight.T
        fit = torch.linalg.lstsq(x[:, kept], target).solution
        expected.append(float((target - x[:, kept] @ fit).square().sum() / 40))
    found = removal_cost(weight.T, torch.linalg.inv(x.T @ x / 40), table)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_obs_of_a_wide_consumer_takes_the_diagonal(monkeypatch):
    scored = shared("images")
    monkeypatch.setattr(criteria_activations, "LARGEST", 6)
    group = next(k for k, g in enumerate(scored.groups) if len(g.units) == 7)
    square = scored.reads()[scored.module.head].square().mean(0)
    weight = scored.module.head.weight.detach()
    expected = (square + DAMPING * square.mean()) * weight.square().sum(0)
    np.testing.assert_allclose(raw(scored, "obs")[group], expected, rtol=1e-12)


def test_obs_survives_inputs_that_are_always_zero():
    scored = Scored("images")
    with torch.no_grad():
        scored.program.tensor("hidden.weight").zero_()
        scored.program.tensor("hidden.bias").zero_()
    assert all(np.isfinite(score).all() for score in raw(scored, "obs"))


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(max_examples=8)
@given(data=st.data())
def test_no_split_into_batches_changes_the_scores(criterion, data):
    scored = shared("images")
    cuts = sorted(data.draw(st.sets(st.integers(1, 6))))
    edges = [0, *cuts, 7]
    parts = [scored.inputs[a:b] for a, b in pairwise(edges)]

    class Parts:
        def __len__(self):
            return len(parts)

        def __iter__(self):
            return iter([next(iter(TensorData((part,), None, 7))) for part in parts])

    split = scores(
        scored.program, scored.coupling, scored.groups, criterion, context=Context(data=Parts()),
        aggregate="sum", normalise="none",
    )  # fmt: skip
    assert_same(split, raw(scored, criterion, 7), 1e-11)


def test_a_window_sees_the_last_batches_only():
    scored = Scored("images")
    late = Scored("images")
    # Batches of 2, 2, 2 and 1.
    late.inputs, late.labels = late.inputs[4:], late.labels[4:]
    assert_same(
        raw(scored, "activation-rms", 2, window=2), raw(late, "activation-rms", 2), 1e-12
    )
    with pytest.raises(UsageError, match="a window holds at least 1 batch, not 0"):
        raw(scored, "activation-rms", window=0)


def test_activations_that_are_not_finite_are_refused():
    scored = Scored("images")
    scored.inputs[3] = torch.nan
    with pytest.raises(UsageError, match="takes NaN or infinite values on the calibration data"):
        raw(scored, "obs")


def test_a_group_that_nobody_multiplies_is_refused():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 6)

        def forward(self, x):
            return self.fc(x).square().sum(1, keepdim=True)

    program = capture(Gate(), (torch.randn(2, 3),))
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.reason is None]
    context = Context(data=TensorData((torch.randn(4, 3),)))
    with pytest.raises(UsageError, match="wanda cannot score 1 of 1 groups, such as fc.weight"):
        scores(program, coupling, groups, "wanda", context=context)

"""Every layer of the catalogue can be pruned, and together they use the whole rule table."""

from __future__ import annotations

import pytest

from pruna_ir import verify
from pruna_ir.coupling.table import RULES
from tests.coupling.catalogue import operators, parameters, program
from tests.coupling.random_networks import CATALOGUE, Form
from tests.coupling.test_random_networks import TOLERANCE, pruned, worst_error

STAYS = {
    "images/channel-attention": "one filter for all channels",
    "images/spatial-attention": "a convolution of two statistics",
    "images/prelu-one": "one slope for all channels",
    "images/fake-quantised": "one scale for all channels",
    "images/fake-quantised-channels": "a zero point a channel, an integer, has no channels",
    "images/unfold": "nine weights, one a neighbour",
    "images/channel-shuffle": "two shuffles, of 3 and of 4 groups, couple all 12 channels",
    "images/linear-mm": "has a bias that it does not use",
    "images/linear-matmul": "has a bias that it does not use",
    "images/linear-transposed": "has a bias that it does not use",
    "images/linear-bmm": "has a bias that it does not use",
    "images/linear-einsum": "has a bias that it does not use",
    "tokens/attention-qk-layer-norm": "heads go, the size of a head stays",
    "tokens/attention-qk-rms-norm": "heads go, the size of a head stays",
    "tokens/experts": "a score an expert",
    "tokens/grouped-experts": "a score an expert",
    "tokens/token-mixer": "the bias of one output",
    "tokens/distances": "no rule for cdist",
}
"""Layers with parameters that lose nothing, and why."""


@pytest.mark.parametrize(("kind", "name"), CATALOGUE)
def test_every_layer_can_be_pruned(kind, name):
    captured = program(kind, name, Form())
    small, plan = pruned(captured, 0.5, 0)
    verify(small)
    assert worst_error(captured, small, plan) < TOLERANCE
    assert plan
    if f"{kind}/{name}" not in STAYS:
        assert parameters(kind, name) <= set(plan.removed)


@pytest.mark.parametrize(("kind", "name"), CATALOGUE)
def test_every_layer_can_be_pruned_as_it_is_captured(kind, name):
    captured = program(kind, name, Form(dynamic=False, canonical=False))
    small, plan = pruned(captured, 0.5, 1)
    verify(small)
    assert worst_error(captured, small, plan) < TOLERANCE


def test_the_catalogue_uses_the_whole_rule_table():
    """Some spellings exist only before ``canonicalize``, some only after it."""
    forms = (Form(), Form(dynamic=False, canonical=False))
    found = {
        name for kind, layer in CATALOGUE for form in forms
        for name in operators(program(kind, layer, form))
    }  # fmt: skip
    assert set(RULES) <= found, sorted(set(RULES) - found)

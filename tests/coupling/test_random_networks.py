"""Random networks out of the whole rule table keep their oracle, whatever is removed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pruna_ir import capture, verify
from pruna_ir.coupling import ATTENTION, RemovalPlan, couple, remove
from pruna_ir.equivalence import relative_error, run_float64
from pruna_ir.masked_reference import masked_reference
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Program
from pruna_ir.transform import Context, Rewrite, apply
from tests.coupling.random_networks import (
    VOCABULARY,
    Form,
    Network,
    Recipe,
    forms,
    recipes,
)

TOLERANCE = 1e-11


def program_of(network: Network, form: Form = Form()) -> Program:  # noqa: B008
    """The captured network; networks that write in place are always made canonical."""
    program = capture(network, network.inputs(2), dynamic_batch=form.dynamic)
    in_place = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.calls()
    )
    if form.canonical or in_place:
        return apply(Canonicalize(), program).program
    return program


def pruned(
    program: Program, share: float, which: int, attention: str = "heads"
) -> tuple[Program, RemovalPlan]:
    """The program without a random share of the units of every free group, and the plan."""
    coupling = couple(program, attention)
    rng = np.random.default_rng(which)
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


def stimuli(program: Program) -> list[tuple[torch.Tensor, ...]]:
    """Inputs for a batch of 1 and of 3, where the batch is free."""
    inputs = []
    for batch in (1, 3):
        torch.manual_seed(batch)
        inputs.append(
            tuple(
                _random([batch if isinstance(s, str) else s for s in spec.shape], spec.dtype)
                for spec in program.inputs
            )
        )
    return inputs


def _random(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.randint(0, VOCABULARY, shape)
    return torch.randn(shape, dtype=torch.float64)


def worst_error(program: Program, small: Program, plan: RemovalPlan) -> float:
    """The largest relative error of the pruned program against the oracle."""
    errors = []
    for inputs in stimuli(program):
        truth = masked_reference(program, inputs, plan.removed)
        assert all(bool(torch.isfinite(output).all()) for output in truth)
        for actual, expected in zip(run_float64(small, inputs), truth, strict=True):
            errors.append(relative_error(actual, expected))
    return max(errors)


def check(
    recipe: Recipe,
    share: float,
    which: int,
    form: Form = Form(),  # noqa: B008
    attention: str = "heads",
) -> RemovalPlan:
    """Prune a network and hold the result against the oracle."""
    program = program_of(Network(recipe), form)
    small, plan = pruned(program, share, which, attention)
    verify(small)
    assert worst_error(program, small, plan) < TOLERANCE
    return plan


# Shrinking repeats captures for minutes; the networks are small enough to read as they are.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
SETTINGS = settings(phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))


def run(examples: int, number: int) -> None:
    """So many random networks; most of them must lose something."""
    lost = []

    @seed(number)
    @settings(SETTINGS, max_examples=examples, derandomize=False)
    @given(
        recipes, st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 9), forms,
        st.sampled_from(ATTENTION),
    )  # fmt: skip
    def many(recipe: Recipe, share: float, which: int, form: Form, attention: str) -> None:
        lost.append(bool(check(recipe, share, which, form, attention)))

    many()
    assert len(lost) >= examples
    assert sum(lost) >= 0.85 * len(lost)


def test_what_is_left_computes_what_the_oracle_says():
    run(200, 0)


def test_a_tensor_of_one_value_follows_channels_that_are_repeated():
    recipe = Recipe(
        images=("repeat", "empty"), kind="volumes", layers=("pool", "resized"),
        entry="pair-join", ending="first", seed=22,
    )  # fmt: skip
    assert check(recipe, 0.2, 8)


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(1, 11))
def test_many_networks_compute_what_the_oracle_says(number):
    run(200, number)

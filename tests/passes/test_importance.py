"""Importance: one interface over all criteria; normalisation, aggregation, ranks and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.passes.importance import (
    AGGREGATIONS,
    CRITERIA,
    NORMALISATIONS,
    combined,
    refusals,
    scores,
)
from pruna_ir.transform import Context
from tests.passes.scored_networks import assert_same, shared

ISSUE = {
    "random", "l1", "l2", "fpgm", "bn-scale", "taylor", "gradient", "snip", "fisher",
    "gauss-newton", "obs", "activation-mean", "activation-rms", "activation-zeros", "movement",
    "wanda",
}  # fmt: skip
SCORES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=9).map(
    lambda values: np.array(values, np.float64)
)


def test_every_criterion_is_there_and_says_what_it_is():
    assert set(CRITERIA) >= ISSUE
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.formula
        assert criterion.source


@pytest.mark.parametrize("network", ["images", "language"])
@pytest.mark.parametrize("criterion", sorted(ISSUE))
def test_every_kind_of_group_gets_one_finite_score_a_unit(network, criterion):
    scored = shared(network)
    refused = refusals(scored.program, scored.coupling, scored.groups, criterion)
    groups = [g for g, why in zip(scored.groups, refused, strict=True) if not why]
    assert len(groups) == len(scored.groups) or criterion == "bn-scale"
    before = scored.program.hash()
    found = scores(
        scored.program, scored.coupling, groups, criterion, context=scored.context()
    )
    assert [score.shape for score in found] == [(len(g.units),) for g in groups]
    assert all(score.dtype == np.float64 and np.isfinite(score).all() for score in found)
    if criterion != "activation-zeros":
        # Two units are equally far from one another: fpgm cannot tell them apart.
        told = [s for s in found if criterion != "fpgm" or len(s) > 2]
        assert all(len(np.unique(score)) == len(score) for score in told)
    assert scored.program.hash() == before


def test_scores_do_not_depend_on_which_groups_are_asked_for():
    scored = shared("language")
    for criterion in sorted(ISSUE - {"bn-scale", "snip"}):
        every, some = (
            scores(scored.program, scored.coupling, groups, criterion, context=scored.context())
            for groups in (scored.groups, scored.groups[::-1])
        )
        assert_same(some[::-1], every, 1e-12)


def test_the_default_is_the_mean_over_members_relative_to_their_means():
    scored = shared("images")
    group = next(g for g in scored.groups if g.name == "stem.weight[0]")
    parts = [
        np.array(
            [
                float(scored.unit_entries(m, u, scored.module.get_parameter(m.tensor)).abs().sum())
                for u in range(len(group.units))
            ]
        )
        for m in scored.members(group)
        if m.produced and scored.program.tensor(m.tensor).dim() > 1
    ]
    expected = np.mean([part / part.mean() for part in parts], 0)
    assert_same(
        scores(scored.program, scored.coupling, [group], "l1", context=Context()), [expected]
    )


# -- normalisation and aggregation ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("none", [2.0, 6.0]), ("mean", [0.5, 1.5]), ("max", [1 / 3, 1.0]), ("sum", [0.25, 0.75])],
)
def test_one_part_is_scaled(normalise, expected):
    assert combined([np.array([2.0, 6.0])], "mean", normalise).tolist() == expected


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("mean", [2.0, 4.0]), ("sum", [4.0, 8.0]), ("max", [3.0, 7.0])]
)
def test_parts_are_aggregated(aggregate, expected):
    parts = [np.array([1.0, 7.0]), np.array([3.0, 1.0])]
    assert combined(parts, aggregate, "none").tolist() == expected


@given(SCORES, st.sampled_from([1, 2]))
def test_lamp_is_the_share_of_what_is_not_below(values, power):
    found = combined([values], "mean", "lamp", power)
    scaled = values / values.mean() if values.mean() > 0 else np.ones_like(values)
    order = sorted(range(len(values)), key=lambda u: (scaled[u], u))
    for place, u in enumerate(order):
        above = sum(scaled[v] ** power for v in order[place:])
        assert found[u] == pytest.approx(scaled[u] ** power / above if above else 1.0)


@given(SCORES, st.sampled_from(NORMALISATIONS), st.sampled_from(AGGREGATIONS))
def test_no_normalisation_reorders_the_units_of_one_part(values, normalise, aggregate):
    found = combined([values], aggregate, normalise)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()


@given(SCORES, st.floats(0.01, 100))
def test_scale_does_not_matter_but_for_none(values, factor):
    for normalise in ("mean", "max", "sum", "lamp"):
        np.testing.assert_allclose(
            combined([values * factor], "mean", normalise),
            combined([values], "mean", normalise),
            rtol=1e-9, atol=1e-12,
        )  # fmt: skip


def test_signed_scores_keep_their_order():
    """Movement may be negative in the mean."""
    values = np.array([-3.0, 1.0, -1.0])
    for normalise in NORMALISATIONS:
        assert np.argsort(combined([values], "mean", normalise)).tolist() == [0, 2, 1]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [n for n, c in CRITERIA.items() if c.needs != "nothing"])
def test_criteria_of_data_ask_for_data(criterion):
    scored = shared("images")
    with pytest.raises(UsageError) as error:
        scores(scored.program, scored.coupling, scored.groups, criterion, context=Context())
    assert str(error.value) == (
        f"criterion {criterion} needs {CRITERIA[criterion].needs}, but there is no calibration "
        "data; give it with --data FILE.npz or Context(data=...)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "tailor"}, "unknown criterion 'tailor'; did you mean 'taylor'"),
        ({"aggregate": "men"}, "unknown aggregation 'men'; did you mean 'mean'"),
        ({"normalise": "lmp"}, "unknown normalisation 'lmp'; did you mean 'lamp'"),
    ],
)
def test_unknown_names_are_refused(options, message):
    scored = shared("images")
    criterion = options.pop("criterion", "l1")
    with pytest.raises(UsageError, match=message):
        scores(
            scored.program, scored.coupling, scored.groups, criterion, context=Context(), **options
        )


def test_data_that_does_not_fit_the_program_is_refused():
    scored = shared("images")
    context = Context(data=TensorData((torch.zeros(4, 2),)))
    with pytest.raises(UsageError, match="the program takes"):
        scores(scored.program, scored.coupling, scored.groups, "obs", context=context)


def test_no_groups_need_no_run():
    scored = shared("images")
    assert scores(scored.program, scored.coupling, [], "fisher", context=scored.context()) == []


def test_wide_groups_are_scored_without_a_walk_over_channels():
    """4,000 units; one at a time would take minutes."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4000), nn.LayerNorm(4000), nn.ReLU(), nn.Linear(4000, 8))
    program = capture(module, (torch.randn(2, 8),))
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.reason is None]
    context = Context(data=TensorData((torch.randn(16, 8),), None, 8))
    for criterion in sorted(ISSUE - {"obs"}):
        (found,) = scores(program, coupling, groups, criterion, context=context)
        assert found.shape == (4000,)


# -- ranks ---------------------------------------------------------------------------------------

RANK = """
import sys
import numpy as np, torch, torch.distributed as dist
from pruna_ir.errors import UsageError
from pruna_ir.passes.importance import scores
from pruna_ir.transform import Context
from pruna_ir.data import TensorData
from tests.passes.scored_networks import Scored, shared

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
scored = Scored("images")
own = slice(0, 3) if rank == 0 else slice(3, 7)
data = TensorData((scored.inputs[own],), scored.labels[own], 2)
found = {}
for criterion in sys.argv[3:]:
    each = scores(scored.program, scored.coupling, scored.groups, criterion,
                  context=Context(data=data, seed=3))
    for number, score in enumerate(each):
        found[f"{criterion} {number}"] = score
np.savez(f"{folder}/{rank}.npz", **found)
dist.barrier()  # Whoever leaves first would cut the other one's connection.
dist.destroy_process_group()
"""

EXACT = sorted(ISSUE - {"random", "l1", "l2", "fpgm", "bn-scale", "movement"})


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes gets, of which one has 3 samples and the other 4."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), *EXACT, "movement"],
            cwd=root, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("criterion", EXACT)
def test_two_ranks_give_what_one_process_gives(two_ranks, criterion):
    scored = shared("images")
    alone = scores(
        scored.program, scored.coupling, scored.groups, criterion, context=scored.context(2)
    )
    for rank in two_ranks:
        assert_same([rank[f"{criterion} {k}"] for k in range(len(alone))], alone, 1e-10)


def test_ranks_move_together(two_ranks):
    """Movement's steps use the gradients of both ranks, so that both end with the same scores."""
    first, second = two_ranks
    scored = shared("images")
    alone = scores(
        scored.program, scored.coupling, scored.groups, "movement", context=scored.context(2)
    )
    for number in range(len(scored.groups)):
        np.testing.assert_array_equal(first[f"movement {number}"], second[f"movement {number}"])
        assert not np.allclose(first[f"movement {number}"], alone[number], rtol=1e-6)

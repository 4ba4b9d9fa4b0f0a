"""Sensitivity: the measured error of the outputs decides how many units each group spares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.errors import UsageError
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.passes.reconstruct_consumers import ReconstructConsumers
from pruna_ir.passes.scored_members import Candidates
from pruna_ir.passes.sensitivity import LEVELS, sensitivities
from pruna_ir.transform import Context, apply
from tests.passes.compensation import Residual, context, kept_promise, program_of


class Uneven(nn.Module):
    """The output depends a hundred times more on the second hidden layer than on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weak, self.strong = nn.Linear(6, 10), nn.Linear(6, 10)
        self.read = nn.ModuleList(nn.Linear(10, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weak, strong = torch.relu(self.weak(x)), torch.relu(self.strong(x))
        return 0.01 * self.read[0](weak) + self.read[1](strong)


def found(program, where, removed=lambda gone: float(gone.sum())):
    coupling = couple(program)
    groups = [g for g in coupling.groups if g.reason is None]
    orders = [np.arange(len(g.units), dtype=float) for g in groups]
    candidates = Candidates(program, coupling, groups, where)
    return groups, sensitivities(candidates, orders, removed, lambda _: program)


def test_the_group_that_the_outputs_depend_on_less_goes_first():
    program, where = program_of(Uneven, 6), context(6)
    groups, scores = found(program, where)
    by_name = dict(zip([g.name for g in groups], scores, strict=True))
    assert by_name["weak.weight[0]"].max() < 0.01 * by_name["strong.weight[0]"].max()
    small = apply(PruneChannels(ratio=0.5, ranking="sensitivity", max_ratio=0.8), program, where)
    kept = [len(small.program.tensor(f"{name}.weight")) for name in ("weak", "strong")]
    assert kept == [2, 8]


def test_scores_keep_the_criterion_s_order_and_grow_along_it():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    for score in found(program, where)[1]:
        assert (np.diff(score) > 0).all()


def test_the_error_of_a_level_is_that_of_the_pruned_and_refitted_program():
    """What is measured with zeros and refitted weights is what removal and refitting gives."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    program, where = capture(module, (torch.randn(2, 4),)), context(4)
    levels = sorted({min(max(1, round(level * 9)), 8) for level in LEVELS})
    with torch.no_grad():
        (x,) = where.data.inputs
        wanted = program(x)[0]
        power = (wanted - wanted.mean(0)).square().sum()
    _, (score,) = found(program, where)
    areas = []
    for low, high in zip([0, *levels], levels, strict=False):
        areas.append(score[low:high].sum())
    order = PruneChannels(ratio=levels[2] / 9, criterion="random")
    small = apply(order, program, where).program
    fitted = kept_promise(ReconstructConsumers(positions=0), small, where).program
    with torch.no_grad():
        refitted = float((fitted(x)[0] - wanted).square().sum() / power)
    assert 0.1 * refitted < sum(areas[:3]) < 10 * refitted


def test_a_dearer_group_is_worth_more_error():
    program, where = program_of(Uneven, 6), context(6)
    groups, plain = found(program, where)
    first = groups[0].units
    _, priced = found(program, where, lambda gone: float(gone.sum() + 9 * gone[first].sum()))
    assert np.allclose(priced[0] * 10, plain[0], rtol=1e-6)
    assert np.allclose(priced[1], plain[1])


def test_groups_that_no_layer_reads_are_measured_by_removal():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x):
            return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)

    program, where = program_of(Scores, 5, 4), context(5, 4)
    small = apply(PruneChannels(ratio=0.4, ranking="sensitivity"), program, where).program
    assert len(small.tensor("query.weight")) == len(small.tensor("key.weight")) == 4


def test_it_needs_data_and_one_step():
    with pytest.raises(UsageError, match="ranking=sensitivity needs calibration data"):
        apply(PruneChannels(ranking="sensitivity"), program_of(Uneven, 6), Context())
    with pytest.raises(UsageError, match="takes steps=1"):
        PruneChannels(ranking="sensitivity", steps=2)

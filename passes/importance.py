"""Importance: one number for every unit of a coupled group; larger matters more.

A *criterion* gives each scored member (or consumer) i of a group a score s_i(u) of each unit u.
These are first normalised over the group, then aggregated over the members, and with ``lamp``
made comparable over groups:

    none    I(u) = agg_i s_i(u)
    mean    I(u) = agg_i s_i(u) / mean_v |s_i(v)|
    max     I(u) = agg_i s_i(u) / max_v |s_i(v)|
    sum     I(u) = agg_i s_i(u) / sum_v |s_i(v)|
    lamp    A(u) = mean's I(u);  I(u) = A(u)^p / sum_{v: A(v) >= A(u)} A(v)^p

with agg one of sum, mean and max over i. ``mean`` lets no member of a group dominate by its scale
or size, and lets a global ranking compare channels relative to their group; ``none`` keeps the
criterion's own scale, which for criteria of the loss (taylor, fisher, gauss-newton) compares
channels of all groups by what their removal costs. ``lamp`` is Lee et al., Layer-adaptive Sparsity
for the Magnitude-based Pruning, ICLR 2021, equation 4, on units in place of weights; p = 2 for
scores that are norms and 1 for scores that are energies already, so that A^p is an energy. Equal
scores are ranked by their index. Averaging over everything that is removed together is the group
view of Fang et al., DepGraph, CVPR 2023, section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from pruna_ir.coupling import Coupling, Group
from pruna_ir.errors import UsageError
from pruna_ir.passes import criteria, criteria_activations, criteria_gradients, elimination
from pruna_ir.passes.consumers import unread
from pruna_ir.passes.scored_members import Candidates, Parts, Scores
from pruna_ir.program import Program
from pruna_ir.registry import unknown
from pruna_ir.transform import Context

T = TypeVar("T")

AGGREGATIONS = ("mean", "sum", "max")
"""How the scores of a group's members become one."""
NORMALISATIONS = ("mean", "max", "sum", "none", "lamp")
"""How scores are scaled before (and for ``lamp`` after) they are aggregated."""


def nothing_refused(candidates: Candidates) -> list[str]:
    """What a criterion answers that scores every group."""
    return [""] * len(candidates.groups)


@dataclass(frozen=True)
class Criterion:
    """One way to score units.

    Attributes:
        name: what users call it.
        needs: ``nothing``, or what of the calibration data: ``activations`` or ``gradients``.
        formula: the score of a unit u.
        source: the paper.
        power: the power of a score that is an energy: 2 for norms, 1 for energies.
        parts: for every group, the scores that its scored members give.
        refusals: for every group, why it cannot be scored; empty where it can.
    """

    name: str
    needs: Literal["nothing", "activations", "gradients"]
    formula: str
    source: str
    power: int
    parts: Callable[[Candidates], list[Parts]] = field(repr=False)
    refusals: Callable[[Candidates], list[str]] = field(default=nothing_refused, repr=False)


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("random", "nothing", "U[0, 1)", "the baseline", 1, criteria.random),
        Criterion("l1", "nothing", "sum |w|", "Li et al., ICLR 2017", 2, criteria.l1),
        Criterion("l2", "nothing", "sqrt(sum w^2)", "Li et al., ICLR 2017", 2, criteria.l2),
        Criterion(
            "fpgm", "nothing", "sum_v |w_u - w_v|_2", "He et al., CVPR 2019", 2, criteria.fpgm
        ),
        Criterion(
            "bn-scale", "nothing", "sum |gamma|", "Liu et al., ICCV 2017", 2, criteria.bn_scale,
            criteria.without_scale,
        ),
        Criterion(
            "taylor",
            "gradients",
            "mean_i (sum x_i dL_i/dx_i)^2 over what consumers read",
            "Molchanov et al., CVPR 2019",
            1,
            criteria_gradients.taylor,
            unread,
        ),
        Criterion(
            "gradient",
            "gradients",
            "sum |mean_i g_i|",
            "the magnitude of the gradient",
            2,
            criteria_gradients.gradient,
            criteria_gradients.untrained,
        ),
        Criterion(
            "snip",
            "gradients",
            "sum |w mean_i g_i| / sum over all",
            "Lee et al., ICLR 2019",
            1,
            criteria_gradients.snip,
            criteria_gradients.untrained,
        ),
        Criterion(
            "fisher",
            "gradients",
            "1/2 mean_i sum w^2 g_i^2",
            "LeCun et al., 1990; Theis et al., 2018",
            1,
            criteria_gradients.fisher,
            criteria_gradients.untrained,
        ),
        Criterion(
            "gauss-newton",
            "gradients",
            "1/2 mean_i sum w^2 g_i^2, labels drawn from the model",
            "LeCun et al., 1990; Martens, JMLR 2020",
            1,
            criteria_gradients.gauss_newton,
            criteria_gradients.untrained,
        ),
        Criterion(
            "movement",
            "gradients",
            "-sum_t sum w_t g_t",
            "Sanh et al., NeurIPS 2020",
            1,
            criteria_gradients.movement,
            criteria_gradients.untrained,
        ),
        Criterion(
            "activation-mean",
            "activations",
            "mean |x|",
            "Molchanov et al., ICLR 2017",
            2,
            criteria_activations.activation_mean,
            unread,
        ),
        Criterion(
            "activation-rms",
            "activations",
            "sqrt(mean x^2)",
            "Molchanov et al., ICLR 2017",
            2,
            criteria_activations.activation_rms,
            unread,
        ),
        Criterion(
            "activation-zeros",
            "activations",
            "share of x != 0 (1 - APoZ)",
            "Hu et al., 2016",
            1,
            criteria_activations.activation_zeros,
            unread,
        ),
        Criterion(
            "wanda",
            "activations",
            "sum_c |w_c|_1 |x_c|_2",
            "Sun et al., ICLR 2024",
            2,
            criteria_activations.wanda,
            unread,
        ),
        Criterion(
            "obs",
            "activations",
            "tr W_S ((H^-1)_SS)^-1 W_S^T, H = X X^T / N",
            "Hassibi & Stork, 1992; Kwon et al., 2022",
            1,
            criteria_activations.obs,
            unread,
        ),
        Criterion(
            "obs-greedy",
            "activations",
            "obs at each unit's turn, the cheapest first, all others refitted",
            "Hassibi & Stork, 1992; Kurtic et al., NeurIPS 2023",
            1,
            elimination.obs_greedy,
            unread,
        ),
    )
}
"""Every criterion by name."""


def scores(
    program: Program,
    coupling: Coupling,
    groups: Sequence[Group],
    criterion: str,
    *,
    context: Context,
    aggregate: str = "mean",
    normalise: str = "mean",
    window: int | None = None,
) -> list[Scores]:
    """The importance of every unit of every group, [units] in float64 for each.

    Args:
        program: the program; it is only read.
        coupling: its coupling.
        groups: groups of the coupling.
        criterion: a name of `CRITERIA`.
        context: the calibration data for criteria that need it, and the seed.
        aggregate: one of `AGGREGATIONS`.
        normalise: one of `NORMALISATIONS`.
        window: criteria of activations look at the last so many batches only; None for all.

    Raises:
        UsageError: an unknown name; the criterion needs data and there is none; it cannot score
            one of the groups.

    >>> import torch
    >>> from pruna_ir import capture
    >>> from pruna_ir.coupling import couple
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 2.0], [4.0, -5.0]]))
    >>> program = capture(model, (torch.zeros(2, 2),))
    >>> coupling = couple(program)
    >>> [group.name for group in coupling.groups[:1]]
    ['0.weight[0]']
    >>> scores(program, coupling, coupling.groups[:1], "l1", context=Context())
    [array([0.5, 1.5])]
    """
    chosen = _named("criterion", criterion, CRITERIA)
    _named("aggregation", aggregate, dict.fromkeys(AGGREGATIONS, ""))
    _named("normalisation", normalise, dict.fromkeys(NORMALISATIONS, ""))
    if chosen.needs != "nothing" and context.data is None:
        raise UsageError(
            f"criterion {criterion} needs {chosen.needs}, but there is no calibration data; give "
            "it with --data FILE.npz or Context(data=...)"
        )
    candidates = Candidates(program, coupling, groups, context, window)
    refused = [
        f"{group.name} ({why})"
        for group, why in zip(groups, chosen.refusals(candidates), strict=True)
        if why
    ]
    if refused:
        raise UsageError(
            f"{criterion} cannot score {len(refused)} of {len(groups)} groups, such as "
            f"{refused[0]}; exclude them or choose another criterion"
        )
    parts = chosen.parts(candidates) if groups else []
    return [combined(each, aggregate, normalise, chosen.power) for each in parts]


def refusals(
    program: Program, coupling: Coupling, groups: Sequence[Group], criterion: str
) -> list[str]:
    """For every group, why a criterion cannot score it; empty where it can.

    Raises:
        UsageError: an unknown criterion.
    """
    chosen = _named("criterion", criterion, CRITERIA)
    return chosen.refusals(Candidates(program, coupling, groups, Context()))


def _named(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise UsageError(unknown(kind, name, known))
    return known[name]


def combined(parts: Parts, aggregate: str, normalise: str, power: int = 1) -> Scores:
    """One score a unit from the scores of its members; see the module's text.

    >>> combined([np.array([1.0, 3.0]), np.array([4.0, 0.0])], "mean", "mean")
    array([1.25, 0.75])
    >>> combined([np.array([1.0, 3.0])], "mean", "lamp", power=1)
    array([0.25, 1.  ])
    """
    scaled = np.stack([_scaled(part, normalise) for part in parts])
    together: Scores
    if aggregate == "max":
        together = scaled.max(0)
    else:
        together = scaled.mean(0) if aggregate == "mean" else scaled.sum(0)
    return _lamp(together, power) if normalise == "lamp" else together


def _scaled(part: Scores, normalise: str) -> Scores:
    if normalise == "none":
        return part
    size = np.abs(part)
    if normalise == "max":
        total = float(size.max())
    else:
        total = float(size.sum() if normalise == "sum" else size.mean())
    if total > 0:
        return part / total
    # All are alike.
    return np.full_like(part, 1 / len(part) if normalise == "sum" else 1.0)


def _lamp(score: Scores, power: int) -> Scores:
    """Each score's energy over that of all scores not below it."""
    shifted = score - min(float(score.min()), 0.0)
    energy = shifted**power
    order = np.argsort(score, kind="stable")
    tail = np.cumsum(energy[order][::-1])[::-1]
    result = np.ones_like(score)
    result[order] = np.divide(energy[order], tail, out=np.ones_like(tail), where=tail > 0)
    return result


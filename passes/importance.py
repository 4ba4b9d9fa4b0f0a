"""Importance of channels: how much each unit of a coupled group matters, by weight magnitude.

For a unit u of a group whose channels are produced by the weights W_1 ... W_n (the filters of a
convolution, the rows of a linear layer; all rows of a head of the query, key and value
projections count as one), with W_i[u] the entries of W_i that produce u:

    s_i(u) = ||W_i[u]||_p          p = 1: Li et al., Pruning Filters for Efficient ConvNets,
                                   ICLR 2017, section 3.1; p = 2: the Euclidean norm
    I(u)   = mean_i s_i(u) / mean_v s_i(v)

Each weight's scores are scaled to mean 1 before they are averaged over the coupled weights, so
that no weight of a group dominates by its scale or size. Averaging over everything that is removed
together is the group view of Fang et al., DepGraph, CVPR 2023, section 3.4. The scaling also makes
scores of different groups comparable: a global ranking compares channels relative to their group.

Limits: magnitudes only; activations, gradients and the scale of a following batch norm are not
looked at (fold it first to include it).
"""

from __future__ import annotations

import torch

from pruna_ir.coupling import Group, Member
from pruna_ir.program import Program

CRITERIA: dict[str, float] = {"l1": 1.0, "l2": 2.0}
"""Criterion to the order p of its norm."""


def importance(program: Program, group: Group, order: float) -> torch.Tensor:
    """One score a unit of the group, [units] in float64; larger matters more.

    Args:
        program: the program that the group belongs to.
        group: a group of its coupling.
        order: the p of the norm.

    Weights (two or more dimensions) count; where the channels are produced by none, everything
    that carries them does.
    """
    scores = []
    for member in _scored(program, group):
        score = norms(program.tensor(member.tensor), member, order)
        mean = score.mean()
        scores.append(score / mean if mean > 0 else torch.ones_like(score))
    return torch.stack(scores).mean(0)


def norms(tensor: torch.Tensor, member: Member, order: float) -> torch.Tensor:
    """The p-norm of a tensor's entries that belong to each unit, [units] in float64.

    >>> import numpy as np
    >>> halves = Member("weight", 0, np.array([[0, 1], [2, 3]]), produced=True)
    >>> norms(torch.tensor([[3.0], [-4.0], [0.0], [1.0]]), halves, 2.0)
    tensor([5., 1.], dtype=torch.float64)
    """
    others = [dim for dim in range(tensor.dim()) if dim != member.dim]
    entries = tensor.detach()
    each = (
        torch.linalg.vector_norm(entries, order, others, dtype=torch.float64)
        if others
        else entries.double().abs()
    )
    index = torch.from_numpy(member.indices).to(each.device)
    units: torch.Tensor = torch.linalg.vector_norm(each[index], order, 1)
    return units.cpu()


def _scored(program: Program, group: Group) -> list[Member]:
    weights = [m for m in group.members if program.tensor(m.tensor).dim() > 1]
    produced = [m for m in weights if m.produced]
    return _once(program, produced or weights or list(group.members))


def _once(program: Program, members: list[Member]) -> list[Member]:
    """Members without repeats of a tensor that has several names."""
    seen: dict[tuple[int, int], Member] = {}
    for member in members:
        seen.setdefault((program.tensor(member.tensor).data_ptr(), member.dim), member)
    return list(seen.values())

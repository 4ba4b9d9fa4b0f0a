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

from collections.abc import Callable

import torch

from pruna_ir.coupling import Group, Member
from pruna_ir.program import Program

Criterion = Callable[[torch.Tensor], torch.Tensor]
"""Maps [units, entries] in float64 to one score a unit, [units]."""


def l1(entries: torch.Tensor) -> torch.Tensor:
    """The sum of magnitudes of each row.

    >>> l1(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
    tensor([7., 1.])
    """
    return entries.abs().sum(1)


def l2(entries: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of each row.

    >>> l2(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
    tensor([5., 1.])
    """
    return torch.linalg.vector_norm(entries, dim=1)


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2}


def importance(program: Program, group: Group, criterion: Criterion) -> torch.Tensor:
    """One score a unit of the group, [units] in float64; larger matters more.

    Weights (two or more dimensions) count; where the channels are produced by none, everything
    that produces or carries them does.
    """
    scores = []
    for member in _scored(program, group):
        score = criterion(entries(program, member))
        mean = score.mean()
        scores.append(score / mean if mean > 0 else torch.ones_like(score))
    return torch.stack(scores).mean(0)


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


def entries(program: Program, member: Member) -> torch.Tensor:
    """The entries of a tensor that belong to each unit, [units, entries] in float64."""
    tensor = program.tensor(member.tensor).detach().to(torch.float64)
    rows = tensor.movedim(member.dim, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
    index = torch.from_numpy(member.indices).to(rows.device)
    return rows[index.reshape(-1)].reshape(len(member.indices), -1)

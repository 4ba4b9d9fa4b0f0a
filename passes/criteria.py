"""Criteria that need nothing but the weights.

For a unit u of a group, with W_i[u] the entries of the i-th scored weight that belong to u:

    random     s(u) ~ U[0, 1), drawn from the context's seed and the group's name: the baseline
    l1         s_i(u) = sum |W_i[u]|                 Li et al., Pruning Filters for Efficient
                                                     ConvNets, ICLR 2017, section 3.1
    l2         s_i(u) = sqrt(sum W_i[u]^2)           the Euclidean norm

The scored weights are those that produce the channels (`scored_members.producers`).

Limits: magnitudes say nothing of the data; fold a batch norm first to include its scale.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from pruna_ir.coupling import Group
from pruna_ir.passes.scored_members import (
    Candidates,
    Parts,
    Scores,
    per_index,
    per_unit,
    producers,
)


def random(candidates: Candidates) -> list[Parts]:
    """Seeded uniform numbers; the same for a group whatever other groups are asked for."""
    return [[_drawn(candidates.context.seed, group)] for group in candidates.groups]


def _drawn(seed: int, group: Group) -> Scores:
    key = zlib.crc32(f"{group.name} {len(group.units)} {group.units[0]}".encode())
    return np.random.default_rng([seed, key]).random(len(group.units))


def l1(candidates: Candidates) -> list[Parts]:
    """The sum of absolute weights."""
    return [
        [
            per_unit(per_index(_weight(candidates, member.tensor).abs(), member.dim), member)
            for member in producers(candidates.program, group)
        ]
        for group in candidates.groups
    ]


def l2(candidates: Candidates) -> list[Parts]:
    """The Euclidean norm of the weights."""
    return [
        [
            np.sqrt(
                per_unit(
                    per_index(_weight(candidates, member.tensor).double().square(), member.dim),
                    member,
                )
            )
            for member in producers(candidates.program, group)
        ]
        for group in candidates.groups
    ]


def _weight(candidates: Candidates, name: str) -> torch.Tensor:
    return candidates.program.tensor(name).detach()

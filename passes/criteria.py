"""Criteria that need nothing but the weights.

For a unit u of a group, with W_i[u] the entries of the i-th scored weight that belong to u:

    random     s(u) ~ U[0, 1), drawn from the context's seed and the group's name: the baseline
    l1         s_i(u) = sum |W_i[u]|                 Li et al., Pruning Filters for Efficient
                                                     ConvNets, ICLR 2017, section 3.1
    l2         s_i(u) = sqrt(sum W_i[u]^2)           the Euclidean norm
    fpgm       s_i(u) = sum_v |W_i[u] - W_i[v]|_2    He et al., Filter Pruning via Geometric
                                                     Median, CVPR 2019, equation 4: the unit
                                                     nearest to all others is redundant
    bn-scale   s_i(u) = sum |gamma_i[u]|             Liu et al., Network Slimming, ICCV 2017,
                                                     section 3: the scale of the norm

Members: the weights that produce the channels (`scored_members.producers`); for bn-scale the
scales of every norm over the channels: batch, instance, group, layer and RMS norm, as one
operator or spelled out. A group without one, or whose batch norms were folded, cannot be scored by
bn-scale, and is refused by name.

Limits: magnitudes say nothing of the data; fold a batch norm first to include its scale. fpgm
cannot tell the units of a group of two apart. bn-scale means most in models that were trained with
the L1 penalty of the paper.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from pruna_ir.coupling import Group, Member
from pruna_ir.passes.norm_scales import norm_scales
from pruna_ir.passes.scored_members import (
    Candidates,
    Parts,
    Scores,
    magnitudes,
    once,
    per_index,
    per_unit,
    producers,
    unit_rows,
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
            per_unit(magnitudes(_weight(candidates, member.tensor), member.dim), member)
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
                    per_index(
                        _weight(candidates, member.tensor), member.dim, torch.Tensor.square_
                    ),
                    member,
                )
            )
            for member in producers(candidates.program, group)
        ]
        for group in candidates.groups
    ]


def fpgm(candidates: Candidates) -> list[Parts]:
    """The summed distance of a unit's weights to those of all units of its group."""
    return [
        [
            distances(unit_rows(_weight(candidates, member.tensor), member))
            for member in producers(candidates.program, group)
        ]
        for group in candidates.groups
    ]


def distances(points: torch.Tensor) -> Scores:
    """The summed Euclidean distance of each point to all, from their inner products.

    Args:
        points: [n, size].

    >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
    array([4., 3., 5.])
    """
    # About their mean, so that a large common part does not cancel in the squares.
    centred = points.double()
    centred = centred - centred.mean(0)
    square = centred.square().sum(1)
    total = torch.zeros_like(square)
    for part, own in zip(torch.split(centred, _ROWS), torch.split(square, _ROWS), strict=True):
        squared = own[:, None] + square - 2.0 * (part @ centred.T)
        total += squared.clamp_(min=0.0).sqrt_().sum(0)
    return np.asarray(total.cpu().numpy())


_ROWS = 512
"""Points whose distances to all others are in memory at once."""


def bn_scale(candidates: Candidates) -> list[Parts]:
    """The magnitude of the scales of the norms over the channels."""
    return [
        [per_unit(_weight(candidates, m.tensor).double().abs(), m) for m in members]
        for members in _scales(candidates)
    ]


def without_scale(candidates: Candidates) -> list[str]:
    """For every group, why bn-scale cannot score it; empty where it can."""
    return [
        "" if members else "no norm with a scale runs over its channels, or it was folded"
        for members in _scales(candidates)
    ]


def _scales(candidates: Candidates) -> list[list[Member]]:
    """The scales of the norms over each group's channels."""
    scales = norm_scales(candidates.program)
    return [
        once(candidates.program, (m for m in group.members if m.tensor in scales))
        for group in candidates.groups
    ]


def _weight(candidates: Candidates, name: str) -> torch.Tensor:
    return candidates.weight(name)

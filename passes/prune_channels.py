"""prune-channels: remove the weakest channels of every coupled group.

    groups   = channels that must go together (pruna_ir.coupling)
    scores   = importance of each channel of a group (pruna_ir.passes.importance)
    removed  = the `ratio` weakest: of every group, or of all groups together
    program' = program without them: smaller tensors, same inputs and outputs

A channel is whatever the coupling finds: a filter with the batch norm after it and the next
layer's inputs, an attention head, an FFN neuron, an index of a transformer's residual width.
Source of the magnitude criterion: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.

Promise (checked by `pruna_ir.masked_reference`): the result computes what the unpruned program
computes with the removed channels dead at all their consumers, norms over a pruned axis taken over
the survivors.

Limits: prune before operators are fused; the accuracy that is lost is not recovered here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np
from torch import fx

from pruna_ir.coupling import Coupling, Group, couple, remove
from pruna_ir.errors import UsageError
from pruna_ir.masked_reference import MaskedOracle
from pruna_ir.passes.importance import CRITERIA, importance
from pruna_ir.registry import unknown
from pruna_ir.transform import Effect, Pass, Rewrite

RANKINGS = ("layer", "global")

Scores = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove a share of the channels of every coupled group, the weakest first.

    Attributes:
        ratio: the share of channels to remove, in [0, 1).
        criterion: ``l1`` or ``l2``, the norm of a channel's weights.
        ranking: ``layer`` removes the share from every group; ``global`` ranks the channels of
            all groups together, each relative to its group's mean.
        round_to: the number of channels that a group keeps is rounded up to a multiple of this.
        min_channels: how many channels every group keeps at least.
        exclude: globs of tensor names or module paths whose channels stay.

    Raises:
        UsageError: an option is out of its range.

    >>> import torch
    >>> from pruna_ir import apply, capture
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> result = apply(PruneChannels(ratio=0.5), capture(model, (torch.zeros(2, 3),)))
    >>> [list(tensor.shape) for tensor in result.program.tensors().values()]
    [[4, 3], [4], [2, 4], [2]]
    """

    name: ClassVar[str] = "prune-channels"
    effect: ClassVar[Effect] = Effect.ORACLE

    ratio: float = 0.5
    criterion: str = "l1"
    ranking: str = "layer"
    round_to: int = 1
    min_channels: int = 1
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise UsageError(f"prune-channels: ratio must be in [0, 1), not {self.ratio}")
        if self.criterion not in CRITERIA:
            raise UsageError(f"prune-channels: {unknown('criterion', self.criterion, CRITERIA)}")
        if self.ranking not in RANKINGS:
            raise UsageError(f"prune-channels: {unknown('ranking', self.ranking, RANKINGS)}")
        for option in ("round_to", "min_channels"):
            if getattr(self, option) < 1:
                raise UsageError(
                    f"prune-channels: {option} must be at least 1, not {getattr(self, option)}"
                )

    def rewrite(self, rw: Rewrite) -> None:
        """Analyse, rank, select, remove, promise."""
        coupling = couple(rw.program)
        readers = _readers(rw.program.graph)
        groups = self._prunable(rw, coupling, readers)
        scores = [
            importance(rw.program, group, CRITERIA[self.criterion]).numpy() for group in groups
        ]
        gone = self._selected(coupling, groups, scores)
        plan = coupling.plan(np.flatnonzero(gone))
        if not plan:
            return
        for group in groups:
            count = int(gone[group.units].sum())
            if count:
                rw.applied(readers[_producer(group)], _what_went(group, count))
        remove(rw, coupling, plan)
        rw.promise(MaskedOracle(plan.removed))

    def _prunable(
        self, rw: Rewrite, coupling: Coupling, readers: dict[str, fx.Node]
    ) -> list[Group]:
        """The groups that may lose channels; remarks say why the others may not."""
        kept = []
        for group in coupling.groups:
            if not any(member.produced for member in group.members):
                continue
            node = readers[_producer(group)]
            if not all(rw.in_scope(readers[m.tensor]) for m in group.members if m.produced):
                continue
            if why := self._why_not(group):
                rw.skip(node, f"the {len(group.units)} channels of {group.name} stay: {why}")
            else:
                kept.append(group)
        return kept

    def _why_not(self, group: Group) -> str:
        if group.reason is not None:
            return str(group.reason)
        if len(group.units) == 1:
            return "all of them are coupled with one another"
        for member in group.members:
            for glob in self.exclude:
                path = member.tensor.rpartition(".")[0]
                if fnmatchcase(member.tensor, glob) or fnmatchcase(path, glob):
                    return f"{member.tensor} is excluded by {glob!r}"
        return ""

    def _selected(
        self, coupling: Coupling, groups: list[Group], scores: list[Scores]
    ) -> Mask:
        """Per unit, whether it goes."""
        gone = np.zeros(len(coupling.solved.frozen), np.bool_)
        wanted = self._counts(groups, scores)
        for group, score, count in zip(groups, scores, wanted, strict=True):
            weakest = np.argsort(score, kind="stable")[: self._allowed(len(score), count)]
            gone[group.units[weakest]] = True
        _keep_something(coupling, gone, groups, scores)
        return gone

    def _counts(self, groups: list[Group], scores: list[Scores]) -> list[int]:
        """How many channels of each group the ranking asks for."""
        if self.ranking == "layer" or not groups:
            return [_share(self.ratio, len(group.units)) for group in groups]
        every = np.concatenate(scores)
        owner = np.repeat(np.arange(len(groups)), [len(score) for score in scores])
        weakest = np.argsort(every, kind="stable")[: _share(self.ratio, len(every))]
        counts = np.bincount(owner[weakest], minlength=len(groups))
        return [int(count) for count in counts]

    def _allowed(self, size: int, count: int) -> int:
        """The number that may go so that what stays obeys ``min_channels`` and ``round_to``."""
        kept = max(size - count, self.min_channels)
        kept = -(-kept // self.round_to) * self.round_to
        return max(size - kept, 0)


def _share(ratio: float, size: int) -> int:
    """``ratio * size``, rounded down; 0.3 of 10 is 3 in spite of binary fractions."""
    return math.floor(ratio * size + 1e-9)


def _keep_something(
    coupling: Coupling, gone: Mask, groups: list[Group], scores: list[Scores]
) -> None:
    """Take back the strongest channel of each dimension that would be left empty."""
    score = np.full(len(gone), -math.inf)
    for group, values in zip(groups, scores, strict=True):
        score[group.units] = values
    for _, units in coupling.emptied(gone):
        if gone[units].all():
            gone[units[np.argmax(score[units])]] = False


def _producer(group: Group) -> str:
    return next(member.tensor for member in group.members if member.produced)


def _readers(graph: fx.Graph) -> dict[str, fx.Node]:
    """The first node that reads each tensor."""
    readers: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        for user in node.users:
            readers.setdefault(str(node.target), user)
    return readers


def _what_went(group: Group, count: int) -> str:
    shown = [f"{member.tensor}[{member.dim}]" for member in group.members[:4]]
    more = f" and {len(group.members) - 4} more" if len(group.members) > 4 else ""
    return f"removed {count} of {len(group.units)} channels from {', '.join(shown)}{more}"

"""prune-channels: remove the weakest channels of every coupled group.

    groups   = channels that must go together (pruna_ir.coupling)
    scores   = importance of each channel of a group (pruna_ir.passes.importance)
    removed  = the weakest: of every group, or of all groups together (pruna_ir.passes.selection),
               a share of the channels, or as many as a budget asks for (pruna_ir.passes.budgets)
    program' = program without them: smaller tensors, same inputs and outputs

A channel is whatever the coupling finds: a filter with the batch norm after it and the next
layer's inputs, an attention head, an FFN neuron, an index of a transformer's residual width
(`pruna_ir.coupling.kinds`).
Source of the magnitude criterion: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017.

Promise (checked by `pruna_ir.masked_reference`): the result computes what the unpruned program
computes with the removed channels dead at all their consumers, norms over a pruned axis taken over
the survivors.

Limits: prune before operators are fused; the accuracy that is lost is not recovered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import fx

from pruna_ir.coupling import ATTENTION, Coupling, Group, couple
from pruna_ir.coupling.kinds import HEADS, KINDS, kinds_of
from pruna_ir.coupling.removal import remove_units
from pruna_ir.errors import UsageError
from pruna_ir.masked_reference import MaskedOracle
from pruna_ir.passes.budgets import COUNTED, Counted, budget
from pruna_ir.passes.importance import (
    AGGREGATIONS,
    CRITERIA,
    NORMALISATIONS,
    refusals,
    scores,
)
from pruna_ir.passes.removal_plans import carried_back, origin_of, save, without
from pruna_ir.passes.scored_members import Candidates
from pruna_ir.passes.selection import (
    RANKINGS,
    TRANSFORMER_NAME,
    Candidate,
    Limits,
    Mask,
    Scores,
    Selector,
    kind_names,
    names_tensor,
    own_ratio,
    parse_ratios,
)
from pruna_ir.passes.sensitivity import sensitivities
from pruna_ir.program import Program, module_path
from pruna_ir.registry import unknown
from pruna_ir.transform import Effect, Pass, Rewrite

OF = ("channels", *COUNTED, "latency")


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove a share of the channels of every coupled group, the weakest first.

    A share of a number of channels is rounded down: 0.5 of 3 heads is 1 head. A budget (``of``
    other than ``channels``) is reached: at least the share goes, and one channel less would miss
    it.

    Attributes:
        ratio: the share to remove, in [0, 1).
        of: what ``ratio`` is a share of: ``channels``, ``flops``, ``parameters``, ``bytes``, or
            ``latency`` as measured on the target (in torch where there is none).
        criterion: how channels are scored (formulas: `pruna_ir.passes.importance`): ``random``,
            ``l1``, ``l2``, ``fpgm``, ``bn-scale``; from calibration data ``taylor``, ``gradient``,
            ``snip``, ``fisher``, ``gauss-newton``, ``movement``, ``activation-mean``,
            ``activation-rms``, ``activation-zeros``, ``wanda``, ``obs``, ``obs-greedy``.
        aggregate: how the scores of coupled weights become one: ``mean``, ``sum``, ``max``.
        normalise: how scores are made comparable: ``mean``, ``max``, ``sum``, ``none``, ``lamp``.
        ranking: ``layer`` removes the share from every group; ``global`` ranks the channels of
            all groups together; ``sensitivity`` takes a group's channels in the criterion's order,
            and from each group as many as the measured error of the outputs per cost saved tells
            (`pruna_ir.passes.sensitivity`; needs calibration data).
        ratios: shares of channels for some groups, as ``KIND=RATIO`` or ``GLOB=RATIO`` over the
            names of the tensors that produce the channels (or their modules' paths); the last
            that matches holds. Kinds: conv, heads, head-size, ffn, width, other, and
            ``transformer`` for heads, head-size, ffn and width.
        kinds: the kinds of groups that lose channels; all where empty.
        attention: what attention loses: whole ``heads`` (of grouped queries: whole groups),
            ``queries`` (query heads alone, as many of every group), or ``size`` (the same indices
            of the size of every head).
        exclude: globs of tensor names or module paths whose channels stay.
        steps: rounds of scoring and removing until the share is gone.
        min_channels: how many channels every group keeps at least.
        round_to: what a group keeps is rounded up to a multiple of this.
        max_ratio: the largest share that a global ranking or a budget takes of one group.
        save_plan: a file for what was removed, as JSON that ``apply-plan`` reads; counted from
            the unpruned program where the program was pruned before.

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
    of: str = "channels"
    criterion: str = "l1"
    aggregate: str = "mean"
    normalise: str = "mean"
    ranking: str = "layer"
    ratios: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    attention: str = "heads"
    exclude: tuple[str, ...] = ()
    steps: int = 1
    min_channels: int = 1
    round_to: int = 1
    max_ratio: float = 0.9
    save_plan: str = ""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        try:
            parse_ratios(self.ratios)
        except UsageError as error:
            raise self._bad(str(error)) from None

    def _check_names(self) -> None:
        known = {
            "of": OF, "criterion": CRITERIA, "aggregate": AGGREGATIONS,
            "normalise": NORMALISATIONS, "ranking": RANKINGS, "attention": ATTENTION,
        }  # fmt: skip
        for option, names in known.items():
            if getattr(self, option) not in names:
                raise self._bad(unknown(option, getattr(self, option), names))
        for kind in self.kinds:
            if not kind_names(kind):
                raise self._bad(f"kinds: {unknown('kind', kind, (*KINDS, TRANSFORMER_NAME))}")

    def _check_numbers(self) -> None:
        if not 0 <= self.ratio < 1:
            raise self._bad(f"ratio must be in [0, 1), not {self.ratio}")
        if not 0 < self.max_ratio <= 1:
            raise self._bad(f"max_ratio must be in (0, 1], not {self.max_ratio}")
        for option in ("round_to", "min_channels", "steps"):
            if getattr(self, option) < 1:
                raise self._bad(f"{option} must be at least 1, not {getattr(self, option)}")
        if self.ranking == "sensitivity" and self.steps > 1:
            raise self._bad("ranking=sensitivity measures the unpruned program; it takes steps=1")
        if self.ranking != "layer" and self.of == "channels" and self.ratio > self.max_ratio:
            raise self._bad(
                f"a {self.ranking} ratio of {self.ratio} is more than max_ratio={self.max_ratio} "
                "allows of every group; raise max_ratio"
            )

    def _bad(self, message: str) -> UsageError:
        return UsageError(f"{self.name}: {message}")

    @property
    def depends_on_target(self) -> bool:
        """Only latency is measured on the target."""
        return self.of == "latency"

    def rewrite(self, rw: Rewrite) -> None:
        """Analyse, rank, select, remove, promise."""
        coupling = couple(rw.program, self.attention)
        readers = _readers(rw.program.graph)
        candidates = self._candidates(rw, coupling, readers)
        gone = self._selected(rw, coupling, candidates)
        plan = coupling.plan(np.flatnonzero(gone))
        if not plan:
            return
        for candidate in candidates:
            count = int(gone[candidate.group.units].sum())
            if count:
                rw.applied(readers[_producer(candidate.group)], _what_went(candidate, count))
        origin = origin_of(rw.before, plan)
        remove_units(rw, coupling, gone)
        rw.promise(MaskedOracle(plan.removed))
        rw.set_origin(origin)
        if self.save_plan:
            save(origin, Path(self.save_plan))

    # -- which groups --------------------------------------------------------------------------

    def _candidates(
        self, rw: Rewrite, coupling: Coupling, readers: dict[str, fx.Node]
    ) -> list[Candidate]:
        """The groups that may lose channels; remarks say why the others may not."""
        ratios = parse_ratios(self.ratios)
        self._check_globs(rw.program, [name for name, _ in ratios])
        kept = []
        refused = {id(group): why for group, why in self._free(rw.program, coupling)}
        for group, kind in zip(coupling.groups, kinds_of(rw.program, coupling), strict=True):
            produced = [m.tensor for m in group.members if m.produced]
            if not produced or not all(rw.in_scope(readers[name]) for name in produced):
                continue
            ratio = own_ratio(group, kind, ratios)
            if why := self._why_not(group, kind) or refused[id(group)]:
                count, what = len(group.units), "channels" if group.reason else _noun(kind)
                rw.skip(readers[produced[0]], f"the {count} {what} of {group.name} stay: {why}")
            else:
                kept.append(Candidate(group, kind, ratio))
        return kept

    def _free(self, program: Program, coupling: Coupling) -> list[tuple[Group, str]]:
        """The groups that may go, each with why the criterion cannot score it; mostly empty."""
        groups = [
            group
            for group in coupling.groups
            if group.reason is None and any(member.produced for member in group.members)
        ]
        return list(
            zip(groups, refusals(program, coupling, groups, self.criterion), strict=True)
        )

    def _check_globs(self, program: Program, names: Sequence[str]) -> None:
        """Refuse a glob that means nothing in the program: it was written for something."""
        globs = [("ratios", n) for n in names if not kind_names(n)]
        globs += [("exclude", glob) for glob in self.exclude]
        if not globs:
            return
        tensors = list(program.tensors())
        paths = {module_path(node) for node in program.calls()}
        for option, glob in globs:
            if not any(names_tensor(glob, name) for name in tensors) and not any(
                names_tensor(glob, f"{path}.") for path in paths
            ):
                raise self._bad(
                    f"{option}: {glob!r} is the name of no tensor or module; the tensors are "
                    f"called {', '.join(tensors[:3])}..."
                )

    def _why_not(self, group: Group, kind: str) -> str:
        if group.reason is not None:
            return str(group.reason)
        if len(group.units) == 1:
            return "all of them are coupled with one another"
        if self.kinds and not any(kind in kind_names(name) for name in self.kinds):
            return f"kinds={','.join(self.kinds)} leaves {kind} out"
        for member in group.members:
            for glob in self.exclude:
                if names_tensor(glob, member.tensor):
                    return f"{member.tensor} is excluded by {glob!r}"
        return ""

    # -- how many of them ----------------------------------------------------------------------

    def _selected(
        self, rw: Rewrite, coupling: Coupling, candidates: list[Candidate]
    ) -> Mask:
        """Per unit, whether it goes after all rounds."""
        gone = np.zeros(len(coupling.solved.frozen), np.bool_)
        if not candidates and self.of == "channels":
            return gone
        limits = Limits(self.ranking, self.min_channels, self.round_to, self.max_ratio)
        capped = self.of != "channels" or self.ranking != "layer"
        try:
            with budget(self.of, rw, coupling) as costs:
                for step in range(1, self.steps + 1):
                    if self.steps > 1:
                        rw.context.progress(f"{self.name} round", step, self.steps)
                    part = step / self.steps
                    scored = self._scores(rw, coupling, candidates, gone)
                    if self.ranking == "sensitivity":
                        scored = self._sensitivities(rw, coupling, candidates, scored)
                    selector = Selector(coupling, candidates, scored, limits, capped, part)
                    gone = costs.reach(selector, part * self.ratio, gone)
                if told := costs.told(gone):
                    rw.note(rw.graph.output_node(), f"{told} ({self.ratio:.1%} asked)")
        except UsageError as error:
            raise self._bad(str(error)) from error
        return gone

    def _scores(
        self, rw: Rewrite, coupling: Coupling, candidates: list[Candidate], gone: Mask
    ) -> list[Scores]:
        """The scores of every candidate's units in the program as it is after earlier rounds."""
        groups = [candidate.group for candidate in candidates]
        if not gone.any():
            return self._scored(rw, rw.program, coupling, groups)
        smaller = without(rw, coupling, gone)
        again = couple(smaller, self.attention)
        groups_left = [group for group, why in self._free(smaller, again) if not why]
        each = np.full(len(again.solved.frozen), np.nan)
        found = self._scored(rw, smaller, again, groups_left)
        for group, values in zip(groups_left, found, strict=True):
            each[group.units] = values
        units = carried_back(coupling, again, gone, each)
        return [units[group.units] for group in groups]

    def _sensitivities(
        self, rw: Rewrite, coupling: Coupling, candidates: list[Candidate], orders: list[Scores]
    ) -> list[Scores]:
        """What each channel's removal adds to the error of the outputs, per cost that it saves."""
        groups = [candidate.group for candidate in candidates]
        # Latency is too costly to measure for every group; FLOPs stand in for it.
        counted = Counted(rw.program, coupling, self.of if self.of in COUNTED else "flops")

        def removed(gone: Mask) -> float:
            return float(gone.mean()) if self.of == "channels" else counted.removed(gone)

        return sensitivities(
            Candidates(rw.program, coupling, groups, rw.context),
            orders,
            removed,
            lambda gone: without(rw, coupling, gone),
        )

    def _scored(
        self, rw: Rewrite, program: Program, coupling: Coupling, groups: Sequence[Group]
    ) -> list[Scores]:
        return scores(
            program, coupling, groups, self.criterion, context=rw.context,
            aggregate=self.aggregate, normalise=self.normalise,
        )  # fmt: skip


def _noun(kind: str) -> str:
    return HEADS if kind == HEADS else f"{kind} channels"


def _producer(group: Group) -> str:
    return next(member.tensor for member in group.members if member.produced)


def _readers(graph: fx.Graph) -> dict[str, fx.Node]:
    """The first node that reads each tensor."""
    readers: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        for user in node.users:
            readers.setdefault(str(node.target), user)
    return readers


def _what_went(candidate: Candidate, count: int) -> str:
    members = candidate.group.members
    shown = [f"{member.tensor}[{member.dim}]" for member in members[:4]]
    more = f" and {len(members) - 4} more" if len(members) > 4 else ""
    return (
        f"removed {count} of {candidate.size} {_noun(candidate.kind)} from "
        f"{', '.join(shown)}{more}"
    )

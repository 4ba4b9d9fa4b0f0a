"""Selection: which units go, as a function of how much is asked.

    layer    every group loses the share, floor(share * units) of its weakest
    global   the weakest of all groups together go, floor(share * all units) of them
    sensitivity  the same, by the measured error per cost of each place in a group's order
             (`pruna_ir.passes.sensitivity`)

What is asked never shrinks a group below ``min_channels``; under a global ranking or a budget no
group loses more than the share ``max_ratio`` of itself, so that no layer collapses. What a group
keeps is then rounded up so that its tensors keep multiples of ``round_to`` indices, where the
group can: a head of 64 indices is one unit, and any number of them is a multiple of 32. Last, a
dimension of which nothing would be left gets its strongest unit back.

Selections are nested: more asked takes what less asked took, and more. A budget can thus be found
by bisection (`reach`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from pruna_ir.coupling import Coupling, Group
from pruna_ir.coupling.kinds import KINDS, TRANSFORMER
from pruna_ir.errors import UsageError

Scores = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

RANKINGS = ("layer", "global", "sensitivity")
TRANSFORMER_NAME = "transformer"
BISECTIONS = 24


@dataclass(frozen=True, eq=False)
class Candidate:
    """A group that may lose units.

    Attributes:
        group: the group.
        kind: one of `pruna_ir.coupling.kinds.KINDS`.
        ratio: a share of its own; None where it follows the common one.
    """

    group: Group
    kind: str
    ratio: float | None = None

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.group.units)

    def multiple(self, round_to: int) -> int:
        """The smallest m such that m units are a multiple of ``round_to`` indices everywhere."""
        counts = [m.indices.shape[1] for m in self.group.members if m.produced]
        return round_to // math.gcd(round_to, *counts)


@dataclass(frozen=True)
class Limits:
    """What a selection obeys; see the module's text."""

    ranking: str = "layer"
    min_channels: int = 1
    round_to: int = 1
    max_ratio: float = 1.0


@dataclass(frozen=True, eq=False)
class Selector:
    """The units that go, for every share that may be asked.

    Attributes:
        coupling: the analysis of the program.
        candidates: the groups that may lose units.
        scores: the importance of each candidate's units; -inf for those that are gone already.
        limits: what is obeyed.
        capped: whether ``max_ratio`` holds for groups without a ratio of their own.
        own: which part of the candidates' own ratios is taken; less than 1 in early rounds.
    """

    coupling: Coupling
    candidates: Sequence[Candidate]
    scores: Sequence[Scores]
    limits: Limits
    capped: bool
    own: float = 1.0

    def at(self, share: float) -> Mask:
        """Per unit of the program, whether it goes where this share is asked.

        Args:
            share: of the units, in [0, 1].
        """
        gone = np.zeros(len(self.coupling.solved.frozen), np.bool_)
        counts = self._counts(share)
        for candidate, score, count in zip(self.candidates, self.scores, counts, strict=True):
            weakest = np.argsort(score, kind="stable")[: self._allowed(candidate, count)]
            gone[candidate.group.units[weakest]] = True
        self._keep_something(gone)
        return gone

    def between(self, few: Mask, many: Mask) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The units of ``many`` that ``few`` keeps, in the smallest parts that can go by
        themselves, the weakest first."""
        parts: list[tuple[float, int, np.ndarray[Any, np.dtype[np.int64]]]] = []
        for candidate, score in zip(self.candidates, self.scores, strict=True):
            units = candidate.group.units
            order = np.argsort(score, kind="stable")
            order = order[many[units[order]] & ~few[units[order]]]
            size = candidate.multiple(self.limits.round_to)
            # The first part makes up for what the number of units is no multiple by.
            first = len(order) % size
            for part in np.split(order, range(first, len(order), size)):
                if len(part):
                    parts.append((float(score[part].max()), len(parts), units[part]))
        return [units for _, _, units in sorted(parts, key=lambda part: part[:2])]

    def _counts(self, share: float) -> list[int]:
        """How many units of each candidate the ranking asks for."""
        if self.limits.ranking == "layer":
            wanted = [floor_share(share, candidate.size) for candidate in self.candidates]
            counts = [
                min(count, self._most(candidate))
                for count, candidate in zip(wanted, self.candidates, strict=True)
            ]
        else:
            counts = self._weakest_of_all(share)
        return [
            count if c.ratio is None else floor_share(self.own * c.ratio, c.size)
            for count, c in zip(counts, self.candidates, strict=True)
        ]

    def _weakest_of_all(self, share: float) -> list[int]:
        free = [k for k, c in enumerate(self.candidates) if c.ratio is None]
        counts = [0] * len(self.candidates)
        if not free:
            return counts
        total = sum(self.candidates[k].size for k in free)
        # The strongest of each group are out of the running: they stay whatever is asked.
        weak = [np.sort(self.scores[k])[: self._most(self.candidates[k])] for k in free]
        owner = np.repeat(free, [len(scores) for scores in weak])
        order = np.argsort(np.concatenate(weak), kind="stable")[: floor_share(share, total)]
        return [int(count) for count in np.bincount(owner[order], minlength=len(counts))]

    def _most(self, candidate: Candidate) -> int:
        share = self.limits.max_ratio if self.capped else 1.0
        return floor_share(share, candidate.size)

    def _allowed(self, candidate: Candidate, count: int) -> int:
        """The number that may go so that what stays obeys the limits."""
        multiple = candidate.multiple(self.limits.round_to)
        kept = max(candidate.size - count, self.limits.min_channels)
        return max(candidate.size - -(-kept // multiple) * multiple, 0)

    def _keep_something(self, gone: Mask) -> None:
        """Take back the strongest unit of each dimension that would be left empty."""
        empty = self.coupling.emptied(gone)
        if not empty:
            return
        score = np.full(len(gone), -math.inf)
        for candidate, values in zip(self.candidates, self.scores, strict=True):
            score[candidate.group.units] = values
        for _, units in empty:
            if gone[units].all():
                gone[units[np.argmax(score[units])]] = False


def floor_share(share: float, size: int) -> int:
    """``share * size``, rounded down; 0.3 of 10 is 3 in spite of binary fractions.

    >>> floor_share(0.3, 10), floor_share(0.5, 3)
    (3, 1)
    """
    return math.floor(share * size + 1e-9)


def reach(
    selector: Selector, removed: Callable[[Mask], float], wanted: float, gone: Mask | None = None
) -> Mask | None:
    """The smallest selection of which ``removed`` is at least ``wanted``; None where none is.

    Taking one unit less (or the fewest that ``round_to`` allows) would miss it.

    Args:
        selector: the selections to choose from.
        removed: the share of the cost that a selection removes; it grows with the selection.
        wanted: the share that must go.
        gone: what must be part of it, in any case.
    """

    def at(share: float) -> Mask:
        return selector.at(share) if gone is None else selector.at(share) | gone

    few, many = at(0.0), at(1.0)
    if removed(few) >= wanted:
        return few
    if removed(many) < wanted:
        return None
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = at((low + high) / 2)
        if removed(middle) >= wanted:
            high, many = (low + high) / 2, middle
        else:
            low, few = (low + high) / 2, middle
    parts = selector.between(few, many)
    if not parts:
        return many
    return _fewest(few, many, parts, removed, wanted)


def _fewest(
    few: Mask,
    many: Mask,
    parts: Sequence[np.ndarray[Any, np.dtype[np.int64]]],
    removed: Callable[[Mask], float],
    wanted: float,
) -> Mask:
    """``few`` and as many of the parts, in their order, as it takes."""

    def with_first(number: int) -> Mask:
        mask = few.copy()
        mask[np.concatenate(parts[:number])] = True
        return mask & many

    low, high = 0, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        if removed(with_first(middle)) >= wanted:
            high = middle
        else:
            low = middle
    return with_first(high)


# -- which groups ----------------------------------------------------------------------------


def kind_names(name: str) -> tuple[str, ...]:
    """The kinds that a name stands for: itself, or the four of ``transformer``; empty for none."""
    if name == TRANSFORMER_NAME:
        return TRANSFORMER
    return (name,) if name in KINDS else ()


def names_tensor(glob: str, tensor: str) -> bool:
    """Whether a glob matches a tensor's name or the path of its module."""
    return fnmatchcase(tensor, glob) or fnmatchcase(tensor.rpartition(".")[0], glob)


def parse_ratios(ratios: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """``("conv=0.4", "layer4.*=0.2")`` as pairs.

    Raises:
        UsageError: an entry has another form, or its ratio is not in [0, 1).
    """
    found = []
    for entry in ratios:
        name, equals, number = entry.rpartition("=")
        try:
            ratio = float(number)
        except ValueError:
            ratio = math.nan
        if not (equals and name.strip()) or not 0 <= ratio < 1:
            raise UsageError(
                f"an entry of ratios is KIND=RATIO or GLOB=RATIO with a ratio in [0, 1), such as "
                f'"conv=0.4" or "layer4.*=0.2", not {entry!r}'
            )
        found.append((name.strip(), ratio))
    return tuple(found)


def own_ratio(
    group: Group, kind: str, ratios: Sequence[tuple[str, float]]
) -> float | None:
    """The ratio of the last entry that matches a group; None where none does.

    A glob is held against the tensors that produce the group's channels.
    """
    produced = [member.tensor for member in group.members if member.produced]
    ratio = None
    for name, value in ratios:
        kinds = kind_names(name)
        if kind in kinds or (
            not kinds and any(names_tensor(name, tensor) for tensor in produced)
        ):
            ratio = value
    return ratio

"""Plans in passes: removal on the side, composition with earlier pruning, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pruna_ir.coupling import Coupling, RemovalPlan
from pruna_ir.coupling.removal import remove_units
from pruna_ir.coupling.value import Ids
from pruna_ir.errors import UsageError
from pruna_ir.passes.selection import Mask, Scores
from pruna_ir.program import Origin, Program
from pruna_ir.serialize import whole_file
from pruna_ir.transform import Rewrite


def without(rw: Rewrite, coupling: Coupling, gone: Mask) -> Program:
    """The program under rewrite without some units, on the side: ``rw`` stays as it is.

    Args:
        rw: a rewrite that has not edited anything yet.
        coupling: the analysis of its program.
        gone: per unit, whether it is removed.
    """
    side = Rewrite(rw.before, "remove", rw.context)
    remove_units(side, coupling, gone)
    return side.finish()


def origin_of(before: Program, plan: RemovalPlan) -> Origin:
    """What a program is pruned from when a plan is applied to it: the first unpruned program.

    Args:
        before: the program that loses what the plan names; its own origin, where it has one, is
            the program to count from.
        plan: numbered as in ``before``.
    """
    first = before.origin
    if first is None or not set(plan.removed) <= set(first.program.tensors()):
        return Origin(before, plan.removed)
    earlier = RemovalPlan(
        {
            name: {dim: tuple(indices) for dim, indices in dims.items()}
            for name, dims in first.removed.items()
        }
    )
    return Origin(first.program, earlier.then(plan, shapes_of(first.program)).removed)


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in program.tensors().items()}


def save(origin: Origin, path: Path) -> None:
    """Write what was removed from a program as JSON, whole or not at all.

    Raises:
        LoweringError: the file cannot be written.
    """
    plan = RemovalPlan({n: {d: tuple(i) for d, i in v.items()} for n, v in origin.removed.items()})
    with whole_file(path) as file:
        file.write(plan.with_shapes(shapes_of(origin.program)).to_json().encode())


def read(path: Path) -> RemovalPlan:
    """A plan from a file.

    Raises:
        UsageError: the file cannot be read, or is no plan.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"the plan {path} cannot be read: {error}") from error
    try:
        return RemovalPlan.from_json(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def carried_back(before: Coupling, after: Coupling, gone: Mask, scores: Scores) -> Scores:
    """Scores of the units of a pruned program, for the units of the unpruned one.

    A unit's score is the mean of those of the units that stand at its places now; -inf for units
    that are gone, +inf for those that the pruned program must keep.

    Args:
        before: the coupling of the unpruned program.
        after: that of the pruned one.
        gone: per unit of ``before``, whether it was removed.
        scores: per unit of ``after``; NaN for none.
    """
    old, new = _same_places(before, after, gone)
    known = ~np.isnan(scores[new])
    old, new = old[known], new[known]
    count = np.bincount(old, minlength=len(gone))
    total = np.bincount(old, weights=scores[new], minlength=len(gone))
    result = np.where(count > 0, total / np.maximum(count, 1), np.inf)
    result[gone] = -np.inf
    return result


def _same_places(before: Coupling, after: Coupling, gone: Mask) -> tuple[Ids, Ids]:
    """Every pair (old unit, new unit) that have a place in a tensor in common, once."""
    pairs = [np.zeros((0, 2), np.int64)]
    for name, dims in before.tensors.items():
        for old_ids, new_ids in zip(dims, after.tensors.get(name, ()), strict=False):
            if old_ids is None or new_ids is None:
                continue
            old = before.solved.unit[old_ids]
            pairs.append(np.stack([old[~gone[old]], after.solved.unit[new_ids]], axis=1))
    unique = np.unique(np.concatenate(pairs), axis=0)
    return unique[:, 0], unique[:, 1]

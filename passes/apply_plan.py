"""apply-plan: remove what a saved plan names.

A plan is what ``prune-channels{save_plan=...}`` wrote, or any JSON in the form of
`pruna_ir.coupling.plan`, perhaps edited by hand. It is held against the program before anything is
removed: the tensors that it names must have the shapes that it was made for, every channel must go
with all that is coupled to it, and nothing may go that must stay.

A plan takes whole heads, query heads or the size of heads, in all of the program alike; plans of
several kinds are applied one after another.

With ``complete`` the plan may name a channel anywhere, in one tensor: all that is coupled to it
goes too. Taking a channel out of such a plan means taking it out of every tensor that names it.

Promise: as for prune-channels, the unpruned program with the removed channels dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from pruna_ir.coupling import ATTENTION, Coupling, RemovalPlan, couple, remove
from pruna_ir.coupling.removal import removed_units
from pruna_ir.errors import UsageError
from pruna_ir.masked_reference import MaskedOracle
from pruna_ir.passes.removal_plans import origin_of, read, shapes_of
from pruna_ir.passes.selection import Mask
from pruna_ir.program import Program
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class ApplyPlan(Pass):
    """Remove what a plan names, in a file or as JSON itself.

    Attributes:
        plan: the file of the plan (or its JSON text, which starts with a brace).
        complete: let go with each named channel whatever is coupled to it, named or not.

    Raises:
        UsageError: there is no plan, it is for another model, or it breaks a coupling.

    >>> import torch
    >>> from pruna_ir import apply, capture
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> plan = RemovalPlan({"0.bias": {0: (1,)}})
    >>> program = capture(model, (torch.zeros(2, 3),))
    >>> small = apply(ApplyPlan(plan.to_json(), complete=True), program).program
    >>> [list(tensor.shape) for tensor in small.tensors().values()]
    [[3, 3], [3], [2, 3], [2]]
    """

    name: ClassVar[str] = "apply-plan"
    effect: ClassVar[Effect] = Effect.ORACLE

    plan: str
    complete: bool = False

    def __post_init__(self) -> None:
        if not self.plan:
            raise UsageError(f"{self.name}: plan must be the file of a plan")

    def rewrite(self, rw: Rewrite) -> None:
        """Read, compare, remove, promise."""
        try:
            plan = self._plan()
            plan.check(shapes_of(rw.program))
            coupling = couple(rw.program) if self.complete else _coupled(rw.program, plan)
            if self.complete:
                plan = coupling.plan(_units(coupling, plan))
            if not plan:
                return
            _tell(rw, coupling, removed_units(coupling, plan))
            origin = origin_of(rw.before, plan)
            remove(rw, coupling, plan)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error
        rw.promise(MaskedOracle(plan.removed))
        rw.set_origin(origin)

    def _plan(self) -> RemovalPlan:
        if self.plan.lstrip().startswith("{"):
            return RemovalPlan.from_json(self.plan)
        return read(Path(self.plan))


def _coupled(program: Program, plan: RemovalPlan) -> Coupling:
    """The analysis at the granularity of attention at which the plan takes whole units.

    Where it does so at none, the first, which then tells what must go together.
    """
    couplings = (couple(program, attention) for attention in ATTENTION)
    return next((c for c in couplings if _takes_whole_units(c, plan)), couple(program))


def _takes_whole_units(coupling: Coupling, plan: RemovalPlan) -> bool:
    try:
        removed_units(coupling, plan)
    except UsageError:
        return False
    return True


def _tell(rw: Rewrite, coupling: Coupling, gone: Mask) -> None:
    """A remark a group that loses something, at the first layer that produces its channels."""
    readers = {str(node.target): node for node in rw.graph.find_nodes(op="get_attr")}
    for group in coupling.groups:
        if count := int(gone[group.units].sum()):
            made = next((m for m in group.members if m.produced), group.members[0])
            reader = next(iter(readers[made.tensor].users))
            rw.applied(reader, f"removed {count} of {len(group.units)} channels of {group.name}")


def _units(coupling: Coupling, plan: RemovalPlan) -> list[int]:
    """The units that a plan names anywhere."""
    found: set[int] = set()
    for name, dim, indices in plan.items():
        dims = coupling.tensors.get(name)
        ids = dims[dim] if dims is not None else None
        if ids is None:
            if indices:
                raise UsageError(f"dimension {dim} of {name} has no channels to remove")
            continue
        units = coupling.solved.unit[ids[list(indices)]]
        if (stays := coupling.solved.frozen[units]).any():
            first = int(units[np.flatnonzero(stays)[0]])
            reason = int(coupling.solved.reason[first])
            why = str(coupling.solved.reasons[reason]) if reason >= 0 else "an extent of a weight"
            raise UsageError(f"the plan removes channels of {name} that must stay: {why}")
        found.update(units.tolist())
    return sorted(found)

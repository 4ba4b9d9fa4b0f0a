"""A pruning pass for tests of what comes after pruning: it removes the channels it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruna_ir.coupling import couple, remove
from pruna_ir.masked_reference import MaskedOracle
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Origin, Program
from pruna_ir.transform import Effect, Pass, Rewrite, apply


@dataclass(frozen=True)
class Cut(Pass):
    """Remove indices of dimension 0 of a tensor, and everything coupled with them."""

    name: ClassVar[str] = "cut"
    effect: ClassVar[Effect] = Effect.ORACLE
    tensor: str = ""
    indices: tuple[int, ...] = ()

    def rewrite(self, rw: Rewrite) -> None:
        coupling = couple(rw.program)
        ids = coupling.tensors[self.tensor][0]
        plan = coupling.plan(coupling.solved.unit[ids[list(self.indices)]])
        remove(rw, coupling, plan)
        rw.promise(MaskedOracle(plan.removed))
        before = rw.before.origin
        removed = dict(plan.removed)
        if before is not None:
            assert not set(removed) & set(before.removed), "cut what was cut already"
            removed |= before.removed
        rw.set_origin(Origin(before.program if before is not None else rw.before, removed))


def cut(program: Program, **tensors: tuple[int, ...]) -> Program:
    """The canonical program without some channels, with its origin; ``__`` stands for a dot."""
    program = apply(Canonicalize(), program).program
    for name, indices in tensors.items():
        program = apply(Cut(name.replace("__", "."), indices), program).program
    return program

"""A pruning pass for tests of what comes after pruning: it removes the channels it is told to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pruna_ir.coupling import couple, remove
from pruna_ir.masked_reference import MaskedOracle
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Origin, Program
from pruna_ir.transform import Effect, Pass, Rewrite, apply


@dataclass(frozen=True)
class Cut(Pass):
    """Remove indices of dimension 0 of some tensors, and everything coupled with them."""

    name: ClassVar[str] = "cut"
    effect: ClassVar[Effect] = Effect.ORACLE
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def rewrite(self, rw: Rewrite) -> None:
        coupling = couple(rw.program)
        units = [
            coupling.solved.unit[coupling.tensors[name][0][list(indices)]]
            for name, indices in self.tensors
        ]
        plan = coupling.plan(np.concatenate(units))
        remove(rw, coupling, plan)
        rw.promise(MaskedOracle(plan.removed))
        rw.set_origin(Origin(rw.before, plan.removed))


def cut(program: Program, **tensors: tuple[int, ...]) -> Program:
    """The canonical program without some channels, with its origin; ``__`` stands for a dot."""
    program = apply(Canonicalize(), program).program
    pass_ = Cut(tuple((name.replace("__", "."), indices) for name, indices in tensors.items()))
    return apply(pass_, program).program


def lost_nothing(program: Program) -> Program:
    """The canonical program, as though it had been pruned by nothing."""
    program = apply(Canonicalize(), program).program
    return replace(program, origin=Origin(program, {}))

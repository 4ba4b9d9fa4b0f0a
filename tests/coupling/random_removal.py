"""Random units out of the free groups of a network, for property tests of pruning."""

from __future__ import annotations

import numpy as np

from pruna_ir import capture
from pruna_ir.coupling import couple, remove
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.transform import Context, Rewrite, apply


def program_of(network):
    """The canonical program of a random network."""
    return apply(Canonicalize(), capture(network, network.inputs(2))).program


def some_units(coupling, share, seed):
    """Per unit, whether it goes: a random share of every free group, with nothing left empty."""
    rng = np.random.default_rng(seed)
    gone = np.zeros(len(coupling.solved.frozen), np.bool_)
    for group in coupling.groups:
        if group.reason is None:
            gone[rng.permutation(group.units)[: int(share * len(group.units))]] = True
    for _, units in coupling.emptied(gone):
        if gone[units].all():
            gone[units[0]] = False
    return gone


def applied(program, plan):
    """The program without what a plan names."""
    rw = Rewrite(program, "remove", Context())
    remove(rw, couple(program), plan)
    return rw.finish()


def pruned(program, share, seed):
    """The program without a random share of its units, and the plan."""
    coupling = couple(program)
    plan = coupling.plan(np.flatnonzero(some_units(coupling, share, seed)))
    return applied(program, plan), plan

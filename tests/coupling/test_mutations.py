"""The control of the proof: a mutation of any single rule of the table is caught.

Each mutated rule runs on a network that hangs on it. It is caught where the analysis, the removal
or the verifier refuses, or where the oracle disagrees with what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from pruna_ir import verify
from pruna_ir.coupling.links import Links
from pruna_ir.coupling.rule import Edit, Result, Rule, Site
from pruna_ir.coupling.rules_elementwise import ELEMENTWISE
from pruna_ir.coupling.table import RULES
from pruna_ir.coupling.value import Block, Ids, Value
from pruna_ir.errors import PrunaError
from pruna_ir.program import Program
from tests.coupling.catalogue import operators
from tests.coupling.chains import RESIZED, Chain, network_of
from tests.coupling.random_networks import Form, Network
from tests.coupling.test_random_networks import TOLERANCE, program_of, pruned, worst_error

POINTWISE = ("aten::add", "aten::mul", "aten::relu")
"""Operators without an entry of their own, by torch's pointwise tag."""


class Deaf(Links):
    """Links that hand out ids and hear nothing else."""

    def __init__(self, real: Links) -> None:
        super().__init__(real.attention)
        self.real = real

    def fresh(self, *shape: int) -> Ids:
        return self.real.fresh(*shape)

    def fresh_soft(self, size: int) -> Ids:
        return self.real.fresh_soft(size)

    def is_soft(self, ids: Ids) -> bool:
        return self.real.is_soft(ids)

    def rows(self, ids: Ids) -> None:
        self.real.rows(ids)

    def solve(self):
        raise AssertionError("only the real links are solved")


def _renumbered(result: Result, change: Callable[[Ids], Ids]) -> Result:
    """The result with other ids."""
    values = result if isinstance(result, tuple) else (result,)
    wrong = tuple(
        Value(v.dims, tuple(Block(b.factors, change(b.ids)) for b in v.blocks)) for v in values
    )
    return wrong if isinstance(result, tuple) else wrong[0]


def rolled(rule: Rule) -> Rule:
    """The ids of the result off by one along their first axis."""
    return replace(
        rule, couple=lambda site: _renumbered(rule.couple(site), lambda ids: np.roll(ids, 1, 0))
    )


def reversed_ids(rule: Rule) -> Rule:
    """The ids of the result in reversed order along their last axis."""
    return replace(
        rule, couple=lambda site: _renumbered(rule.couple(site), lambda ids: np.flip(ids, -1))
    )


def unlinked(rule: Rule) -> Rule:
    """Nothing that the rule says of ids is heard."""

    def couple(site: Site) -> Result:
        algebra = replace(site.algebra, links=Deaf(site.links))
        return rule.couple(replace(site, algebra=algebra))

    return replace(rule, couple=couple)


def forgotten(rule: Rule) -> Rule:
    """The result has channels of its own, which nothing ties to the operands'."""

    def couple(site: Site) -> Result:
        result = rule.couple(site)
        return _renumbered(result, lambda ids: site.links.fresh(*ids.shape))

    return replace(rule, couple=couple)


def unresized(rule: Rule) -> Rule:
    """Literal arguments stay as they were."""
    return replace(rule, resize=None)


def miscounted(rule: Rule) -> Rule:
    """Literal arguments are resized as if everything stayed but the first id of each block."""

    def resize(edit: Edit) -> None:
        assert rule.resize is not None
        rule.resize(replace(edit, alive=np.roll(edit.alive, 1)))

    return replace(rule, resize=resize)


MUTATIONS = (rolled, reversed_ids, unlinked, forgotten, unresized, miscounted)


def mutants(name: str) -> Iterator[tuple[str, Rule]]:
    """The mutations that can change a rule at all."""
    rule = RULES.get(name, ELEMENTWISE)
    for mutate in MUTATIONS:
        if rule.resize is not None or mutate not in (unresized, miscounted):
            yield mutate.__name__, mutate(rule)


def caught(program: Program) -> bool:
    """Whether the check notices that a rule is wrong."""
    try:
        for share, which in ((0.5, 0), (0.2, 1), (0.5, 2)):
            small, plan = pruned(program, share, which)
            verify(small)
            if not worst_error(program, small, plan) < 1e3 * TOLERANCE:
                return True
    except (PrunaError, AssertionError, ValueError, IndexError, KeyError):
        return True
    return False


def captured(name: str, network: Network | Chain) -> Program:
    program = program_of(network, Form(canonical=False))
    assert name in operators(program)
    return program


def holds(program: Program) -> None:
    """The right rules pass, and something goes."""
    small, plan = pruned(program, 0.5, 0)
    verify(small)
    assert plan
    assert worst_error(program, small, plan) < TOLERANCE


@pytest.mark.parametrize("name", [*sorted(RULES), *POINTWISE])
def test_a_mutated_rule_is_caught(monkeypatch, name):
    program = captured(name, network_of(name))
    holds(program)
    survived = []
    for mutation, mutant in mutants(name):
        monkeypatch.setitem(RULES, name, mutant)
        if caught(program):
            return
        survived.append(mutation)
    pytest.fail(f"no mutation of the rule of {name} is caught; tried {', '.join(survived)}")


@pytest.mark.parametrize("name", sorted(n for n, rule in RULES.items() if rule.resize))
def test_literal_arguments_that_stay_are_noticed(monkeypatch, name):
    network = Network(RESIZED[name]) if name in RESIZED else network_of(name)
    program = captured(name, network)
    holds(program)
    monkeypatch.setitem(RULES, name, unresized(RULES[name]))
    assert caught(program)

"""The programs of the catalogue, each layer between two that can be pruned, captured once."""

from __future__ import annotations

from functools import cache

import torch

from pruna_ir.program import Program
from tests.coupling.random_networks import Form, Network, single
from tests.coupling.test_random_networks import program_of


@cache
def program(kind: str, name: str, form: Form) -> Program:
    """The program of one layer."""
    return program_of(Network(single(kind, name)), form)


def operators(given: Program) -> set[str]:
    """The names of its operators, without their overloads."""
    return {
        node.target._schema.name
        for node in given.calls()
        if isinstance(node.target, torch._ops.OpOverload)
    }


def parameters(kind: str, name: str) -> set[str]:
    """The names of the layer's parameters."""
    prefix = "images.1." if kind == "images" else "layers.1."
    named = Network(single(kind, name)).named_parameters()
    return {parameter for parameter, _ in named if parameter.startswith(prefix)}

"""The rule table: ours by operator name, third parties' through the registry."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from pruna_ir.coupling import (
    rules_einsum,
    rules_elementwise,
    rules_layers,
    rules_layout,
    rules_parts,
    rules_patches,
    rules_recurrent,
)
from pruna_ir.coupling.rule import Rule
from pruna_ir.errors import PluginError
from pruna_ir.registry import COUPLING_RULES, entries, find, load

RULES: dict[str, Rule] = {
    **rules_elementwise.RULES,
    **rules_layout.RULES,
    **rules_parts.RULES,
    **rules_layers.RULES,
    **rules_einsum.RULES,
    **rules_recurrent.RULES,
    **rules_patches.RULES,
}
"""Operator name without overload, such as ``aten::conv2d``, to rule."""


def rule_of(target: Any) -> Rule | None:
    """The rule of an operator; None where nobody has one.

    Operators that torch itself tags as pointwise need no entry.

    Raises:
        PluginError: a third party's rule cannot be loaded, or is none.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    if name in RULES:
        return RULES[name]
    if name in _third_party():
        return _load(name)
    if torch.Tag.pointwise in target.tags:
        return rules_elementwise.ELEMENTWISE
    return None


@cache
def _third_party() -> frozenset[str]:
    return frozenset(entry.name for entry in entries(COUPLING_RULES))


def _load(name: str) -> Rule:
    entry = find(COUPLING_RULES, name)
    rule = load(entry)
    if not isinstance(rule, Rule):
        raise PluginError(
            f"coupling rule '{name}' of {entry.distribution} is a {type(rule).__name__}; "
            "register a pruna_ir.coupling.Rule"
        )
    return rule

"""The table of the masked reference: which handler says what an operator makes of dead elements.

An operator reaches the table only where it reads dead elements. Third parties' operators state
their semantics with their coupling rule (its ``masked``), found by name in the registry.
"""

from __future__ import annotations

import torch
from torch import fx

from pruna_ir import masked_layers, masked_layout, masked_statistics
from pruna_ir.masked_operators import Handler, refusal
from pruna_ir.registry import COUPLING_RULES, entries, find, load

HANDLERS: dict[str, Handler] = {
    **masked_layout.HANDLERS,
    **masked_statistics.HANDLERS,
    **masked_layers.HANDLERS,
}
"""Operator name without overload to what it computes where elements are dead."""


def handler_of(node: fx.Node) -> Handler:
    """The handler of a call.

    Raises:
        UnsupportedError: nobody has said what it makes of dead elements.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name
    if name in HANDLERS:
        return HANDLERS[name]
    if name in {entry.name for entry in entries(COUPLING_RULES)}:
        stated = getattr(load(find(COUPLING_RULES, name)), "masked", None)
        if stated == "elementwise":
            return masked_layout.elementwise
        if callable(stated):
            return lambda operands: stated(**operands.arguments)
    if torch.Tag.pointwise in target.tags:
        return masked_layout.elementwise
    raise refusal(node, "reads removed channels, and what it makes of them is not defined")

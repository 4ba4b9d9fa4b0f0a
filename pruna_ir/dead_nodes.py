"""Nodes that may vanish where nobody reads them."""

from __future__ import annotations

import torch
from torch import fx

from pruna_ir.call import bind_arguments


def is_pure(node: fx.Node) -> bool:
    """Whether a node may vanish when nobody reads it: no mutation, no assertion, no randomness."""
    if node.op in ("placeholder", "output"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        if str(node.target).startswith("aten._assert_tensor_metadata"):
            return True
        if torch.Tag.nondeterministic_seeded in node.target.tags and _draws(node):
            return False
        return not node.target._schema.is_mutable and not str(node.target).startswith(
            ("aten._assert", "aten.sym_constrain")
        )
    return True


def _draws(node: fx.Node) -> bool:
    """Whether a random operator draws numbers: dropout does so in training only."""
    bound = bind_arguments(node)
    if bound.get("train") is False or bound.get("training") is False:
        return False
    return bool(bound.get("dropout_p", 1.0))


def remove_dead_nodes(graph: fx.Graph) -> int:
    """Erase pure nodes that nobody reads; returns how many."""
    removed = 0
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
            removed += 1
    return removed

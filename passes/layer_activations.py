"""The activation behind a layer, by the name that fused operators have for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments

aten = torch.ops.aten

PLAIN: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.hardswish.default: "hardswish",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
}
ACTIVATIONS = (*PLAIN, aten.hardtanh.default, aten.leaky_relu.default, aten.gelu.default)
"""The operators that fused ones can end in."""


@dataclass(frozen=True)
class Applied:
    """An activation: its node, name and arguments."""

    node: fx.Node
    name: str
    arguments: tuple[float, ...]


def applied(node: fx.Node) -> Applied:
    """What an operator of `ACTIVATIONS` computes."""
    target: Any = node.target
    if target in PLAIN:
        return Applied(node, PLAIN[target], ())
    bound = bind_arguments(node)
    if target is aten.leaky_relu.default:
        return Applied(node, "leaky_relu", (float(bound["negative_slope"]),))
    if target is aten.gelu.default:
        return Applied(node, "gelu_tanh" if bound["approximate"] == "tanh" else "gelu", ())
    low, high = float(bound["min_val"]), float(bound["max_val"])
    if (low, high) == (0.0, 6.0):
        return Applied(node, "relu6", ())
    return Applied(node, "hardtanh", (low, high))


def activation_behind(node: fx.Node) -> Applied | None:
    """The activation that is the only reader of a node's value."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return applied(reader) if reader is not None and reader.target in ACTIVATIONS else None

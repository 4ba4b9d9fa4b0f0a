"""Regions that ``torch.export`` keeps as submodules, written out in the graph.

Code under ``torch.no_grad()`` or ``torch.autocast(enabled=False)`` inside a model (rotary
embeddings in transformers) is captured as a call of a graph of its own. In a Program there is one
graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pruna_ir.errors import CaptureError
from pruna_ir.program import source_line

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule) -> None:
    """Replace every call of a region's graph by its nodes, nested ones included.

    Raises:
        CaptureError: a region computes under autocast, which changes dtypes by rules of its own.
    """
    while regions := [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and node.target in (_NO_GRAD, _AUTOCAST)
    ]:
        for node in regions:
            _inline(module, node)


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    position = next(i for i, a in enumerate(node.args) if _region(module, a) is not None)
    body = _region(module, node.args[position])
    assert body is not None
    if node.target is _AUTOCAST and _enabled(node.args[:position]):
        where = next((line for n in body.graph.nodes if (line := source_line(n))), node.name)
        raise CaptureError(
            "the model computes a region under torch.autocast; capture it without autocast and "
            f"choose the precision with a pass ({where})"
        )
    prefix = str(node.args[position].target)  # type: ignore[union-attr]
    operands = iter(node.args[position + 1 :])
    copies: dict[fx.Node, Any] = {}
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(operands)
        elif inner.op == "output":
            returned = fx.map_arg(inner.args[0], lambda n: copies[n])
            _replace(module.graph, node, returned)
        else:
            with module.graph.inserting_before(node):
                copies[inner] = module.graph.node_copy(inner, lambda n: copies[n])
            if inner.op == "get_attr":
                copies[inner].target = f"{prefix}.{inner.target}"


def _region(module: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    found: Any = module
    for part in str(argument.target).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, fx.GraphModule) else None


def _enabled(arguments: Any) -> bool:
    """``wrap_with_autocast(device_type, dtype, enabled, cache_enabled, region, ...)``."""
    return bool(arguments[2])


def _replace(graph: fx.Graph, node: fx.Node, returned: Any) -> None:
    """Let the readers of a region's call read what the region returns."""
    values = returned if isinstance(returned, (list, tuple)) else [returned]
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(returned, (list, tuple)):
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(values[index])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(values[0])
    graph.erase_node(node)

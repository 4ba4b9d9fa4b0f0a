"""What stands around an attention: the layers that project its operands, products farther off.

    q = transpose(reshape(linear(x, Wq)))              the layer is a projection of q
    softmax(permute(linear(permute(q @ k)))) @ v       the softmax stands between two products
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

aten = torch.ops.aten

_LAYERS = (aten.linear.default, aten.addmm.default)
_PRODUCTS = (
    aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default,
)  # fmt: skip
_MOVES = (
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default,
    aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unsqueeze.default, aten.squeeze.dim, aten.cat.default,
    operator.getitem,
)  # fmt: skip
_NORMS = (aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim)
_FARTHEST = 40
"""How many nodes are looked at."""


def projections(*operands: fx.Node) -> list[fx.Node]:
    """The layers whose results, moved, scaled, rotated or normalised, an attention reads."""
    found: list[fx.Node] = []
    for operand in operands:
        layers = _reached(operand, _sources, lambda node: node.target in _LAYERS, _passes)
        found += [layer for layer in layers if layer not in found]
    return found


def between_products(softmax: fx.Node, source: fx.Node) -> bool:
    """Whether products stand before and behind a softmax, beyond layers, moves and sums."""
    def through(node: fx.Node) -> bool:
        return _passes(node) or node.target in _LAYERS

    def multiplies(node: fx.Node) -> bool:
        return node.target in _PRODUCTS

    before = _reached(source, _sources, multiplies, through)
    behind = [
        node for user in softmax.users for node in _reached(user, _readers, multiplies, through)
    ]
    return bool(before) and bool(behind)


def _reached(
    start: fx.Node,
    steps: Callable[[fx.Node], Iterable[fx.Node]],
    wanted: Callable[[fx.Node], bool],
    through: Callable[[fx.Node], bool],
) -> list[fx.Node]:
    """The nearest wanted nodes, through nodes that may be passed."""
    found: list[fx.Node] = []
    todo, seen = [start], {start}
    while todo and len(seen) < _FARTHEST:
        node = todo.pop()
        if wanted(node):
            found.append(node)
        elif through(node):
            following = [step for step in steps(node) if step not in seen]
            todo += following
            seen.update(following)
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _readers(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _passes(node: fx.Node) -> bool:
    """Whether a node moves, scales, adds or normalises."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in (*_MOVES, *_NORMS)

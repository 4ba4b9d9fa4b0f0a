"""What stands around an attention: the layers that project its operands, products farther off.

    q = transpose(reshape(linear(x, Wq)))              the layer is a projection of q
    softmax(permute(linear(permute(q @ k)))) @ v       the softmax stands between two products
    q = rotate(norm(linear(x, Wq)))                    norm and rotation stand between
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

from pruna_ir.program import source_line

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
_CACHES = (
    aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default,
)  # fmt: skip
_COMPLEX = (aten.view_as_complex.default, aten.view_as_real.default)
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


def obstacle(node: fx.Node) -> str:
    """What stands between a layer and a node's value, in words; empty where there is no layer.

    The text ends in the layer's name: "a rotary embedding (mul, neg, cat, mul_1, add at net.py:7)
    stands between linear".
    """
    found: dict[fx.Node, bool] = {}
    _leads_to_layer(node, found)
    between = [one for one, leads in found.items() if leads]
    layers = [one.name for one in between if one.target in _LAYERS]
    if not layers:
        return ""
    computing = [one for one in between if one.target not in (*_LAYERS, *_MOVES) or _joins(one)]
    names = ", ".join(one.name for one in computing)
    where = f" at {source_line(node)}" if source_line(node) else ""
    words = _words(computing)
    what = f"{words} ({names}{where})" if words else f"{names}{where}"
    verb = "stand" if " and " in words or (not words and len(computing) > 1) else "stands"
    return f"{what} {verb} between {', '.join(layers)}"


def _leads_to_layer(node: fx.Node, found: dict[fx.Node, bool]) -> bool:
    """Whether a value comes from a layer, noted for all that is passed, sources first."""
    if node in found:
        return found[node]
    if node.target in _LAYERS:
        found[node] = True
        return True
    passed = _passes(node) or node.target in (*_CACHES, *_COMPLEX, aten.stack.default)
    if not passed or len(found) >= _FARTHEST:
        return False
    leads = [_leads_to_layer(source, found) for source in node.all_input_nodes]
    found[node] = any(leads)
    return found[node]


def _joins(node: fx.Node) -> bool:
    return node.target in (aten.cat.default, aten.stack.default)


def _words(nodes: list[fx.Node]) -> str:
    """What some nodes compute, where that has a name; empty where not."""
    targets = {node.target for node in nodes}
    turns = aten.neg.default in targets and any(map(_joins, nodes))
    joined = [source for node in nodes if _joins(node) for source in node.all_input_nodes]
    words = []
    if targets & {*_NORMS, aten.rsqrt.default}:
        words.append("a norm")
    if turns or targets & set(_COMPLEX):
        words.append("a rotary embedding")
    if targets & set(_CACHES) or any(source.op == "placeholder" for source in joined):
        words.append("a cache")
    return " and ".join(words)


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

"""What attention is made of: products in each of their spellings, and the scores between them.

A product is ``matmul``, ``bmm``, ``baddbmm`` or ``einsum`` of two operands; each operand is
told as a node and the order in which its dimensions are read, so that

    product[..., i, j] = sum over c of left[..., i, c] * right[..., j, c]

whatever transposes the model wrote. Scores are a product, scaled by numbers, with masks added or
filled in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default)

_PRODUCTS = (
    aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default,
)  # fmt: skip


@dataclass(frozen=True)
class Turned:
    """A node's value with its dimensions in another order."""

    node: fx.Node
    order: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product; ``result`` is the order of [..., rows, columns] in the node's value."""

    node: fx.Node
    left: Turned  # [..., rows, common]
    right: Turned  # [..., columns, common]
    result: tuple[int, ...]


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _as_it_is(node: fx.Node) -> Turned:
    return Turned(node, tuple(range(_rank(node))))


def _swapped(node: fx.Node) -> Turned:
    rank = _rank(node)
    return Turned(node, (*range(rank - 2), rank - 1, rank - 2))


def is_identity(order: tuple[int, ...]) -> bool:
    """Whether an order of dimensions changes nothing."""
    return order == tuple(range(len(order)))


def product(node: Any) -> Product | str:
    """The product that computes a node's value; otherwise why it is none that we know."""
    if not isinstance(node, fx.Node) or node.target not in _PRODUCTS:
        return f"its scores are computed by {getattr(node, 'name', node)}, not by a product"
    bound = bind_arguments(node)
    if node.target is aten.einsum.default:
        return _einsum(node, bound["equation"], bound["tensors"])
    if node.target is aten.baddbmm.default:
        left, right = bound["batch1"], bound["batch2"]
    else:
        left, right = bound["self"], bound["other" if "other" in bound else "mat2"]
    if not _rank(left) == _rank(right) >= 2:
        return f"{node.name} multiplies tensors of {_rank(left)} and {_rank(right)} dimensions"
    return Product(node, _as_it_is(left), _swapped(right), tuple(range(_rank(left))))


def _einsum(node: fx.Node, equation: str, tensors: list[fx.Node]) -> Product | str:
    other = f"{node.name} computes {equation}, which is no matrix product"
    sources, arrow, out = equation.replace(" ", "").partition("->")
    names = sources.split(",")
    if not arrow or len(names) != 2 or not _plain_letters(*names, out):
        return other
    common = set(names[0]) & set(names[1])
    summed = common - set(out)
    if len(summed) != 1 or set(out) != set(names[0]) ^ set(names[1]) | (common - summed):
        return other
    batch = [letter for letter in out if letter in common]
    single = [letter for letter in out if letter not in common]
    if len(single) != 2:
        return other
    (last,) = summed
    rows, columns = single
    first = 0 if rows in names[0] else 1
    left, right = (
        Turned(tensors[k], tuple(names[k].index(x) for x in (*batch, letter, last)))
        for k, letter in ((first, rows), (1 - first, columns))
    )
    canonical = [*batch, rows, columns]
    return Product(node, left, right, tuple(canonical.index(letter) for letter in out))


def _plain_letters(*names: str) -> bool:
    return all(name.isalpha() and len(set(name)) == len(name) for name in names)


def exchanged(found: Product) -> Product:
    """The same product with the roles of rows and columns exchanged."""
    rank = len(found.result)
    swap = {rank - 2: rank - 1, rank - 1: rank - 2}
    order = tuple(swap.get(axis, axis) for axis in found.result)
    return replace(found, left=found.right, right=found.left, result=order)


def untangled(operand: Turned) -> tuple[Turned, float]:
    """An operand without the transposes that its order undoes, and the number it was scaled by."""
    scale, operand = 1.0, unturned(operand)
    while (factor := number_times(operand.node)) is not None:
        scale *= factor[0]
        operand = unturned(Turned(factor[1], operand.order))
    return operand, scale


def unturned(operand: Turned, *, wholly: bool = False) -> Turned:
    """An operand without the transposes that its order undoes, or (wholly) without any."""
    while wholly or not is_identity(operand.order):
        order = transposition(operand.node)
        if order is None:
            return operand
        source = bind_arguments(operand.node)["self"]
        operand = Turned(source, tuple(order[axis] for axis in operand.order))
    return operand


def transposition(node: fx.Node) -> tuple[int, ...] | None:
    """The order of dimensions that a transpose or permute reads its source in."""
    if node.target not in (aten.transpose.int, aten.permute.default, aten.t.default):
        return None
    rank, bound = _rank(node), bind_arguments(node)
    if node.target is aten.permute.default:
        return tuple(axis % rank for axis in bound["dims"])
    order = list(range(rank))
    a, b = (bound.get("dim0", 0) % rank, bound.get("dim1", 1) % rank) if rank > 1 else (0, 0)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def number_times(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(number, x) where a node computes ``number * x`` in the dtype of a floating x."""
    multiplies = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    if not multiplies and node.target not in (aten.div.Tensor, aten.div.Scalar):
        return None
    bound = bind_arguments(node)
    source, number = bound["self"], bound["other"]
    if isinstance(number, fx.Node) or not isinstance(source, fx.Node) or not number:
        return None
    if not source.meta["val"].is_floating_point():
        return None
    return (float(number) if multiplies else 1.0 / float(number)), source


@dataclass(frozen=True)
class Fill:
    """A mask that replaces scores: those where ``node`` is true, or false where ``keeps``."""

    node: fx.Node
    value: float
    keeps: bool


@dataclass(frozen=True)
class Scores:
    """``scale * product``, with tensors added and filled in, computed by ``nodes``."""

    product: Product
    scale: float = 1.0
    added: tuple[fx.Node, ...] = ()
    fills: tuple[Fill, ...] = ()
    nodes: tuple[fx.Node, ...] = field(default=())


def scores(node: Any) -> Scores | str:
    """The scores that compute a node's value; otherwise why it is none that we know."""
    if not isinstance(node, fx.Node):
        return f"its scores are the number {node}"
    if (factor := number_times(node)) is not None:
        inner = scores(factor[1])
        if isinstance(inner, str):
            return inner
        if inner.added or inner.fills:
            return f"{node.name} scales scores that are masked already"
        return replace(inner, scale=inner.scale * factor[0], nodes=(node, *inner.nodes))
    if node.target is aten.add.Tensor:
        return _sum(node)
    if node.target in (aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther):
        return _filled(node)
    found = product(node)
    if isinstance(found, str):
        return found
    if node.target is aten.baddbmm.default:
        return _biased(found)
    return Scores(found, nodes=(node,))


def _sum(node: fx.Node) -> Scores | str:
    bound = bind_arguments(node)
    if bound["alpha"] != 1:
        return f"{node.name} adds with alpha={bound['alpha']}"
    reasons = []
    for ours, theirs in (("self", "other"), ("other", "self")):
        inner, mask = scores(bound[ours]), bound[theirs]
        if isinstance(inner, str):
            reasons.append(inner)
        elif not isinstance(mask, fx.Node):
            return replace(inner, nodes=(node, *inner.nodes))  # softmax ignores a constant
        else:
            added = (*inner.added, mask)
            return replace(inner, added=added, nodes=(node, *inner.nodes))
    return reasons[0]


def _filled(node: fx.Node) -> Scores | str:
    bound = bind_arguments(node)
    if node.target is aten.masked_fill.Scalar:
        mask, inside, value, keeps = bound["mask"], bound["self"], bound["value"], False
    else:
        mask, inside, value, keeps = bound["condition"], bound["self"], bound["other"], True
    inner = scores(inside)
    if isinstance(inner, str):
        return inner
    number = _number(value)
    if number is None:
        return f"{node.name} fills in values that are not one known number"
    fill = Fill(mask, number, keeps)
    return replace(inner, fills=(*inner.fills, fill), nodes=(node, *inner.nodes))


def _number(value: Any) -> float | None:
    """A number, or the one that a ``full`` or ``scalar_tensor`` holds."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value.target in (
        aten.full.default, aten.full_like.default, aten.scalar_tensor.default,
    ):  # fmt: skip
        bound = bind_arguments(value)
        number = bound.get("fill_value", bound.get("s"))
        return float(number) if isinstance(number, (int, float)) else None
    return None


def _biased(found: Product) -> Scores | str:
    bound = bind_arguments(found.node)
    if bound["beta"] != 1 or isinstance(bound["alpha"], fx.Node):
        return f"{found.node.name} has alpha={bound['alpha']} and beta={bound['beta']}"
    alpha = float(bound["alpha"])
    return Scores(found, alpha, added=(bound["self"],), nodes=(found.node,))


def repeated(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, groups) where a node holds every head of x, in dimension -3, ``groups`` times in a row.

    x[..., h, n, d] -> unsqueeze -> expand to [..., h, groups, n, d] -> reshape, as Llama's are.
    """
    if node.target is aten.repeat_interleave.self_int:
        bound = bind_arguments(node)
        rank, at, groups = _rank(node), bound["dim"], bound["repeats"]
        by_heads = at is not None and rank > 2 and at % rank == rank - 3
        return (bound["self"], groups) if by_heads and isinstance(groups, int) else None
    if node.target not in (aten.reshape.default, aten.flatten.using_ints):
        return None
    wide = bind_arguments(node)["self"]
    if wide.target is not aten.expand.default:
        return None
    narrow = bind_arguments(wide)["self"]
    if narrow.target is not aten.unsqueeze.default:
        return None
    source = bind_arguments(narrow)["self"]
    rank = _rank(source)
    if rank < 3 or bind_arguments(narrow)["dim"] % (rank + 1) != rank - 2:
        return None
    return _group_count(source, wide, node)


def _group_count(source: fx.Node, wide: fx.Node, node: fx.Node) -> tuple[fx.Node, int] | None:
    """The source and its number of copies, where the shapes are those of a repetition."""
    before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
    groups = wide.meta["val"].shape[-3]
    heads = before[-3]
    if not isinstance(groups, int) or not isinstance(heads, int):
        return None
    expected = [*before[:-3], heads * groups, *before[-2:]]
    inside = [*before[:-2], groups, *before[-2:]]
    same = str(after) == str(expected) and str(list(wide.meta["val"].shape)) == str(inside)
    return (source, groups) if same else None


def hides(value: float, dtype: torch.dtype) -> bool:
    """Whether a score of this value always has the weight zero beside others."""
    return value == -math.inf or value <= torch.finfo(dtype).min / 2

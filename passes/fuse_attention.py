"""Fuse attention, however it is spelt, into one operator.

    y = scaled_dot_product_attention(q, k, v, mask)
    y = softmax(q @ transpose(k) * scale + mask) @ v        matmul, bmm, baddbmm or einsum
      -->
    y = pruna::attention(q, k, v, mask, causal, scale)

Keys and values that are repeated for groups of queries are read as they are (Llama), numbers that
scale queries or keys become part of ``scale``, a constant mask that is the causal one, or hides
nothing, is said so. Projections stay; ``fuse-attention-blocks`` takes those that nothing but views
parts from an attention, and one note a program says so.

Where a formula hides every key of a query, it gives NaN and the operator zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

import pruna_ir.kernels.attention
from pruna_ir.call import bind_arguments
from pruna_ir.passes.attention_masks import Mask, insert_mask, mask_argument, settled
from pruna_ir.passes.attention_patterns import (
    SOFTMAXES,
    Product,
    Scores,
    Turned,
    exchanged,
    is_identity,
    product,
    repeated,
    scores,
    transposition,
    untangled,
    unturned,
)
from pruna_ir.passes.attention_surroundings import between_products, projections
from pruna_ir.program import dtype_of, shape_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
ATTENTION = pruna_ir.kernels.attention.KERNEL.op
_SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Replace attention by ``pruna::attention``.

    Rewrite:
        s = matmul(q, transpose(k, -2, -1)); p = softmax(s * 0.5 + mask, -1); y = matmul(p, v)
          -->
        y = attention(q, k, v, mask, causal=False, scale=0.5)

    Requires: nobody else reads s or p; no dropout in between; a mask that fits the scores.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> class Net(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.softmax(x @ x.transpose(-2, -1), -1) @ x
    >>> program = apply(FuseAttention(), capture(Net(), (torch.zeros(2, 3, 4),))).program
    >>> [str(node.target) for node in program.calls()]
    ['pruna.attention.default']
    """

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Look at every fused attention and every softmax."""
        projected: list[fx.Node] = []
        for node in rw.calls(_SDPA, *SOFTMAXES):
            found = _fused(node) if node.target is _SDPA else _spelt_out(node)
            if isinstance(found, _Block):
                found = _settled(rw, found)
            if isinstance(found, _Block):
                projected += projections(found.query.node, found.key.node, found.value.node)
                _fuse(rw, found)
            elif found:
                rw.skip(node, found)
        if projected:
            count = len(set(projected))
            layers = f"{count} layers project" if count > 1 else "one layer projects"
            rw.note(
                projected[0],
                f"{layers} queries, keys and values; they stay layers: fuse-attention-blocks "
                "fuses those that only views part from their attention",
            )


@dataclass(frozen=True)
class _Block:
    """An attention: operands [..., heads, n, size], and the order of its result in ``last``."""

    last: fx.Node
    query: Turned
    key: Turned
    value: Turned
    mask: Mask
    scale: float
    result: tuple[int, ...]


def _fused(node: fx.Node) -> _Block | str:
    """The attention that torch's own operator computes, or why it has no fused form."""
    bound = bind_arguments(node)
    if bound["dropout_p"]:
        return "it has dropout; call model.eval() before capture"
    query, key, value = bound["query"], bound["key"], bound["value"]
    shapes = [shape_of(n) or () for n in (query, key, value)]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes[0]) < 2:
        return "its query, key and value are of different rank"
    scale = bound["scale"]
    if scale is None and not isinstance(shapes[0][-1], int):
        return "its scale follows from a dynamic size"
    if scale is None:
        scale = 1.0 / math.sqrt(shapes[0][-1])
    mask = mask_argument(bound["attn_mask"], causal=bool(bound["is_causal"]))
    order = tuple(range(len(shapes[0])))
    operands = Turned(query, order), Turned(key, order), Turned(value, order)
    return _Block(node, *operands, mask, float(scale), order)


def _spelt_out(softmax: fx.Node) -> _Block | str:
    """The attention around a softmax; a reason; or "" where nothing resembles one."""
    bound = bind_arguments(softmax)
    found = scores(bound["self"])
    readers = _readers(softmax)
    outer = [node for node in readers if _multiplies(node, softmax)]
    if isinstance(found, str):
        return found if outer or between_products(softmax, bound["self"]) else ""
    if not outer:
        return _reason_without_product(readers)
    if len(readers) > 1:
        names = sorted(node.name for node in readers if node is not outer[0])
        return f"{softmax.name} is also read by {', '.join(names)}"
    second = product(outer[0])
    if isinstance(second, str):
        return second
    if reason := _reason_against_softmax(softmax, bound, found):
        return reason
    return _joined(softmax, bound["dim"], found, second)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The readers of a node's value, in whatever order they get its dimensions."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if transposition(user) is not None else [user]
    return found


def _multiplies(node: fx.Node, softmax: fx.Node) -> bool:
    found = product(node)
    return isinstance(found, Product) and softmax in (
        unturned(found.left, wholly=True).node, unturned(found.right, wholly=True).node
    )  # fmt: skip


def _reason_without_product(readers: list[fx.Node]) -> str:
    for node in readers:
        if node.target is aten.dropout.default:
            live = bind_arguments(node)["train"]
            return (
                f"{node.name} drops values in training mode"
                if live
                else f"{node.name} stands in between; run canonicalize first"
            )
    names = ", ".join(sorted(node.name for node in readers if node.op != "output"))
    return f"its shares are read by {names or 'the output'}, not by a product with values"


def _reason_against_softmax(softmax: fx.Node, bound: dict[str, Any], found: Scores) -> str:
    source = bound["self"]
    if dtype_of(softmax) != dtype_of(source) or dtype_of(source) != dtype_of(found.product.node):
        return f"the scores are {dtype_of(found.product.node)}, the shares {dtype_of(softmax)}"
    for node in found.nodes:
        if len(node.users) > 1:
            names = sorted(user.name for user in node.users if user not in (*found.nodes, softmax))
            return f"{node.name} is also read by {', '.join(names)}"
    ours, theirs = softmax.meta["val"].shape, found.product.node.meta["val"].shape
    if str(list(ours)) != str(list(theirs)):
        return f"a mask widens the scores from {list(theirs)} to {list(ours)}"
    return ""


def _joined(softmax: fx.Node, dim: int, found: Scores, second: Product) -> _Block | str:
    """The block of two products, in the order of dimensions that the operator wants."""
    first = found.product
    rank = len(first.result)
    axis = first.result[dim % rank]
    if axis == rank - 2:
        first, axis = exchanged(first), rank - 1
    if unturned(second.left, wholly=True).node is not softmax:
        second = exchanged(second)
    second = replace(second, left=unturned(second.left, wholly=True))
    shares = tuple(first.result[d] for d in second.left.order)  # canonical dims of the scores
    if axis != rank - 1 or shares[-2:] != (rank - 2, rank - 1):
        return f"its softmax runs over dimension {dim}, which is not the one of the keys"
    if not is_identity(shares) or not is_identity(first.result):
        if found.added or found.fills:
            return "its mask stands in another order of dimensions than its operands"
        second = _reordered(second, shares)
    query, by_query = untangled(first.left)
    key, by_key = untangled(first.right)
    value = unturned(Turned(second.right.node, _value_order(second.right.order)))
    mask, scale = Mask(found.added, found.fills), found.scale * by_query * by_key
    return _Block(second.node, query, key, value, mask, scale, second.result)


def _value_order(order: tuple[int, ...]) -> tuple[int, ...]:
    """[..., out, keys] to [..., keys, out]."""
    return (*order[:-2], order[-1], order[-2])


def _reordered(second: Product, shares: tuple[int, ...]) -> Product:
    """The second product with its batch dimensions in the order of the first one's."""
    rank = len(shares)
    place = {axis: k for k, axis in enumerate(shares)}
    batch = [place[axis] for axis in range(rank - 2)]
    right = tuple(second.right.order[k] for k in (*batch, rank - 2, rank - 1))
    canonical = [*batch, rank - 2, rank - 1]
    result = tuple(canonical.index(axis) for axis in second.result)
    return replace(second, right=Turned(second.right.node, right), result=result)


def _settled(rw: Rewrite, block: _Block) -> _Block | str:
    """The block with its mask in the simplest form, or why it is not fused."""
    query, key, value = (_shape(t) for t in (block.query, block.key, block.value))
    dtypes = {dtype_of(t.node) for t in (block.query, block.key, block.value)}
    if len(dtypes) > 1:
        return f"its operands have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if str(query[:-3]) != str(key[:-3]) or str(key[:-1]) != str(value[:-1]):
        return f"query {query}, key {key} and value {value} broadcast against each other"
    if len(query) > 2 and (reason := _reason_against_heads(block, query[-3], key[-3])):
        return reason
    (dtype,) = dtypes
    assert dtype is not None
    mask = settled(rw.program, block.mask, [*query[:-1], key[-2]], dtype)
    return mask if isinstance(mask, str) else replace(block, mask=mask)


def _reason_against_heads(block: _Block, ours: Any, theirs: Any) -> str:
    if str(ours) == str(theirs):
        return ""
    grouped = isinstance(ours, int) and isinstance(theirs, int) and theirs and ours % theirs == 0
    allowed = block.last.target is _SDPA and bind_arguments(block.last)["enable_gqa"]
    if grouped and allowed:
        return ""
    return f"{ours} heads of queries and {theirs} heads of keys broadcast against each other"


def _shape(turned: Turned) -> list[Any]:
    sizes = turned.node.meta["val"].shape
    return [sizes[axis] for axis in turned.order]


def _fuse(rw: Rewrite, block: _Block) -> None:
    last = block.last
    key, value = _ungrouped(block.key, block.value)
    query, key_node, value_node = (_turn(rw, t, last) for t in (block.query, key, value))
    mask, causal = insert_mask(rw, block.mask, last), block.mask.causal
    fused = rw.insert(
        ATTENTION, before=last, like=last, query=query, key=key_node, value=value_node,
        mask=mask, causal=causal, scale=block.scale,
    )  # fmt: skip
    heads = [n.meta["val"].shape[-3:-2] for n in (query, key_node)]
    groups = heads[0][0] // heads[1][0] if heads[0] and heads[0] != heads[1] else 1
    facts = [f"{groups} heads of queries share one of keys"] if groups > 1 else []
    facts += ["causal"] if causal else ["masked"] if mask is not None else []
    detail = f" ({', '.join(facts)})" if facts else ""
    rw.applied(last, f"fused attention{detail} into {fused.name}")
    if is_identity(block.result):
        rw.replace(last, fused)
    else:
        turned = rw.insert(
            aten.permute.default, before=last, like=last, self=fused, dims=list(block.result)
        )
        rw.replace(last, turned)


def _ungrouped(key: Turned, value: Turned) -> tuple[Turned, Turned]:
    """Keys and values before they are repeated, where both are, alike."""
    if not (is_identity(key.order) and is_identity(value.order)):
        return key, value
    keys, values = repeated(key.node), repeated(value.node)
    if keys is None or values is None or keys[1] != values[1]:
        return key, value
    return Turned(keys[0], key.order), Turned(values[0], value.order)


def _turn(rw: Rewrite, operand: Turned, before: fx.Node) -> fx.Node:
    """The node of an operand in the order that the operator wants."""
    if is_identity(operand.order):
        return operand.node
    moved = [axis for axis, source in enumerate(operand.order) if axis != source]
    if len(moved) == 2:
        return rw.insert(
            aten.transpose.int, before=before, like=before, self=operand.node,
            dim0=moved[0], dim1=moved[1],
        )  # fmt: skip
    return rw.insert(
        aten.permute.default, before=before, like=before, self=operand.node,
        dims=list(operand.order),
    )  # fmt: skip

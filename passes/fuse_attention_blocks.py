"""Fuse attention with its projections into one operator: the attention blocks of transformers.

    q, k, v = linear(x, Wq, bq), linear(x, Wk, bk), linear(x, Wv, bv), each cut into heads
    y = linear(joined heads of attention(q, k, v, mask, causal, scale), Wo, bo)
      -->
    y = pruna::attention_block(x, [Wq; Wk; Wv], [bq; bk; bv], Wo, bo, mask, ...)

It works on the ``pruna::attention`` that ``fuse-attention`` leaves. Nothing but views may stand in
between (reshapes, transposes, parts, see ``view_layout``), and numbers that queries or keys are
multiplied by, which become part of the scale. What else stands there is named: rotary embeddings,
norms, caches.

One weight that holds the rows of queries, keys and values in this order is read as it is. Others
are stored anew as one, under the name of the queries' with ``packed`` behind it; ``addmm``'s,
[in, out], transposed. Blocks that share weights share the new ones. A missing bias beside others
is zeros, and trains with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

import pruna_ir.kernels.attention
import pruna_ir.kernels.attention_block
from pruna_ir.call import bind_arguments
from pruna_ir.passes.attention_ways import (
    ROLES,
    Output,
    Projections,
    Way,
    all_readers,
    output,
    projections,
    way,
)
from pruna_ir.passes.ffn_patterns import Dense
from pruna_ir.passes.weight_copies import copied
from pruna_ir.program import dtype_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
ATTENTION = pruna_ir.kernels.attention.KERNEL.op
BLOCK = pruna_ir.kernels.attention_block.KERNEL.op


@dataclass(frozen=True)
class FuseAttentionBlocks(Pass):
    """Replace projections, attention and output layer by ``pruna::attention_block``.

    Rewrite:
        q, k, v = heads(linear(x, W, b)); y = linear(joined(attention(q, k, v, ...)), Wo, bo)
          -->
        y = attention_block(x, W, b, Wo, bo, ...)

    Requires: fuse-attention before it; nobody else reads what stands between x and y.

    >>> from pruna_ir import capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv, self.out = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         heads = self.qkv(x).unflatten(-1, (3, 2, 2)).transpose(1, 3)
    ...         y = torch.nn.functional.scaled_dot_product_attention(*heads.unbind(2))
    ...         return self.out(y.transpose(1, 2).flatten(2))
    >>> program = capture(Net(), (torch.zeros(2, 5, 4),))
    >>> fused = Pipeline.parse("canonicalize,fuse-attention,fuse-attention-blocks").run(program)
    >>> [str(node.target) for node in fused.program.calls()]
    ['pruna.attention_block.default']
    """

    name: ClassVar[str] = "fuse-attention-blocks"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Look around every fused attention."""
        copies = _Copies(rw)
        for node in rw.calls(ATTENTION):
            found = _match(node)
            if isinstance(found, _Block):
                _fuse(rw, copies, found)
            elif found:
                rw.skip(node, found)


@dataclass(frozen=True)
class _Block:
    """An attention with the layers around it."""

    attention: fx.Node
    projected: Projections
    output: Output
    heads: tuple[int, int]
    """Of queries; of keys and values."""


def _match(node: fx.Node) -> _Block | str:
    """The block around an attention; why there is none; or "" where nothing resembles one."""
    bound = bind_arguments(node)
    operands = [bound[name] for name in ("query", "key", "value")]
    ways = [way(operand, role) for operand, role in zip(operands, ROLES, strict=True)]
    if not any(ways):
        return ""
    for operand, role, found in zip(operands, ROLES, ways, strict=True):
        if isinstance(found, str):
            return found or f"its {role} are {operand.name}, which no layer projects"
    heads = [operand.meta["val"].shape[-3:-2] for operand in operands]
    counts = [h for sizes in heads for h in sizes if isinstance(h, int)]
    if len(counts) != 3:
        return "it has no dimension of heads, or one of unknown size"
    return _block(node, [w for w in ways if isinstance(w, Way)], (counts[0], counts[1]))


def _block(node: fx.Node, ways: list[Way], heads: tuple[int, int]) -> _Block | str:
    """The block of an attention whose operands are all projected."""
    behind = output(node)
    if isinstance(behind, str):
        return behind
    inside = set.union({node, *behind.nodes}, *(one.nodes() for one in ways))
    if reason := _reason_against_readers(inside, behind.nodes[-1]):
        return reason
    projected = projections(ways)
    if isinstance(projected, str):
        return projected
    if reason := _reason_against_layers(projected, behind.layer):
        return reason
    return _Block(node, projected, behind, heads)


def _reason_against_readers(inside: set[fx.Node], last: fx.Node) -> str:
    for node in sorted(inside - {last}):
        outside = {reader.name for reader in all_readers(node) if reader not in inside}
        if outside:
            return f"{node.name} is also read by {', '.join(sorted(outside))}"
    return ""


def _reason_against_layers(projected: Projections, last: Dense) -> str:
    layers = [*projected.layers, last]
    if unfit := next((layer.unfit for layer in layers if layer.unfit), ""):
        return unfit
    dtypes = {dtype_of(n) for layer in layers for n in (layer.input, layer.weight)}
    if len(dtypes) > 1:
        return f"its layers have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    for layer in layers:
        if len(layer.weight.meta["val"].shape) != 2:
            return f"{layer.nodes[-1].name} has a weight that is not a matrix"
    if not _is_packed(projected):
        for layer in projected.layers:
            if any(t is not None and t.op != "get_attr" for t in (layer.weight, layer.bias)):
                return f"the weight or bias of {layer.nodes[-1].name} is computed in the graph"
    return ""


def _is_packed(projected: Projections) -> bool:
    """Whether one layer's weight holds queries, keys and values as the operator wants them."""
    first = projected.layers[0]
    return not first.transposed and _is_whole(projected)


def _is_whole(projected: Projections) -> bool:
    """Whether one layer's outputs are queries, keys and values, in this order."""
    first, *others = projected.layers
    rows = torch.cat(projected.rows)
    same = all(layer.nodes == first.nodes for layer in others)
    return same and torch.equal(rows, torch.arange(first.outputs))


def _fuse(rw: Rewrite, copies: _Copies, block: _Block) -> None:
    bound, last = bind_arguments(block.attention), block.output.nodes[-1]
    weight, bias = copies.projections(block.projected, last)
    out_weight, out_bias = copies.output(block.output.layer, last)
    fused = rw.insert(
        BLOCK, before=last, like=block.attention, x=_source(rw, block, last),
        qkv_weight=weight, qkv_bias=bias, out_weight=out_weight, out_bias=out_bias,
        mask=bound["mask"], heads=block.heads[0], key_heads=block.heads[1],
        causal=bound["causal"], scale=bound["scale"] * block.projected.factor,
    )  # fmt: skip
    count = len({layer.nodes for layer in block.projected.layers})
    layers = "its projection" if count == 1 else f"{count} projections"
    what = f"{layers}, {block.attention.name} and {block.output.layer.nodes[-1].name}"
    rw.applied(block.attention, f"fused {what} into {fused.name}")
    rw.replace(last, _permuted(rw, fused, block.output.order, last))


def _source(rw: Rewrite, block: _Block, before: fx.Node) -> fx.Node:
    turned = block.projected.source
    return _permuted(rw, turned.node, turned.order, before)


def _permuted(rw: Rewrite, node: fx.Node, order: Sequence[int], before: fx.Node) -> fx.Node:
    if list(order) == sorted(order):
        return node
    return rw.insert(
        aten.permute.default, before=before, like=before, self=node, dims=list(order)
    )


@dataclass(frozen=True)
class _Copies:
    """The weights that are stored anew; the same ones once, so that tied blocks stay tied."""

    rw: Rewrite
    known: dict[Any, tuple[fx.Node, fx.Node | None]] = field(default_factory=dict)

    def projections(
        self, projected: Projections, before: fx.Node
    ) -> tuple[fx.Node, fx.Node | None]:
        """The weight [rows of queries, keys, values; in] and its bias."""
        first = projected.layers[0]
        if _is_packed(projected):
            return first.weight, first.bias
        if _is_whole(projected):
            return self.output(first, before)
        parts = list(zip(projected.layers, projected.rows, strict=True))
        key = tuple((*_names(layer), tuple(rows.tolist())) for layer, rows in parts)
        if key not in self.known:
            self.known[key] = self._packed(parts, before)
        return self.known[key]

    def output(self, layer: Dense, before: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """A layer's weight as [out, in], and its bias."""
        if not layer.transposed:
            return layer.weight, layer.bias
        key = _names(layer)
        if key not in self.known:
            turned = self._value(layer.weight).t()
            new = copied(self.rw, [layer.weight], turned, "transposed", before)
            self.known[key] = new, layer.bias
        return self.known[key]

    def _packed(
        self, parts: list[tuple[Dense, torch.Tensor]], before: fx.Node
    ) -> tuple[fx.Node, fx.Node | None]:
        weights, biases = [], []
        for layer, rows in parts:
            weight = self._value(layer.weight)
            weights.append((weight.t() if layer.transposed else weight)[rows])
            bias = weight.new_zeros(layer.outputs)
            biases.append((bias if layer.bias is None else self._value(layer.bias))[rows])
        sources = [layer.weight for layer, _ in parts]
        new = copied(self.rw, sources, torch.cat(weights), "packed", before)
        biased = [layer.bias for layer, _ in parts if layer.bias is not None]
        if not biased:
            return new, None
        return new, copied(self.rw, biased, torch.cat(biases), "packed", before)

    def _value(self, node: fx.Node) -> torch.Tensor:
        return self.rw.program.tensor(str(node.target)).detach()


def _names(layer: Dense) -> tuple[Any, ...]:
    bias = None if layer.bias is None else layer.bias.target
    return layer.weight.target, bias, layer.transposed

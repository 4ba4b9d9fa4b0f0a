"""Fuse the feed-forward blocks of transformers into one operator.

    y = w2 act(w1 x + b1) + b2                            BERT, GPT-2, ViT
    y = w2 (act(gate x + gate_bias) * (w1 x + b1)) + b2   Llama and other gated blocks
    h, g = chunk(w x + b); y = w2 (act(g) * h) + b2       Phi-3, EVA-02: both in one weight
      -->
    y = pruna::ffn(x, w1, b1, w2, b2, gate, gate_bias, act [, residual])

A tensor of the result's shape that is added behind the block becomes its residual. The norm before
it stays (see ``kernels/ffn.py`` for what fusing it could gain), and one note a program says so.

``ffn_patterns`` says which spellings of layers and activations are known. Weights of ``addmm``,
[in, out], are stored transposed, and those of several layers apart, under names of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

import pruna_ir.kernels.ffn
from pruna_ir.call import bind_arguments
from pruna_ir.passes.ffn_patterns import (
    Activation,
    Dense,
    activation,
    between_layers,
    dense,
    part_of,
)
from pruna_ir.passes.weight_copies import copied
from pruna_ir.program import dtype_of
from pruna_ir.propagate import same_value
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
FFN = pruna_ir.kernels.ffn.KERNEL.op


@dataclass(frozen=True)
class FuseFfn(Pass):
    """Replace two dense layers around an activation by ``pruna::ffn``.

    Rewrite:
        h = linear(x, w1, b1); a = gelu(h); y = linear(a, w2, b2); z = r + y
          -->
        z = ffn(x, w1, b1, w2, b2, None, None, "gelu", r)

    Requires: nobody else reads h, a or y; r has exactly the shape and dtype of y; no dropout in
    training mode in between.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
    >>> program = apply(FuseFfn(), capture(model, (torch.zeros(2, 3),))).program
    >>> [str(node.target) for node in program.calls()]
    ['pruna.ffn.default']
    """

    name: ClassVar[str] = "fuse-ffn"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Look at every dense layer as the second one of a block."""
        normed: list[fx.Node] = []
        for node in rw.calls(aten.linear.default, aten.addmm.default):
            for block in _blocks(node):
                if isinstance(block, str):
                    rw.skip(node, block)
                elif reason := _reason_against(block):
                    rw.skip(block.down.nodes[0], reason)
                else:
                    normed += [block.up.input] if block.up.input.target in _NORMS else []
                    _fuse(rw, _with_residual(block))
                    break
        if normed:
            blocks = f"{len(normed)} blocks read" if len(normed) > 1 else "one block reads"
            rw.note(normed[0], f"{blocks} a norm's result; norms stay: matrix products do not "
                               "normalise what they read")  # fmt: skip


_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class _Block:
    """A feed-forward block; ``nodes`` are those between its input and its result."""

    up: Dense
    act: Activation
    down: Dense
    gate: Dense | None = None
    product: fx.Node | None = None
    dropout: fx.Node | None = None
    addition: fx.Node | None = None
    residual: fx.Node | None = None

    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node of the block, its result included."""
        layers = [self.down, self.up, *([self.gate] if self.gate is not None else [])]
        single = [n for n in (self.product, self.dropout, self.down.rows) if n is not None]
        return (*(n for layer in layers for n in layer.nodes), *self.act.nodes, *single)


def _second_layers(node: fx.Node) -> Iterator[Dense]:
    """The dense layer of a matrix product, with the reshape after it where there is one."""
    ends = [user for user in node.users if node.target is aten.addmm.default]
    found = [layer for end in ends if (layer := dense(end)) is not None and node in layer.nodes]
    plain = dense(node)
    yield from found or ([plain] if plain is not None else [])


def _blocks(node: fx.Node) -> Iterator[_Block | str]:
    """The feed-forward blocks whose second layer is this matrix product; at most one per user.

    Where two layers have something unknown between them, what that is.
    """
    for down in _second_layers(node):
        hidden, dropout = down.input, None
        if hidden.target is aten.dropout.default:
            dropout = hidden
            hidden = bind_arguments(hidden)["input"]
        found = _plain(hidden, down, dropout) or _gated(hidden, down, dropout)
        if found is not None:
            yield found
        elif unknown := between_layers(hidden):
            yield f"what {unknown} computes between two layers is no activation that ffn has"


def _plain(hidden: fx.Node, down: Dense, dropout: fx.Node | None) -> _Block | None:
    act = activation(hidden)
    up = dense(act.input) if act is not None else None
    if act is None or up is None:
        return None
    return _Block(up, act, down, dropout=dropout)


def _gated(hidden: fx.Node, down: Dense, dropout: fx.Node | None) -> _Block | None:
    if hidden.target is aten.glu.default:
        return _glu(hidden, down, dropout)
    if hidden.target is not aten.mul.Tensor:
        return None
    bound = bind_arguments(hidden)
    for first, second in (("self", "other"), ("other", "self")):
        act, up = activation(bound[first]), dense(bound[second])
        gate = dense(act.input) if act is not None else None
        if act is not None and up is not None and gate is not None:
            return _Block(up, act, down, gate, hidden, dropout)
    return None


def _glu(hidden: fx.Node, down: Dense, dropout: fx.Node | None) -> _Block | None:
    """The block whose gate is ``glu``: the first half times the sigmoid of the second."""
    bound = bind_arguments(hidden)
    rank = len(hidden.meta["val"].shape)
    whole = dense(bound["self"])
    if whole is None or bound["dim"] % rank != rank - 1:
        return None
    half = whole.outputs // 2
    up, gate = part_of(whole, 0, half), part_of(whole, half, 2 * half)
    if up is None or gate is None:
        return None
    act = Activation("sigmoid", bound["self"], ())
    return _Block(up, act, down, gate, hidden, dropout)


def _with_residual(block: _Block) -> _Block:
    """The block with what is added to its result, where that has the result's shape and dtype."""
    last = block.down.nodes[0]
    addition = next(iter(last.users)) if len(last.users) == 1 else None
    if addition is None or addition.target is not aten.add.Tensor:
        return block
    bound = bind_arguments(addition)
    other = bound["other"] if bound["self"] is last else bound["self"]
    if bound["alpha"] != 1 or not isinstance(other, fx.Node) or other is last:
        return block
    if not same_value(last.meta["val"], other.meta["val"]):
        return block
    return replace(block, addition=addition, residual=other)


def _reason_against(block: _Block) -> str:
    """Why a block is not fused; empty where it may be."""
    if block.dropout is not None:
        training = bind_arguments(block.dropout)["train"]
        return (
            f"{block.dropout.name} drops values in training mode"
            if training
            else f"{block.dropout.name} stands in between; run canonicalize first"
        )
    layers = [layer for layer in (block.up, block.gate, block.down) if layer is not None]
    if unfit := next((layer.unfit for layer in layers if layer.unfit), ""):
        return unfit
    if block.gate is not None and block.gate.input is not block.up.input:
        return (
            f"the gate reads {block.gate.input.name}, but the other layer reads "
            f"{block.up.input.name}"
        )
    if block.gate is not None and block.gate.outputs != block.up.outputs:
        return f"{block.gate.outputs} gates broadcast against {block.up.outputs} values"
    inside = set(block.nodes())
    for node in block.nodes()[1:]:
        outside = sorted(user.name for user in node.users if user not in inside)
        if outside:
            return f"{node.name} is also read by {', '.join(outside)}"
    return _reason_against_types(layers)


def _reason_against_types(layers: list[Dense]) -> str:
    dtypes = {dtype_of(n) for layer in layers for n in (layer.input, layer.weight)}
    if len(dtypes) > 1:
        return f"its layers have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    for layer in layers:
        if len(layer.weight.meta["val"].shape) != 2:
            return f"{layer.nodes[-1].name} has a weight that is not a matrix"
    return ""


def _fuse(rw: Rewrite, block: _Block) -> None:
    gate, down = block.gate, block.down.nodes[0]
    last = down if block.addition is None else block.addition
    gate_weight, gate_bias = (None, None) if gate is None else _stored(rw, gate, last, "gate")
    w1, b1 = _stored(rw, block.up, last, "" if gate is None else "value")
    w2, b2 = _stored(rw, block.down, last, "")
    fused = rw.insert(
        FFN, before=last, like=block.up.nodes[-1], x=block.up.input, w1=w1, b1=b1, w2=w2, b2=b2,
        gate_weight=gate_weight, gate_bias=gate_bias, activation=block.act.name,
        residual=block.residual,
    )  # fmt: skip
    kind = "gated " if gate is not None else ""
    with_residual = " with its residual" if block.residual is not None else ""
    what = f"a {kind}{block.act.name} feed-forward block{with_residual}"
    rw.applied(down, f"fused {what} into {fused.name}")
    rw.replace(last, fused)
    if last is not down:
        rw.erase(down)


def _stored(
    rw: Rewrite, layer: Dense, before: fx.Node, role: str
) -> tuple[fx.Node, fx.Node | None]:
    """A layer's weight as [out, in], and its bias; what is not stored so is stored anew."""
    if not layer.transposed and layer.part is None:
        return layer.weight, layer.bias
    kind = "transposed" if layer.part is None else role or "part"
    weight = rw.program.tensor(str(layer.weight.target)).detach()
    rows = slice(*layer.part) if layer.part is not None else slice(None)
    weight = (weight.t() if layer.transposed else weight)[rows]
    new = copied(rw, [layer.weight], weight, kind, before)
    if layer.bias is None or layer.part is None:
        return new, layer.bias
    bias = rw.program.tensor(str(layer.bias.target)).detach()[rows]
    return new, copied(rw, [layer.bias], bias, kind, before)

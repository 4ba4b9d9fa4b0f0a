"""Spell out fused attention, so that its two matrix products can be quantised.

    y = scaled_dot_product_attention(q, k, v, mask)
      -->
    y = softmax(q @ transpose(k) * scale + mask) @ v        scale = 1 / sqrt(size) by default

A boolean mask, and the causal one, put -inf where they are false. Targets run fused attention in
float; on the products that this leaves, insert-fake-quant{products=true} works.

Limits: no dropout, no grouped queries, causal masks of fixed sizes only. Rows whose every key is
masked give NaN, as the formula does, where fused attention gives zeros; the check after the pass
sees them where the inputs have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import dtype_of, module_path, shape_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SpellOutAttention(Pass):
    """Replace ``scaled_dot_product_attention`` by two matrix products and a softmax.

    Requires: sizes of keys that are known, where no scale is given or the mask is causal.
    """

    name: ClassVar[str] = "spell-out-attention"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def rewrite(self, rw: Rewrite) -> None:
        """Spell out every attention, or say why not."""
        for node in rw.calls(_ATTENTION):
            bound = bind_arguments(node)
            reason = _refusal(bound)
            if reason:
                rw.skip(node, reason)
                continue
            if bound["is_causal"]:
                bound["attn_mask"] = _causal_mask(rw, node, bound)
            rw.applied(node, "spelt out as two matrix products and a softmax")
            rw.inline(node, _spelt_out(bound), bound)


def _refusal(bound: dict[str, Any]) -> str:
    """Why an attention stays as it is; empty where it can be spelt out."""
    if bound["dropout_p"]:
        return "it has dropout; call model.eval() before capture"
    if bound["enable_gqa"]:
        return "its queries are grouped, which is not spelt out"
    query, key = shape_of(bound["query"]) or (), shape_of(bound["key"]) or ()
    if len(query) < 2 or len(query) != len(key):
        return "its query and key are of different rank"
    if bound["scale"] is None and not isinstance(query[-1], int):
        return "its scale follows from a dynamic size"
    if bound["is_causal"] and not (isinstance(query[-2], int) and isinstance(key[-2], int)):
        return "its causal mask is of dynamic size; capture with a fixed length"
    return ""


def _causal_mask(rw: Rewrite, node: fx.Node, bound: dict[str, Any]) -> fx.Node:
    """A constant [queries, keys] that is true where a query may see a key."""
    queries, keys = (int((shape_of(bound[name]) or ())[-2]) for name in ("query", "key"))
    device = bound["query"].meta["val"].device
    mask = torch.tril(torch.ones(queries, keys, dtype=torch.bool, device=device))
    path = module_path(node)
    return rw.constant(mask, f"{path}.causal_mask" if path else "causal_mask", before=node)


def _spelt_out(bound: dict[str, Any]) -> Any:
    """The function of an attention's arguments; facts about shapes and dtypes are read now."""
    query, scale, mask = shape_of(bound["query"]) or (), bound["scale"], bound["attn_mask"]
    if scale is None:
        scale = 1.0 / math.sqrt(int(query[-1]))
    boolean = mask is not None and dtype_of(mask) is torch.bool

    def attention(**given: Any) -> Any:
        keys = aten.transpose.int(given["key"], -2, -1)
        scores = aten.mul.Tensor(aten.matmul.default(given["query"], keys), float(scale))
        if boolean:
            hidden = aten.logical_not.default(given["attn_mask"])
            scores = aten.masked_fill.Scalar(scores, hidden, -math.inf)
        elif mask is not None:
            scores = aten.add.Tensor(scores, given["attn_mask"])
        return aten.matmul.default(aten.softmax.int(scores, -1), given["value"])

    return attention

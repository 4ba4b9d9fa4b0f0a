"""Spell out fused attention, so that its two matrix products can be quantised.

    y = scaled_dot_product_attention(q, k, v, mask)
      -->
    y = softmax(q @ transpose(k) * scale + mask) @ v        scale = 1 / sqrt(size) by default

A boolean mask, and the causal one, put -inf where they are false; rows whose every key is masked
give zeros, as fused attention's do. Keys that groups of queries share are repeated. Targets run
fused attention in float; on the products that this leaves, insert-fake-quant{products=true} works.

A fused attention block becomes its layers around that. Limits: no dropout; no scale that follows
from a dynamic size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pruna_ir.call import bind_arguments
from pruna_ir.kernels.attention import KERNEL, attention_reference
from pruna_ir.kernels.attention_block import KERNEL as BLOCK
from pruna_ir.program import shape_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SpellOutAttention(Pass):
    """Replace fused attention, torch's and ours, by two products and a softmax.

    Requires: a known size of keys, where no scale is given.
    """

    name: ClassVar[str] = "spell-out-attention"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def rewrite(self, rw: Rewrite) -> None:
        """Spell out every attention, or say why not."""
        for node in rw.calls(_ATTENTION, KERNEL.op, BLOCK.op):
            bound = bind_arguments(node)
            if node.target is BLOCK.op:
                rw.applied(node, "spelt out as layers, two matrix products and a softmax")
                rw.inline(node, BLOCK.reference, bound)
                continue
            arguments = bound if node.target is KERNEL.op else _arguments(bound)
            if isinstance(arguments, str):
                rw.skip(node, arguments)
                continue
            rw.applied(node, "spelt out as two matrix products and a softmax")
            rw.inline(node, attention_reference, arguments)


def _arguments(bound: dict[str, Any]) -> dict[str, Any] | str:
    """Torch's arguments as those of ``pruna::attention``; why there are none."""
    if bound["dropout_p"]:
        return "it has dropout; call model.eval() before capture"
    query, key = shape_of(bound["query"]) or (), shape_of(bound["key"]) or ()
    if len(query) < 2 or len(query) != len(key):
        return "its query and key are of different rank"
    if len(query) > 2 and query[-3] != key[-3] and not bound["enable_gqa"]:
        return "its heads broadcast against each other"
    scale = bound["scale"]
    if scale is None and not isinstance(query[-1], int):
        return "its scale follows from a dynamic size"
    return {
        "query": bound["query"],
        "key": bound["key"],
        "value": bound["value"],
        "mask": bound["attn_mask"],
        "causal": bool(bound["is_causal"]),
        "scale": 1.0 / math.sqrt(int(query[-1])) if scale is None else float(scale),
    }

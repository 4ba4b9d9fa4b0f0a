"""The masks of attention: what is added to scores or filled into them, as one operand.

    scores + a + b                          a + b, added
    masked_fill(scores, hidden, -inf)       not hidden: true where a query sees a key
    where(seen, scores, lowest)             seen, if it is a constant that leaves each row a key

A constant that equals the causal mask is told as ``causal``; one that hides nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.passes.attention_patterns import Fill, hides
from pruna_ir.program import Program, dtype_of
from pruna_ir.transform import Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Mask:
    """Everything that an attention's scores are masked by."""

    added: tuple[fx.Node, ...] = ()
    fills: tuple[Fill, ...] = ()
    causal: bool = False


def mask_argument(mask: fx.Node | None, *, causal: bool) -> Mask:
    """The mask of torch's fused attention."""
    if mask is None:
        return Mask(causal=causal)
    if dtype_of(mask) is torch.bool:
        return Mask(fills=(Fill(mask, -math.inf, keeps=True),), causal=causal)
    return Mask(added=(mask,), causal=causal)


def settled(program: Program, mask: Mask, scores: Sequence[Any], dtype: torch.dtype) -> Mask | str:
    """The mask in its simplest form, or why it has no place in the operator.

    Args:
        program: where constants are read.
        mask: the mask as it was found.
        scores: [..., heads, queries, keys].
        dtype: that of the scores.
    """
    if bool(mask.added) + bool(mask.fills) + mask.causal > 1:
        return "its scores are masked in two ways, by addition and by filling in"
    for node in (*mask.added, *(fill.node for fill in mask.fills)):
        if not _fits(node.meta["val"].shape, scores):
            shape = list(node.meta["val"].shape)
            return f"the mask {node.name} is {shape}, which does not fit scores of {list(scores)}"
    if other := next((n for n in mask.added if dtype_of(n) != dtype), None):
        return f"the mask {other.name} is {dtype_of(other)}, not {dtype}"
    fills = [_settled_fill(program, fill, dtype) for fill in mask.fills]
    if reason := next((fill for fill in fills if isinstance(fill, str)), ""):
        return reason
    return _simplest(program, mask, scores, dtype)


def _fits(mask: Sequence[Any], scores: Sequence[Any]) -> bool:
    """Whether a mask broadcasts to the scores without widening them."""
    pairs = zip(reversed(mask), reversed(scores), strict=False)
    return len(mask) <= len(scores) and all(str(m) in ("1", str(s)) for m, s in pairs)


def _settled_fill(program: Program, fill: Fill, dtype: torch.dtype) -> Fill | str:
    """A fill that puts weights of zero, or why it does not."""
    if fill.value == -math.inf:
        return fill
    what = f"{fill.node.name} hides scores behind {fill.value:g}"
    if not hides(fill.value, dtype):
        return f"{what}, which leaves them a weight"
    known = _constant(program, fill.node)
    if known is None:
        return f"{what}: rows that it hides wholly need not be zero; only -inf or a constant is"
    seen = known if fill.keeps else ~known
    whole = bool(seen.any(-1).all()) if seen.dim() else bool(seen)
    return fill if whole else f"{what}, and it hides whole rows"


def _simplest(
    program: Program, mask: Mask, scores: Sequence[Any], dtype: torch.dtype
) -> Mask:
    seen = None
    if len(mask.fills) == 1 and not mask.added:
        known = _constant(program, mask.fills[0].node)
        seen = known if known is None or mask.fills[0].keeps else ~known
    elif len(mask.added) == 1 and not mask.fills:
        known = _constant(program, mask.added[0])
        if known is not None and known.is_floating_point():
            hidden = known <= torch.finfo(dtype).min / 2
            seen = ~hidden if bool((hidden | (known == 0)).all()) else None
    if seen is None:
        return mask
    if bool(seen.all()):
        return Mask()
    queries, keys = scores[-2:]
    if not isinstance(queries, int) or not isinstance(keys, int):
        return mask
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    return Mask(causal=True) if bool((seen.cpu() == causal).all()) else mask


def _constant(program: Program, node: fx.Node) -> torch.Tensor | None:
    """A constant that a node holds, up to broadcasting; None where it is computed or trained."""
    if node.op == "get_attr":
        tensor = program.tensor(str(node.target))
        return None if isinstance(tensor, torch.nn.Parameter) else tensor
    if node.op != "call_function":
        return None
    if node.target is aten.expand.default:
        return _constant(program, bind_arguments(node)["self"])
    if node.target is aten.unsqueeze.default:
        bound = bind_arguments(node)
        found = _constant(program, bound["self"])
        same = found is not None and found.dim() == len(bound["self"].meta["val"].shape)
        return found.unsqueeze(bound["dim"]) if same and found is not None else None
    if node.target is aten.logical_not.default:
        found = _constant(program, bind_arguments(node)["self"])
        return None if found is None else found.logical_not()
    return None


def insert_mask(rw: Rewrite, mask: Mask, before: fx.Node) -> fx.Node | None:
    """The operator's mask, as one node."""
    node: fx.Node | None = None
    for added in mask.added:
        node = added if node is None else rw.insert(
            aten.add.Tensor, before=before, like=before, self=node, other=added
        )  # fmt: skip
    for fill in mask.fills:
        seen = fill.node
        if not fill.keeps:
            seen = rw.insert(aten.logical_not.default, before=before, like=before, self=seen)
        node = seen if node is None else rw.insert(
            aten.logical_and.default, before=before, like=before, self=node, other=seen
        )  # fmt: skip
    return node

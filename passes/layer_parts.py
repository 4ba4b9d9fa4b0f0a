"""Parts of a layer's outputs: what ``chunk``, ``split`` and ``slice`` take of a dimension.

    gate, value = chunk(linear(x, W), 2, -1)   -->   rows 0 to h and h to 2h of W

Models that store several layers in one weight take their results apart so (Phi-3's
``gate_up_proj``, timm's packed SwiGLU).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments

aten = torch.ops.aten

SPLITS = (
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
)  # fmt: skip


@dataclass(frozen=True)
class LayerPart:
    """``source[..., start:stop]``, and the nodes that take it (the last one first)."""

    source: fx.Node
    start: int
    stop: int
    nodes: tuple[fx.Node, ...]


def layer_part(node: fx.Node) -> LayerPart | None:
    """What a node takes of another's last dimension; None where it does something else."""
    if node.target is aten.slice.Tensor:
        return _slice(node)
    if node.target is not operator.getitem:
        return None
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in SPLITS:
        return None
    bound = bind_arguments(split)
    source = bound["self"]
    if not _is_last(bound["dim"], source):
        return None
    assert isinstance(index, int)
    sizes = [part.shape[-1] for part in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    stops = list(accumulate(sizes))
    return LayerPart(source, stops[index] - sizes[index], stops[index], (node, split))


def _slice(node: fx.Node) -> LayerPart | None:
    bound = bind_arguments(node)
    source, size = bound["self"], bound["self"].meta["val"].shape[-1]
    ends = (bound["start"], bound["end"])
    if not _is_last(bound["dim"], source) or bound["step"] != 1:
        return None
    if not isinstance(size, int) or any(isinstance(end, fx.Node) for end in ends):
        return None
    start, stop, _ = slice(*ends).indices(size)
    return LayerPart(source, start, stop, (node,))


def _is_last(dim: Any, source: fx.Node) -> bool:
    rank = len(source.meta["val"].shape)
    return isinstance(dim, int) and dim % rank == rank - 1

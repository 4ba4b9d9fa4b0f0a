"""Copies of weights in the order that an operator of ours wants, under names of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from pruna_ir.transform import Rewrite


def copied(
    rw: Rewrite, sources: Sequence[fx.Node], value: torch.Tensor, kind: str, before: fx.Node
) -> fx.Node:
    """A node for a value made of parameters', named after the first; a parameter again.

    Args:
        rw: the program under rewrite.
        sources: the ``get_attr`` nodes of the parameters; the copy trains where one of them does.
        value: any tensor; it is copied.
        kind: what the name gets behind it, such as ``transposed``.
        before: the node before which the new one is placed.
    """
    stored = [rw.program.tensor(str(source.target)) for source in sources]
    value = value.detach().clone(memory_format=torch.contiguous_format)
    if any(isinstance(tensor, torch.nn.Parameter) for tensor in stored):
        trains = any(tensor.requires_grad for tensor in stored)
        value = torch.nn.Parameter(value, requires_grad=trains)
    return rw.constant(value, f"{sources[0].target}_{kind}", before=before)

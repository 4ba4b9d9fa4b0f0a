"""The stored statistics of batch norms: which there are, and which channels survive pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.passes.linear_layers import kept
from pruna_ir.program import Origin, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Statistics:
    """The mean and the biased variance of each channel, [channels] float64."""

    mean: Tensor
    var: Tensor


def normed(program: Program, norm: fx.Node) -> tuple[str, str] | str:
    """The names of a batch norm's own mean and variance, or why it has none."""
    call = Call(program, norm)
    sources = [call.producer(name) for name in ("running_mean", "running_var")]
    if call.flag("training") or None in sources:
        return "it normalises with each batch's own statistics"
    if any(source is None or source.op != "get_attr" for source in sources):
        return "its statistics are computed in the graph"
    mean, var = (str(source.target) for source in sources if source is not None)
    others = {
        user.name
        for name in (mean, var)
        for source in program.graph.find_nodes(op="get_attr", target=name)
        for user in source.users
        if user is not norm
    }
    if others:
        return f"its statistics are also read by {', '.join(sorted(others))}"
    return mean, var


def survivors_of(
    origin: Origin, counterpart: fx.Node, program: Program, norm: fx.Node
) -> Tensor | None:
    """The channels of an unpruned norm that survive, int64; None where that is not known."""
    was, now = normed(origin.program, counterpart), normed(program, norm)
    if isinstance(was, str) or isinstance(now, str):
        return None
    size, left = len(origin.program.tensor(was[0])), len(program.tensor(now[0]))
    found = kept(origin.removed, was[0], 0, size)
    return found if len(found) == left else None

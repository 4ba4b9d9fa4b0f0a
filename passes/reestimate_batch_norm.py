"""reestimate-batch-norm: running statistics become those of the data.

After pruning, a batch norm still normalises by the mean and variance that its input had before.
They become the population statistics over the calibration data, in topological order, so that each
norm sees an input that the norms before it already normalise anew:

    mean[c] = E[x_c]        var[c] = E[(x_c - mean[c])^2]       over all batches and positions

The variance is the biased one (divided by the number of values, not by one less): it is what
normalises the data to variance 1 exactly. The statistics are those of all data together, not an
average over batches and not a moving one: Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021,
section 3 (PreciseBN). Sums are float64, merged over batches.

Promise (checked): over the calibration data, the running statistics of every norm are the mean and
variance of what arrives there; nothing else changed.

Limits: norms without running statistics, and those that share them with another norm (whose inputs
differ), stay as they are, the latter with a remark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs
from pruna_ir.passes.promises import StatisticsAgree, Untouched
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Give every batch norm the mean and variance of its input over the calibration data.

    Rewrite:
        batch_norm(x, gamma, beta, mean, var)
          -->
        batch_norm(x, gamma, beta, mean', var')         with mean' = E[x], var' = Var[x]

    Requires: calibration data; eval mode. Works on any program, pruned or not.

    Raises:
        UsageError: there is no calibration data.

    >>> from pruna_ir import Context, TensorData, apply, capture
    >>> x = torch.tensor([[1.0], [2.0], [6.0]])
    >>> norm = torch.nn.BatchNorm1d(1).eval()
    >>> context = Context(data=TensorData((x,), batch_size=2))
    >>> program = apply(ReestimateBatchNorm(), capture(norm, (x[:2],)), context).program
    >>> float(program.tensor("running_mean")), round(float(program.tensor("running_var")), 3)
    (3.0, 4.667)
    """

    name: ClassVar[str] = "reestimate-batch-norm"
    effect: ClassVar[Effect] = Effect.FITTED

    def rewrite(self, rw: Rewrite) -> None:
        """Walk over the norms in order; each sees inputs that the earlier ones normalise anew."""
        frontier = Frontier(rw.program, calibration_inputs(rw, self.name))
        norms: list[str] = []
        changed: list[str] = []
        for node in rw.calls(aten.batch_norm.default):
            norm = rw.call(node)
            names = [_statistic(norm, name) for name in ("running_mean", "running_var")]
            if norm.flag("training") or None in names:
                rw.skip(node, "it normalises with each batch's own statistics")
                continue
            stored = [name for name in names if name is not None]
            if others := _other_readers(rw, node, stored):
                rw.skip(node, f"its statistics are also read by {', '.join(others)}")
                continue
            frontier.reach(node)
            mean, var = population(frontier.values(norm.arg("input")))
            if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
                raise rw.error(node, "the calibration data drives its input to inf or NaN")
            for name, value in zip(stored, (mean, var), strict=True):
                old = rw.program.tensor(name)
                rw.set_tensor(name, value.to(old.device, old.dtype))
            norms.append(node.name)
            changed += stored
            rw.applied(node, f"statistics of {_count(frontier, norm)} values a channel")
        rw.set_origin(rw.before.origin)
        if norms:
            rw.assure(StatisticsAgree(tuple(norms)))
            rw.assure(Untouched(tuple(changed)))


def population(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and biased variance per channel (dimension 1) of all batches, float64.

    >>> mean, var = population([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    >>> mean.tolist(), [round(v, 3) for v in var.tolist()]
    ([3.0], [4.667])
    """
    count, mean, squares = 0, torch.zeros(0), torch.zeros(0)
    for value in values:
        rows = value.double().movedim(1, 0).flatten(1)
        new, own = rows.shape[1], rows.mean(1)
        spread = (rows - own[:, None]).square().sum(1)
        if not count:
            count, mean, squares = new, own, spread
            continue
        delta, total = own - mean, count + new
        squares = squares + spread + delta.square() * (count * new / total)
        mean = mean + delta * (new / total)
        count = total
    return mean, squares / count


def _statistic(norm: Call, name: str) -> str | None:
    source = norm.producer(name)
    return str(source.target) if source is not None and source.op == "get_attr" else None


def _other_readers(rw: Rewrite, norm: fx.Node, names: Sequence[str]) -> list[str]:
    return sorted(
        {
            user.name
            for name in names
            for source in rw.graph.find_nodes(op="get_attr", target=name)
            for user in source.users
            if user is not norm
        }
    )


def _count(frontier: Frontier, norm: Call) -> int:
    return sum(v.numel() // v.shape[1] for v in frontier.values(norm.arg("input")))

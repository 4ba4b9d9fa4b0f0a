"""reestimate-batch-norm: running statistics become those of the data.

After pruning, a batch norm still normalises by the mean m and variance v that its input had
before. They become the population statistics over the calibration data, in topological order, so
that each norm sees an input that the norms before it already normalise anew:

    m'[c] = E[x_c]        v'[c] = E[(x_c - m'[c])^2]        over all batches and positions

The variance is the biased one (divided by the number of values, not by one less): it is what
normalises the data to variance 1 exactly. The statistics are those of all data together, not an
average over batches and not a moving one: Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021,
section 3 (PreciseBN). Sums are float64, merged over batches.

Those replace the statistics of training, which saw other (augmented) and more data. With
``relative``, they move instead as the data's statistics moved through pruning: with x0, m and v
the input and the statistics in the unpruned program,

    v' + eps = (v + eps) Var[x] / Var[x0]
    m' = E[x] - (E[x0] - m) sqrt((v' + eps) / (v + eps))

so that over the calibration data the norm's output has the mean and variance that it had before
pruning, and a program that lost nothing keeps its statistics. This restores the variance that
pruning or least squares took away (Jordan et al., REPAIR, ICLR 2023, rescale to a target in the
same way).

Promise (checked): over the calibration data, the running statistics of every norm are the mean and
variance of what arrives there; with ``relative``, what leaves it has the mean and variance of what
leaves it in the unpruned program. Nothing else changed.

Limits: norms without running statistics, and those that share them with another norm (whose
inputs differ), stay as they are, with a remark. With ``relative``, channels that do not vary over
the data before or after pruning keep their variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs, origin_of
from pruna_ir.passes.norm_statistics import Statistics, normed, survivors_of
from pruna_ir.passes.promises import OutputsAgree, StatisticsAgree, Untouched
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Give every batch norm the mean and variance of its input over the calibration data.

    Rewrite:
        batch_norm(x, gamma, beta, mean, var)
          -->
        batch_norm(x, gamma, beta, mean', var')         with mean' = E[x], var' = Var[x]

    Attributes:
        relative: move the statistics as the data's moved through pruning, in place of taking
            them over.

    Requires: calibration data; eval mode. Works on any program, pruned or not; ``relative`` on one
    that prune-channels has just left.

    Raises:
        UsageError: there is no calibration data.
        PassError: ``relative``, and the program does not know what it was pruned from.

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

    relative: bool = False

    def rewrite(self, rw: Rewrite) -> None:
        """Walk over the norms in order; each sees inputs that the earlier ones normalise anew."""
        batches = calibration_inputs(rw, self.name)
        frontier = Frontier(rw.program, batches)
        unpruned = _Unpruned(rw, self.name, batches) if self.relative else None
        done: list[str] = []
        changed: list[str] = []
        for node in rw.calls(aten.batch_norm.default):
            names = normed(rw.program, node)
            if isinstance(names, str):
                rw.skip(node, names)
                continue
            counterpart = unpruned.counterpart(node) if unpruned else None
            if isinstance(counterpart, str):
                rw.skip(node, counterpart)
                continue
            frontier.reach(node)
            values = frontier.values(rw.call(node).arg("input"))
            new = population(values)
            if unpruned is not None and counterpart is not None:
                new = unpruned.moved(node, counterpart, new)
            if not bool(torch.isfinite(torch.cat([new.mean, new.var])).all()):
                raise rw.error(node, "the calibration data drives its input to inf or NaN")
            for name, value in zip(names, (new.mean, new.var), strict=True):
                old = rw.program.tensor(name)
                rw.set_tensor(name, value.to(old.device, old.dtype))
            done.append(node.name)
            changed += names
            rw.applied(node, f"statistics over {_count(values)} values a channel")
        rw.set_origin(rw.before.origin)
        if done:
            test = OutputsAgree if self.relative else StatisticsAgree
            rw.assure(test(tuple(done)))
            rw.assure(Untouched(tuple(changed)))


class _Unpruned:
    """The unpruned program over the same data, beside the pruned one."""

    def __init__(self, rw: Rewrite, name: str, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._origin = origin_of(rw, name)
        self._program = rw.program
        self._frontier = Frontier(self._origin.program, batches)
        self._named = {n.name: n for n in self._origin.program.calls(aten.batch_norm.default)}

    def counterpart(self, norm: fx.Node) -> fx.Node | str:
        """The same norm there, or why there is none to compare with."""
        found = self._named.get(norm.name)
        if found is None:
            return "the unpruned program has no such norm"
        if survivors_of(self._origin, found, self._program, norm) is None:
            return "which of its channels survive is not known"
        return found

    def moved(self, norm: fx.Node, counterpart: fx.Node, now: Statistics) -> Statistics:
        """The unpruned norm's statistics, moved as the data's moved from there to ``now``."""
        self._frontier.reach(counterpart)
        call = Call(self._origin.program, counterpart)
        kept = survivors_of(self._origin, counterpart, self._program, norm)
        mean, var = call.parameter("running_mean"), call.parameter("running_var")
        assert kept is not None
        assert mean is not None
        assert var is not None
        values = self._frontier.values(call.arg("input"))
        was = population([value.index_select(1, kept.to(value.device)) for value in values])
        mean, var = (stored.detach().double().cpu()[kept] for stored in (mean, var))
        eps = call.number("eps")
        varies = (now.var > 0) & (was.var > 0)
        ratio = torch.where(varies, now.var / torch.where(varies, was.var, 1.0), 1.0)
        new_var = ((var + eps) * ratio - eps).clamp_min(0.0)
        scale = ((new_var + eps) / (var + eps)).sqrt()
        return Statistics(now.mean - (was.mean - mean) * scale, new_var)


def population(values: Sequence[Tensor]) -> Statistics:
    """The mean and biased variance per channel (dimension 1) of all batches, float64.

    >>> found = population([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    >>> found.mean.tolist(), [round(v, 3) for v in found.var.tolist()]
    ([3.0], [4.667])
    """
    count, mean, squares = 0, torch.zeros(0), torch.zeros(0)
    for value in values:
        rows = value.double().movedim(1, 0).flatten(1).cpu()
        new, own = rows.shape[1], rows.mean(1)
        spread = (rows - own[:, None]).square().sum(1)
        if not count:
            count, mean, squares = new, own, spread
            continue
        delta, total = own - mean, count + new
        squares = squares + spread + delta.square() * (count * new / total)
        mean = mean + delta * (new / total)
        count = total
    return Statistics(mean, squares / count)


def _count(values: Sequence[Tensor]) -> int:
    return sum(value.numel() // value.shape[1] for value in values)

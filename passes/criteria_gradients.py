"""Criteria of the loss: how much it changes, to first or second order, when a unit goes.

With g_i the gradient of the loss of sample i (`calibration_loss`), N samples, g = mean_i g_i,
x_i what a consumer of unit u reads of it and S the weights of a scored member that belong to u:

    taylor        mean_i (sum x_i * dL_i/dx_i)^2
    gradient      sum_S |g|
    snip          sum_S |w g| / sum |w g|
    fisher        1/2 mean_i sum_S w^2 g_i^2
    gauss-newton  1/2 mean_i sum_S w^2 g_i^2, labels drawn from the model's own distribution
    movement      -sum_t sum_S w_t g_t over the steps t of SGD on a copy

taylor: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, equations 8
and 9, with a sample as the minibatch. The set of weights is what removal zeroes: the columns of
all consumers that read one and the same input, for which sum w g is x * dL/dx through them. What a
norm over the pruned axis does is not seen.
gradient: the magnitude of the mean gradient of the weights, the baseline that leaves out w.
snip: Lee et al., SNIP, ICLR 2019, equations 4 and 5; the sum in the denominator is over all scored
weights of all groups. fisher: the diagonal of the empirical Fisher matrix for the Hessian in
LeCun et al., Optimal Brain Damage, 1990, equation 5, with squared gradients per sample (Theis et
al., Faster gaze prediction with dense networks and Fisher pruning, 2018, equation 5).
gauss-newton: the same diagonal of the Gauss-Newton matrix, which for the cross-entropy is the
true Fisher matrix, by one drawn label a position (Martens, New Insights on the Natural Gradient
Method, JMLR 2020, section 5). movement: Sanh et al., Movement Pruning, NeurIPS 2020, equation 6
without its constant factor; one step of plain SGD a batch at `MOVEMENT_RATE`, frozen norms.

Members: taylor sees the inputs of consumers (`consumers`), each once; the others see all trainable
members of a group: weights that produce and that read the channels, biases, and scales and shifts
of norms, each tensor once. taylor, fisher and gauss-newton run sample by sample where the batch is
dynamic, and run by run where the program fixes it.

All but movement accumulate exactly over batches and ranks. movement depends on the batches, since
each is a step; ranks take their steps together on averaged gradients, as many as the rank with
the fewest batches has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import fx

from pruna_ir.coupling import Member
from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_loss import sample_losses
from pruna_ir.passes.calibration_runs import rows, runs
from pruna_ir.passes.consumers import Reading, distinct, readings
from pruna_ir.passes.differentiable import differentiable
from pruna_ir.passes.evidence import Evidence, least_over_ranks, mean_over_ranks
from pruna_ir.passes.scored_members import (
    Candidates,
    Parts,
    Scores,
    parameters,
    per_index,
    per_unit,
)
from pruna_ir.training import trainable

MOVEMENT_RATE = 1e-3
"""The learning rate of movement's SGD."""


def taylor(candidates: Candidates) -> list[Parts]:
    """The squared first-order change of each sample's loss when consumers read zeros."""
    found = readings(candidates)
    program = candidates.program
    taps = {
        reading.consumer.node: (reading.consumer.source, reading.consumer.node)
        for each in found
        for reading in each
    }
    module = differentiable(program, taps=list(taps.values()))
    sources = list(dict.fromkeys(source for source, _ in taps.values()))
    found = [distinct(each) for each in found]
    evidence = Evidence()
    for batch in _samples(candidates):
        logits, *read = module(*batch.inputs)
        loss = _loss(candidates, batch, logits)
        slopes = torch.autograd.grad(loss, read, materialize_grads=True)
        first = _products(sources, read, slopes, found)
        for number, each in enumerate(found):
            change = np.stack([r.per_unit(first[r.consumer.key]) for r in each])
            evidence.add(str(number), torch.from_numpy(change**2))
        evidence.add("samples", torch.tensor(1))
    evidence.over_ranks()
    samples = int(evidence["samples"])
    return [list(evidence[str(number)].numpy() / samples) for number in range(len(found))]


def _products(
    sources: list[fx.Node],
    read: list[torch.Tensor],
    slopes: tuple[torch.Tensor, ...],
    found: list[list[Reading]],
) -> dict[str, Scores]:
    """For each input of consumers, the sum of x * dL/dx at each channel."""
    place = {source: number for number, source in enumerate(sources)}
    result: dict[str, Scores] = {}
    for each in found:
        for reading in each:
            consumer = reading.consumer
            if consumer.key in result:
                continue
            number = place[consumer.source]
            product = read[number].detach().double() * slopes[number].double()
            dim = consumer.axis % product.dim()
            result[consumer.key] = per_index(product, dim).cpu().numpy()
    return result


# -- weights -------------------------------------------------------------------------------------


def fisher(candidates: Candidates) -> list[Parts]:
    """Half the squared weights times the empirical Fisher diagonal."""
    return _curvature(candidates, sampled=False)


def gauss_newton(candidates: Candidates) -> list[Parts]:
    """Half the squared weights times the Gauss-Newton diagonal."""
    return _curvature(candidates, sampled=True)


def _curvature(candidates: Candidates, *, sampled: bool) -> list[Parts]:
    members, names = _scored(candidates)
    module = differentiable(candidates.program, names)
    evidence = Evidence()
    for batch in _samples(candidates):
        logits = module(*batch.inputs)[0]
        loss = _loss(candidates, batch, logits, sampled=sampled)
        for name, (weight, slope) in _slopes(module, names, loss).items():
            saliency = weight * slope
            for dim in names[name]:
                evidence.add(f"{name}[{dim}]", per_index(saliency, dim, torch.Tensor.square_))
        evidence.add("samples", torch.tensor(1))
    evidence.over_ranks()
    share = 0.5 / int(evidence["samples"])
    return _parts(members, lambda m: evidence[f"{m.tensor}[{m.dim}]"] * share)


def gradient(candidates: Candidates) -> list[Parts]:
    """The magnitude of the mean gradient."""
    members, mean = _mean_gradient(candidates)
    return _parts(members, lambda m: per_index(mean[m.tensor], m.dim, torch.Tensor.abs_))


def snip(candidates: Candidates) -> list[Parts]:
    """The connection sensitivity |w g|, as a share of that of all scored weights."""
    members, mean = _mean_gradient(candidates)
    tensor = candidates.program.tensor
    saliency = {
        name: (tensor(name).detach().double() * slope).abs() for name, slope in mean.items()
    }
    total = sum(float(value.sum()) for value in saliency.values()) or 1.0
    return _parts(members, lambda m: per_index(saliency[m.tensor], m.dim) / total)


def _mean_gradient(
    candidates: Candidates,
) -> tuple[list[list[Member]], dict[str, torch.Tensor]]:
    """The gradient of the mean loss over all samples, in float64."""
    members, names = _scored(candidates)
    program, context = candidates.program, candidates.context
    assert context.data is not None
    module = differentiable(program, names)
    evidence = Evidence()
    for number, batch in enumerate(runs(program, context.data)):
        logits = module(*batch.inputs)[0]
        loss = _loss(candidates, batch, logits)
        for name, (_, slope) in _slopes(module, names, loss).items():
            evidence.add(name, slope)
        evidence.add("samples", torch.tensor(rows(program, batch.inputs)))
        context.progress("gradients", number + 1, max(number + 1, len(context.data)))
    evidence.over_ranks()
    samples = int(evidence["samples"])
    return members, {name: evidence[name] / samples for name in names}


def movement(candidates: Candidates) -> list[Parts]:
    """How far weights move away from zero while a copy is trained."""
    members, names = _scored(candidates)
    program, context = candidates.program, candidates.context
    assert context.data is not None
    module = trainable(program, train=False)
    moved = Evidence()
    for name in names:
        for dim in names[name]:
            size = program.tensor(name).shape[dim]
            moved.add(f"{name}[{dim}]", torch.zeros(size, dtype=torch.float64))
    steps = least_over_ranks(sum(1 for _ in runs(program, context.data)))
    for _, batch in zip(range(steps), runs(program, context.data), strict=False):
        loss = _loss(candidates, batch, module(*batch.inputs)[0])
        _step(module, names, loss / rows(program, batch.inputs), moved)
    return _parts(members, lambda m: moved[f"{m.tensor}[{m.dim}]"])


def _step(
    module: fx.GraphModule, names: dict[str, set[int]], loss: torch.Tensor, moved: Evidence
) -> None:
    """One step of SGD on every parameter; the scores take in its gradient."""
    leaves = dict(module.named_parameters())
    slopes = list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
    mean_over_ranks(slopes)
    slope_of = {id(leaf): slope for leaf, slope in zip(leaves.values(), slopes, strict=True)}
    for name, dims in names.items():
        weight = module.get_parameter(name)
        saliency = weight.detach().double() * slope_of[id(weight)].double()
        for dim in dims:
            moved.add(f"{name}[{dim}]", -per_index(saliency, dim))
    with torch.no_grad():
        for leaf, slope in zip(leaves.values(), slopes, strict=True):
            leaf.sub_(slope, alpha=MOVEMENT_RATE)


# -- what they share -----------------------------------------------------------------------------


def _samples(candidates: Candidates) -> Iterator[Batch]:
    context = candidates.context
    assert context.data is not None
    for number, batch in enumerate(runs(candidates.program, context.data, single=True)):
        yield batch
        context.progress("samples", number + 1, max(number + 1, len(context.data)))


def _loss(
    candidates: Candidates, batch: Batch, logits: torch.Tensor, *, sampled: bool = False
) -> torch.Tensor:
    """The summed loss of a run.

    Raises:
        UsageError: it is NaN or infinite.
    """
    seed = candidates.context.seed
    loss = sample_losses(candidates.program, batch, logits, seed=seed, sampled=sampled).sum()
    if not bool(torch.isfinite(loss.detach())):
        raise UsageError(
            f"the loss on the calibration data is {float(loss)}; repair the data or the model"
        )
    return loss


def _scored(candidates: Candidates) -> tuple[list[list[Member]], dict[str, set[int]]]:
    """The scored members of each group, and the dimensions of each of their tensors."""
    members = [parameters(candidates.program, group) for group in candidates.groups]
    names: dict[str, set[int]] = {}
    for each in members:
        for member in each:
            names.setdefault(member.tensor, set()).add(member.dim)
    return members, names


def untrained(candidates: Candidates) -> list[str]:
    """For every group, why it has no gradient; empty where it has one."""
    return [
        "" if parameters(candidates.program, group) else "it has no trainable parameter"
        for group in candidates.groups
    ]


def _slopes(
    module: fx.GraphModule, names: dict[str, set[int]], loss: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every scored weight with its gradient; 0 where the loss does not depend on it."""
    leaves = {name: module.get_parameter(name) for name in names}
    slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {
        name: (leaf.detach(), slope)
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True)
    }


def _parts(
    members: list[list[Member]], each: Callable[[Member], torch.Tensor]
) -> list[Parts]:
    """The scores of every member from a number at each index of its dimension."""
    return [[per_unit(each(member), member) for member in group] for group in members]



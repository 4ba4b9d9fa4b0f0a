"""Criteria of what consumers read: activation statistics, WANDA, Optimal Brain Surgeon.

With x_nc channel c of a consumer's input at sample and position n (N of them), W the consumer's
weight, u a unit with the channels S of x:

    activation-mean    mean over n and c in S of |x_nc|
    activation-rms     sqrt(mean over n and c in S of x_nc^2)
    activation-zeros   the share of n and c in S with x_nc != 0: 1 - APoZ
                       Hu et al., Network Trimming, 2016, equation 1
    wanda              sum over c in S of |W_c|_1 * ||x_c||_2, ||x_c||_2 = sqrt(sum_n x_nc^2)
                       Sun et al., WANDA, ICLR 2024, equation 1, on a unit's input columns
    obs                trace(W_S ((H^-1)_SS)^-1 W_S^T), H = X X^T / N + damping * I
                       Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992, equation 5, with S a
                       set of columns: the squared error of the consumer's output per position
                       when S goes and least squares refits all other columns (Kwon et al., A Fast
                       Post-Training Pruning Framework for Transformers, NeurIPS 2022)

Members: the consumers of a group (`consumers`), that is linear layers, convolutions and products
with a constant; statistics count an input that several consumers read once. A weight used twice
is two consumers.

OBS of a convolution takes its kernel's taps for uncorrelated with one second moment: H is over
channels, at all places of the input, and the costs of the taps add up. A grouped convolution's H
is that of each group alone. The damping is `DAMPING` times the mean of H's diagonal (Frantar &
Alistarh, SparseGPT, ICML 2023). A consumer with more than `LARGEST` inputs gets H's diagonal
alone, sum over c in S of H_cc |W_c|_2^2, so that memory stays bounded: all second moments are kept
until the data is through. activation-zeros tells units apart only where values are exactly zero,
as after ReLU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from pruna_ir.passes.activation_evidence import activation_evidence
from pruna_ir.passes.consumers import Consumer, Ids, Reading, distinct, readings
from pruna_ir.passes.evidence import Evidence
from pruna_ir.passes.scored_members import Candidates, Parts, Scores

DAMPING = 0.01
"""What is added to H's diagonal, as a share of its mean."""
LARGEST = 4096
"""The most inputs of a consumer for which OBS refits."""
_CHUNK = 1 << 24
"""Elements of a weight lifted to float64 at a time."""

Score = Callable[[Candidates, Reading, Evidence], Scores]


def activation_mean(candidates: Candidates) -> list[Parts]:
    """The mean magnitude of what consumers read."""
    return _scored(candidates, ("abs",), lambda _, r, seen: _mean(r, seen, "abs"), once=True)


def activation_rms(candidates: Candidates) -> list[Parts]:
    """The root mean square of what consumers read."""
    return _scored(
        candidates, ("square",), lambda _, r, seen: np.sqrt(_mean(r, seen, "square")), once=True
    )


def activation_zeros(candidates: Candidates) -> list[Parts]:
    """The share of what consumers read that is not zero."""
    return _scored(
        candidates, ("zeros",), lambda _, r, seen: 1.0 - _mean(r, seen, "zeros"), once=True
    )


def wanda(candidates: Candidates) -> list[Parts]:
    """Magnitudes of a consumer's columns times the norm of what they read."""
    known: dict[Consumer, Scores] = {}

    def score(candidates: Candidates, reading: Reading, seen: Evidence) -> Scores:
        consumer = reading.consumer
        if consumer not in known:
            sizes = consumer.columns(candidates.program).abs().sum(1, dtype=torch.float64)
            norms = seen[f"{consumer.key}/square"].sqrt()
            known[consumer] = np.asarray((sizes * norms).cpu().numpy())
        return reading.per_unit(known[consumer])

    return _scored(candidates, ("square",), score)


def obs(candidates: Candidates) -> list[Parts]:
    """The squared error that a consumer is left with after a least-squares refit."""
    found = readings(candidates)
    wanted: dict[str, tuple[Consumer, tuple[str, ...]]] = {}
    for each in found:
        for reading in each:
            wanted[reading.consumer.key] = (reading.consumer, (_obs_needs(reading.consumer),))
    seen = activation_evidence(
        candidates.program, wanted, candidates.context, window=candidates.window
    )
    return _by_consumer(candidates, found, seen)


def _scored(
    candidates: Candidates, statistics: tuple[str, ...], score: Score, *, once: bool = False
) -> list[Parts]:
    found = readings(candidates)
    if once:
        found = [distinct(each) for each in found]
    wanted: Mapping[str, tuple[Consumer, tuple[str, ...]]] = {
        reading.consumer.key: (reading.consumer, statistics)
        for each in found
        for reading in each
    }
    seen = activation_evidence(
        candidates.program, wanted, candidates.context, window=candidates.window
    )
    return [[score(candidates, reading, seen) for reading in each] for each in found]


def _mean(reading: Reading, seen: Evidence, statistic: str) -> Scores:
    key = reading.consumer.key
    sums = reading.per_unit(seen[f"{key}/{statistic}"].double().cpu().numpy())
    return np.asarray(sums / (reading.table.shape[1] * max(int(seen[f"{key}/count"]), 1)))


# -- Optimal Brain Surgeon -----------------------------------------------------------------------


def _obs_needs(consumer: Consumer) -> str:
    return "gram" if consumer.size <= LARGEST else "square"


def _by_consumer(
    candidates: Candidates, found: list[list[Reading]], seen: Evidence
) -> list[Parts]:
    """The costs, consumer by consumer, so that one inverse is alive at a time."""
    order: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for number, each in enumerate(found):
        for place, reading in enumerate(each):
            key = (reading.consumer.key, reading.consumer.groups)
            order.setdefault(key, []).append((number, place))
    parts: list[Parts] = [[np.zeros(0)] * len(each) for each in found]
    for places in order.values():
        costs = _costs(candidates, [found[number][place] for number, place in places], seen)
        for (number, place), cost in zip(places, costs, strict=True):
            parts[number][place] = cost
    return parts


def _costs(candidates: Candidates, found: list[Reading], seen: Evidence) -> list[Scores]:
    """The costs of what consumers of one input read."""
    inverse = inverse_moment(found[0].consumer, seen)
    columns = {r.consumer: r.consumer.columns(candidates.program) for r in found}
    if all(reading.table.shape[1] == 1 for reading in found) and inverse.dim() == 2:
        inverse = inverse.diagonal()
    return [removal_cost(columns[r.consumer], inverse, r.table) for r in found]


def inverse_moment(consumer: Consumer, seen: Evidence) -> torch.Tensor:
    """The inverse of the damped second moment of a consumer's input.

    Returns:
        [channels, channels], or its diagonal [channels] where there are more than `LARGEST`.
    """
    moment = seen[f"{consumer.key}/{_obs_needs(consumer)}"]
    moment = moment / max(int(seen[f"{consumer.key}/count"]), 1)
    diagonal = moment.diagonal() if moment.dim() == 2 else moment
    damping = DAMPING * float(diagonal.mean()) or 1.0
    if moment.dim() == 1:
        return 1.0 / (moment + damping)
    if consumer.groups > 1:
        channel = torch.arange(consumer.size, device=moment.device)
        group = channel // (consumer.size // consumer.groups)
        moment = moment * (group[:, None] == group)
    damped = moment + damping * torch.eye(len(moment), device=moment.device, dtype=moment.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def removal_cost(columns: torch.Tensor, inverse: torch.Tensor, table: Ids) -> Scores:
    """trace(W_S ((H^-1)_SS)^-1 W_S^T) for every unit's columns S, [units].

    Args:
        columns: [channels, entries], the transposed weight.
        inverse: the inverse of H, [channels, channels], or its diagonal [channels], which is all
            that single columns need.
        table: [units, channels per unit].

    >>> weight = torch.tensor([[1.0], [2.0]])
    >>> removal_cost(weight, torch.eye(2).double() / 4, np.array([[0], [1]]))
    array([ 4., 16.])
    """
    index = torch.from_numpy(table).to(columns.device)
    if inverse.dim() == 1:
        norms = torch.linalg.vector_norm(columns[index], 2, -1, dtype=torch.float64)
        return np.asarray((norms.square() / inverse[index]).sum(1).cpu().numpy())
    at_once = max(1, _CHUNK // max(columns.shape[1] * table.shape[1], 1))
    return np.concatenate(
        [_block_costs(columns, inverse, part) for part in torch.split(index, at_once)]
    )


def _block_costs(columns: torch.Tensor, inverse: torch.Tensor, index: torch.Tensor) -> Scores:
    blocks = inverse[index[:, :, None], index[:, None, :]]  # [units, k, k]
    chosen = columns[index].double()  # [units, k, entries]
    energy = chosen @ chosen.transpose(1, 2)
    cost = torch.linalg.solve(blocks, energy).diagonal(dim1=1, dim2=2).sum(1)
    return np.asarray(cost.cpu().numpy())

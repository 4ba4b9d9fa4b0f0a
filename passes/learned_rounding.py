"""Learned rounding: which weights of a linear map go up and which go down, as a plain function.

For y = W x at many positions, with a step s per output, the rounded weights are sought as

    W~ = s clip(floor(W / s) + h(V), qmin, qmax)                          equation (22)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)                  equation (23)
    minimise  E[|f(y) - f(W~ x~)|^2] + lambda sum(1 - |2 h(V) - 1|^beta)  (21), (24), (25)

with zeta = 1.1, gamma = -0.1, f an activation (or none) and x~ the inputs that the quantised
program really has. beta falls from 20 to 2, so that h(V) first moves freely, then to 0 or 1.
Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020.

The squared error of each output is counted in units of what rounding to nearest costs it, times
its number of weights: one lambda then serves layers of every size and magnitude. The paper's
lambda is in the units of the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ZETA, _GAMMA = 1.1, -0.1
_BETA = (20.0, 2.0)
_WARM_UP = 0.2
"""The share of the iterations that run without the regulariser."""


@dataclass(frozen=True)
class Training:
    """How the rounding is learned.

    Attributes:
        iterations: the number of steps of Adam.
        batch: the positions of each step, drawn at random.
        rate: the learning rate.
        strength: the lambda above.
    """

    iterations: int = 1000
    batch: int = 2048
    rate: float = 0.01
    strength: float = 0.1


@dataclass(frozen=True)
class Problem:
    """A linear map whose weights are to be rounded.

    Attributes:
        x: the inputs at each position, [groups, positions, inputs].
        y: the outputs wanted there, [groups, positions, outputs].
        weight: the weights in steps, W / s, [groups, outputs, inputs].
        step: s, [groups, outputs, 1].
        bias: what is added to the outputs, [groups, 1, outputs].
        low: the smallest integer of the grid, less its zero point.
        high: the largest one; each a number or a tensor that broadcasts with the weights.
        bounds: an activation clips outputs to this interval; None where there is none.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    step: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor
    bounds: tuple[float, float] | None = None

    def activated(self, y: Tensor) -> Tensor:
        """An output behind the activation."""
        return y if self.bounds is None else y.clamp(*self.bounds)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V), equation (23).

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)


def inverse(h: Tensor) -> Tensor:
    """The V of a value of h inside [0, 1].

    >>> rectified_sigmoid(inverse(torch.tensor([0.0, 0.25, 1.0])))
    tensor([0.0000, 0.2500, 1.0000])
    """
    return torch.logit((h - _GAMMA) / (_ZETA - _GAMMA))


def regulariser(h: Tensor, beta: float) -> Tensor:
    """The sum of 1 - |2 h - 1|^beta, equation (24): 0 exactly where every h is 0 or 1."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()


def annealed(done: float) -> float:
    """beta at a share of the iterations behind the warm-up: linear from 20 to 2.

    >>> annealed(0.0), annealed(1.0)
    (20.0, 2.0)
    """
    return _BETA[1] + (_BETA[0] - _BETA[1]) * (1.0 - done)


def learn_rounding(
    problem: Problem,
    training: Training,
    generator: torch.Generator,
    tick: Callable[[int], None] = lambda _done: None,
) -> Tensor:
    """The rounded weights in steps, integers as float, [groups, outputs, inputs].

    Each is one of the two integers next to the weight (clipped to the grid); a weight that is an
    integer already stays.

    Args:
        problem: the map.
        training: how to learn.
        generator: draws the positions.
        tick: called with the number of steps done.
    """
    floor = problem.weight.floor()
    fraction = problem.weight - floor
    v = inverse(fraction).detach().requires_grad_()
    optimiser = torch.optim.Adam([v], lr=training.rate)
    unit = _unit(problem)
    positions = problem.x.shape[1]
    warm = int(_WARM_UP * training.iterations)
    for iteration in range(training.iterations):
        chosen = torch.randint(positions, (min(training.batch, positions),), generator=generator)
        h = rectified_sigmoid(v)
        loss = (_error(problem, floor + h, chosen.to(v.device)) / unit).sum()
        if iteration >= warm:
            done = (iteration - warm) / max(training.iterations - warm, 1)
            loss = loss + training.strength * regulariser(h, annealed(done))
        (v.grad,) = torch.autograd.grad(loss, [v])
        optimiser.step()
        tick(iteration + 1)
    up = (rectified_sigmoid(v.detach()) >= 0.5) & (fraction > 0)
    return _clipped(problem, floor + up)


def nearest(problem: Problem) -> Tensor:
    """The weights in steps, rounded to nearest as the fake-quant does."""
    return _clipped(problem, problem.weight.round())


def _clipped(problem: Problem, levels: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(levels, problem.low), problem.high)


def _error(problem: Problem, levels: Tensor, chosen: Tensor) -> Tensor:
    """The mean squared error of each output at the chosen positions, [groups, outputs]."""
    weight = _clipped(problem, levels) * problem.step
    made = torch.baddbmm(problem.bias, problem.x[:, chosen], weight.mT)
    wanted = problem.y[:, chosen]
    return (problem.activated(made) - problem.activated(wanted)).square().mean(1)


def _unit(problem: Problem) -> Tensor:
    """What rounding to nearest costs an output on average, per weight of it; 1 for nothing."""
    change = (nearest(problem) - problem.weight) * problem.step
    cost = torch.stack(
        [(part @ delta.mT).square().mean(0) for part, delta in zip(problem.x, change, strict=True)]
    ) / change.shape[-1]
    return torch.where(cost > 0, cost, torch.ones_like(cost))

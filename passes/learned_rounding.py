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
_CHUNK = 1 << 22
"""Elements of the inputs that are held in float64 at a time."""
_WARM_UP = 0.2
"""The share of the iterations that run without the regulariser."""


@dataclass(frozen=True)
class Training:
    """How the rounding is learned.

    Attributes:
        iterations: the number of steps of Adam.
        batch: the positions of each step, drawn at random; all where there are no more.
        rate: the learning rate.
        strength: the lambda above.
    """

    iterations: int = 1000
    batch: int = 2048
    rate: float = 0.01
    strength: float = 1.0


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
    warm = int(_WARM_UP * training.iterations)
    for iteration in range(training.iterations):
        h = rectified_sigmoid(v)
        loss = (_error(problem, floor + h, training.batch, generator) / unit).sum()
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


def refined(problem: Problem, levels: Tensor) -> Tensor:
    """A rounding from which no change of a single weight lowers the squared error.

    From the given one, the weight of each output whose other rounding lowers the error of the
    linear map (without the activation) most is changed, again and again. With H = X^T X and g the
    gradient of an output's error, changing weight i by d costs 2 d g_i + d^2 H_ii, and g moves by
    d H_i: no position is looked at twice.
    """
    floor = problem.weight.floor()
    ends = _clipped(problem, floor), _clipped(problem, torch.ceil(problem.weight))
    step = problem.step.double().expand_as(problem.weight)
    squares, slope = _moments(problem, levels.double() * step)
    diagonal = squares.diagonal(dim1=-2, dim2=-1)[:, None]
    found = levels.double()
    for _ in range(2 * problem.weight.shape[-1]):
        move = (ends[0] + ends[1] - found) - found
        cost = 2.0 * move * step * slope + (move * step).square() * diagonal
        least, index = cost.min(-1, keepdim=True)
        better = least < -1e-9 * (slope * move * step).abs().amax(-1, keepdim=True)
        if not bool(better.any()):
            break
        change = torch.where(better, move.gather(-1, index), 0.0)
        found = found.scatter_add(-1, index, change)
        size = change * step.gather(-1, index)
        groups = torch.arange(len(index), device=index.device)[:, None]
        slope += size * squares[groups, index[..., 0]]
    return found.to(levels.dtype)


def _moments(problem: Problem, weight: Tensor) -> tuple[Tensor, Tensor]:
    """X^T X [groups, inputs, inputs] and E^T X [groups, outputs, inputs] of the errors E."""
    squares, slope = torch.zeros(2, 1, 1, 1, dtype=torch.float64, device=weight.device)
    rows = max(1, _CHUNK // max(1, problem.x[:, :1].numel()))
    pairs = zip(torch.split(problem.x, rows, 1), torch.split(problem.y, rows, 1), strict=True)
    for x, y in pairs:
        part = x.double()
        error = torch.baddbmm(problem.bias.double(), part, weight.mT) - y
        squares = squares + part.mT @ part
        slope = slope + error.mT @ part
    return squares, slope


def _clipped(problem: Problem, levels: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(levels, problem.low), problem.high)


def _error(problem: Problem, levels: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """The mean squared error of each output at some positions, [groups, outputs]."""
    x, wanted, positions = problem.x, problem.y, problem.x.shape[1]
    if batch < positions:
        chosen = torch.randint(positions, (batch,), generator=generator).to(x.device)
        x, wanted = x[:, chosen], wanted[:, chosen]
    weight = _clipped(problem, levels) * problem.step
    made = torch.baddbmm(problem.bias, x, weight.mT)
    return (problem.activated(made) - problem.activated(wanted)).square().mean(1)


def _unit(problem: Problem) -> Tensor:
    """What rounding to nearest costs an output on average, per weight of it; 1 for nothing."""
    change = (nearest(problem) - problem.weight) * problem.step
    cost = torch.stack(
        [(part @ delta.mT).square().mean(0) for part, delta in zip(problem.x, change, strict=True)]
    ) / change.shape[-1]
    return torch.where(cost > 0, cost, torch.ones_like(cost))

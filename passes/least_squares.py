"""Least squares from accumulated moments: no activation is kept.

For inputs x and residuals e (what a layer's output lacks) over all positions seen, the change of
weights D and of the bias d that minimises

    sum ||e - D x - d||^2 + ridge ||D||^2          ridge = damping * mean diagonal of C_xx

with the centred sums C_xx = sum (x - mean)(x - mean)^T and C_xe = sum (x - mean)(e - mean)^T is

    D = ((C_xx + ridge I)^-1 C_xe)^T               d = mean(e) - D mean(x)

The ridge pulls towards the present weights (D = 0), so that the fitted error is never above the
present one, and where the inputs are linearly dependent or fewer positions than inputs were seen
the system stays solvable. Sums are float64 and merged in batches (Chan, Golub and LeVeque,
Algorithms for Computing the Sample Variance, The American Statistician 37(3), 1983).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruna_ir.errors import PassError

ENOUGH = 16384
"""Positions of all samples together that moments are taken from, where there are as many."""
_CHUNK = 1 << 23
"""Elements of inputs that are lifted to float64 at a time."""
_BLOCK = 96
"""Products of fewer columns than twice this are computed whole."""


@dataclass
class Moments:
    """The first and second moments of inputs x and residuals e, in groups, float64.

    Attributes:
        count: the number of positions so far.
        mean_x: [groups, inputs].
        mean_e: [groups, outputs].
        xx: [groups, inputs, inputs], centred sums.
        xe: [groups, inputs, outputs], centred sums.

    >>> x, e = torch.randn(50, 1, 3), torch.randn(50, 1, 2)
    >>> whole, parts = Moments(), Moments()
    >>> whole.update(x, e)
    >>> parts.update(x[:20], e[:20])
    >>> parts.update(x[20:], e[20:])
    >>> torch.allclose(whole.xx, parts.xx) and torch.allclose(whole.xe, parts.xe)
    True
    """

    count: int = 0
    mean_x: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    mean_e: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    xx: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    xe: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def update(self, x: Tensor, e: Tensor) -> None:
        """Take in positions: x [positions, groups, inputs], e [positions, groups, outputs]."""
        step = max(1, _CHUNK // max(1, x[0].numel())) if len(x) else 1
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            self._merge(x[part].double().transpose(0, 1), e[part].double().transpose(0, 1))

    def _merge(self, x: Tensor, e: Tensor) -> None:
        new, mean_x, mean_e = x.shape[1], x.mean(1), e.mean(1)
        x, e = x - mean_x[:, None], e - mean_e[:, None]
        xx, xe = _gram(x), x.mT @ e
        if not self.count:
            self.count, self.mean_x, self.mean_e, self.xx, self.xe = new, mean_x, mean_e, xx, xe
            return
        total = self.count + new
        shift_x, shift_e = mean_x - self.mean_x, mean_e - self.mean_e
        weight = self.count * new / total
        self.xx += xx + weight * shift_x[:, :, None] * shift_x[:, None, :]
        self.xe += xe + weight * shift_x[:, :, None] * shift_e[:, None, :]
        self.mean_x = self.mean_x + shift_x * (new / total)
        self.mean_e = self.mean_e + shift_e * (new / total)
        self.count = total


def _gram(x: Tensor) -> Tensor:
    """x^T x of [groups, positions, inputs]; what the diagonal mirrors is computed once."""
    half = x.shape[-1] // 2
    if half < _BLOCK:
        return x.mT @ x
    low, high = x[..., :half], x[..., half:]
    cross = low.mT @ high
    top, bottom = torch.cat([_gram(low), cross], -1), torch.cat([cross.mT, _gram(high)], -1)
    return torch.cat([top, bottom], -2)


def ridge(diagonal_mean: Tensor, damping: float) -> Tensor:
    """The ridge of each group, [groups]; 1 where the inputs do not vary at all."""
    return torch.where(diagonal_mean > 0, damping * diagonal_mean, torch.ones_like(diagonal_mean))


def solve(moments: Moments, damping: float) -> tuple[Tensor, Tensor]:
    """The best change of weights [groups, outputs, inputs] and bias [groups, outputs], float64.

    Args:
        moments: what was seen; at least one position.
        damping: the ridge relative to the mean diagonal of C_xx, above 0.

    Raises:
        PassError: in float64, the ridge is too small for inputs that depend on one another.

    >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])  # rank 1
    >>> seen = Moments()
    >>> seen.update(x[:, None], (x @ torch.tensor([[1.0], [1.0]]) + 5)[:, None])
    >>> change, bias = solve(seen, 1e-9)
    >>> torch.allclose(x.double() @ change[0].T + bias[0], x.double().sum(1, keepdim=True) + 5)
    True
    """
    diagonal = moments.xx.diagonal(dim1=-2, dim2=-1)
    strength = ridge(diagonal.mean(1), damping)
    system = moments.xx + torch.diag_embed(strength[:, None].expand_as(diagonal))
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        raise PassError(
            f"the inputs are so dependent that damping={damping} does not separate them from "
            "rounding; raise damping"
        )
    change = torch.cholesky_solve(moments.xe, factor).mT
    return change, moments.mean_e - (change @ moments.mean_x[:, :, None])[:, :, 0]


def enough(positions: int, samples: int) -> int:
    """How many positions of each sample to take: more than asked for where samples are few.

    >>> enough(64, samples=512), enough(64, samples=16)
    (64, 1024)
    """
    return max(positions, math.ceil(ENOUGH / max(samples, 1)))

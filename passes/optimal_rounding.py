"""Rounding a matrix so that its product, not its entries, stays near: GPTQ, and beyond.

For y = W x with H = sum x x^T over the data, the error of a rounding Q is

    sum ||W x - Q x||^2 = trace((W - Q) H (W - Q)^T)

and separates into rows. GPTQ rounds one column after another and lets the columns that are still
free make up for what each rounding cost:

    U = upper Cholesky factor of (H + ridge I)^-1
    for each column j:  e = (W_j - round(W_j)) / U_jj,   W_k -= e U_jk   for k > j

Source: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers, ICLR 2023, equations (2) and (3) and Algorithm 1, whose lazy
batches are used (the products with columns that lie ahead are done a block at a time). Columns may
be taken in the order of falling H_jj ("act-order" in the authors' code), so that inputs that carry
most are rounded while most can still make up for them.

The ridge is ``damping`` times the mean of H's diagonal. All of it runs in float64.

Two things go beyond it, in `fitted`. With levels l = q - z fixed, the error is quadratic in a
row's scales s, one per block b, so the best ones solve a system per row (`refitted`):

    Q = s_b l      A s = r      A_bc = sum over i in b, j in c of l_i H_ij l_j,  r_b likewise of W

and levels and scales are found in turn. And where the layers ahead are rounded too, x is not what
the float layer read, f; of the error

    sum ||W f - Q x||^2 = trace(D H D^T + 2 D B^T W^T + W E W^T)
    D = W - Q       B = sum (f - x) x^T       E = sum (f - x)(f - x)^T

the least, without rounding, is at W + W B (H + ridge I)^-1: that matrix is rounded in place of W,
and makes up for what came before (`Objective`). Roundings are compared by the error itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruna_ir.errors import PassError
from pruna_ir.quantization import SMALLEST_SCALE

_LAZY = 128
"""Columns between two updates of all that lie ahead."""
_CHUNK = 1 << 22
"""Elements of [rows, blocks, inputs] that are formed at a time."""
_STIFFNESS = 1e-9
"""How firmly scales stay that the data may not determine; relative to A's mean diagonal."""


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The nearest grid values of a matrix, ties to even; all tensors of one shape, float64."""
    levels = (torch.round(weight / scale) + zero).clamp_(low, high)
    found: Tensor = levels.sub_(zero).mul_(scale)
    return found


def errors(weight: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    """Each row's part of trace((W - Q) H (W - Q)^T): [outputs]."""
    lost = weight - found
    return ((lost @ gram) * lost).sum(1)


@dataclass(frozen=True)
class Objective:
    """What the rounding of a matrix costs its product over the data; float64 throughout.

    Attributes:
        weight: W, [outputs, inputs].
        gram: H, the sum of x x^T, [inputs, inputs].
        drift: B, the sum of (f - x) x^T; None where x is what the float layer reads.
        spread: E, the sum of (f - x)(f - x)^T; None likewise.
    """

    weight: Tensor
    gram: Tensor
    drift: Tensor | None = None
    spread: Tensor | None = None

    def errors(self, found: Tensor) -> Tensor:
        """Each row's part of the sum of ||W f - Q x||^2: [outputs]."""
        own = errors(self.weight, found, self.gram)
        if self.drift is None or self.spread is None:
            return own
        moved = ((self.weight - found) * (self.weight @ self.drift)).sum(1)
        return own + 2 * moved + ((self.weight @ self.spread) * self.weight).sum(1)

    def aim(self, damping: float) -> Tensor:
        """The matrix that is best without rounding, drawn towards W by the ridge."""
        if self.drift is None:
            return self.weight
        ridge = damping * float(self.gram.diagonal().mean()) or 1.0
        system = self.gram + ridge * torch.eye(
            len(self.gram), dtype=self.gram.dtype, device=self.gram.device
        )
        solved: Tensor = torch.linalg.solve(system, (self.weight @ self.drift).mT)
        return self.weight + solved.mT


@dataclass(frozen=True)
class Rounding:
    """A matrix on a grid.

    Attributes:
        levels: whole numbers q - z, [outputs, inputs].
        scale: of every element, likewise.
    """

    levels: Tensor
    scale: Tensor

    @property
    def matrix(self) -> Tensor:
        """What it stands for."""
        return self.levels * self.scale


def fitted(
    objective: Objective,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    *,
    damping: float,
    act_order: bool,
    refits: int,
    block: int,
) -> Rounding:
    """The best rounding that GPTQ and refitted scales find; no row errs more than the nearest.

    Args:
        objective: what to minimise.
        scale: of every element of W.
        zero: the zero point of every element.
        low: the least integer of the grid.
        high: the greatest.
        damping: the ridge relative to the mean diagonal of H.
        act_order: take columns by falling H_jj.
        refits: how often scales are fitted to the levels, and those found anew but the last time.
        block: how many inputs share a scale, from the start of a row on.
    """
    nearest = rounded(objective.weight, scale, zero, low, high)
    best = Rounding(torch.round(nearest / scale), scale)
    aim, current = objective.aim(damping), scale
    for number in range(max(1, refits)):
        values = gptq(
            aim, current, zero, low, high, objective.gram, damping=damping, act_order=act_order
        )
        found = Rounding(torch.round(values / current), current)
        best = _better(objective, found, best)
        if number < refits:
            current = refitted(aim, found, objective.gram, block)
            best = _better(objective, Rounding(found.levels, current), best)
    return best


def _better(objective: Objective, new: Rounding, old: Rounding) -> Rounding:
    """The one that errs less, row by row."""
    first = (objective.errors(new.matrix) < objective.errors(old.matrix))[:, None]
    return Rounding(
        torch.where(first, new.levels, old.levels), torch.where(first, new.scale, old.scale)
    )


def refitted(weight: Tensor, found: Rounding, gram: Tensor, block: int) -> Tensor:
    """The scales, of every element, with which the same levels err least; exact in float32.

    A row keeps its scales where the best ones are not all positive, or no better in float32.
    """
    inputs = weight.shape[1]
    blocks = -(-inputs // block)
    step = max(1, _CHUNK // (blocks * inputs))
    parts = [
        _refitted(weight[k : k + step], found.levels[k : k + step], s, gram, block)
        for k, s in zip(
            range(0, len(weight), step), torch.split(found.scale, step), strict=True
        )
    ]
    return torch.cat(parts)


def _refitted(weight: Tensor, levels: Tensor, scale: Tensor, gram: Tensor, block: int) -> Tensor:
    rows, inputs = weight.shape
    short = -inputs % block

    def padded(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, short))

    by_block = padded(levels).reshape(rows, -1, block)
    wide = torch.nn.functional.pad(gram, (0, short, 0, short))
    count = by_block.shape[1]
    weighed = torch.einsum("rbk,bkj->rbj", by_block, wide.reshape(count, block, -1))
    system = (weighed.reshape(rows, count, count, block) * by_block[:, None]).sum(3)
    lost = padded(weight - levels * scale)
    stiff = _STIFFNESS * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=SMALLEST_SCALE)
    system = system + stiff[:, None, None] * torch.eye(count, dtype=gram.dtype, device=gram.device)
    change: Tensor = torch.linalg.solve(system, (weighed @ lost[:, :, None])[:, :, 0])
    exact = (scale[:, ::block] + change).float().double()
    spread = exact.repeat_interleave(block, 1)[:, :inputs]
    less = errors(weight, levels * spread, gram) < errors(weight, levels * scale, gram)
    kept = less & (exact >= SMALLEST_SCALE).all(1)
    return torch.where(kept[:, None], spread, scale)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of (H + ridge I)^-1 = U^T U.

    Raises:
        PassError: in float64, the ridge is too small for inputs that depend on one another.
    """
    mean = float(gram.diagonal().mean())
    ridge = damping * mean if mean > 0 else 1.0
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if bool(failed):
        raise PassError(
            f"the inputs are so dependent that damping={damping} does not separate them from "
            "rounding; raise damping"
        )
    found: Tensor = upper
    return found


def gptq(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: int,
    high: int,
    gram: Tensor,
    *,
    damping: float,
    act_order: bool,
) -> Tensor:
    """A rounding of W whose error over the data is small: never above rounding to nearest.

    A row that nearest rounding serves better (possible, since the loop is greedy and damped) is
    rounded to nearest.

    Args:
        weight: W, [outputs, inputs], float64.
        scale: of every element, like ``weight``.
        zero: the zero point of every element, like ``weight``.
        low: the least integer of the grid.
        high: the greatest.
        gram: H, [inputs, inputs], float64.
        damping: the ridge relative to the mean diagonal of H.
        act_order: take columns by falling H_jj.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(gram[order][:, order], damping)
    taken = (weight[:, order], scale[:, order], zero[:, order])
    found = torch.empty_like(weight)
    found[:, order] = _sweep(*taken, low, high, upper)
    nearest = rounded(weight, scale, zero, low, high)
    better = errors(weight, found, gram) < errors(weight, nearest, gram)
    return torch.where(better[:, None], found, nearest)


def _sweep(
    weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, upper: Tensor
) -> Tensor:
    """Algorithm 1 over the columns in their order."""
    rest, found = weight.clone(), torch.empty_like(weight)
    count = weight.shape[1]
    for start in range(0, count, _LAZY):
        end = min(start + _LAZY, count)
        costs = torch.empty_like(weight[:, start:end])
        for j in range(start, end):
            found[:, j] = rounded(rest[:, j], scale[:, j], zero[:, j], low, high)
            cost = (rest[:, j] - found[:, j]) / upper[j, j]
            rest[:, j:end] -= cost[:, None] * upper[j, j:end]
            costs[:, j - start] = cost
        rest[:, end:] -= costs @ upper[start:end, end:]
    return found

"""Rounding a matrix so that its product, not its entries, stays near: GPTQ's inner loop.

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
"""

from __future__ import annotations

import torch
from torch import Tensor

from pruna_ir.errors import PassError

_LAZY = 128
"""Columns between two updates of all that lie ahead."""


def rounded(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The nearest grid values of a matrix, ties to even; all tensors of one shape, float64."""
    levels = (torch.round(weight / scale) + zero).clamp_(low, high)
    found: Tensor = levels.sub_(zero).mul_(scale)
    return found


def errors(weight: Tensor, found: Tensor, gram: Tensor) -> Tensor:
    """Each row's part of trace((W - Q) H (W - Q)^T): [outputs]."""
    lost = weight - found
    return ((lost @ gram) * lost).sum(1)


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

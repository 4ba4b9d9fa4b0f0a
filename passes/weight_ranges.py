"""Scales of constant weights: per output channel or tensor, by largest value or least error."""

from __future__ import annotations

import torch

from pruna_ir.quantization import Grid, QuantParameters, choose_parameters

_COARSE = torch.linspace(1.0, 0.1, 19, dtype=torch.float64)
_FINE = torch.linspace(-0.05, 0.05, 9, dtype=torch.float64)


def weight_parameters(
    weight: torch.Tensor, grid: Grid, axis: int | None, name: str, method: str = "minmax"
) -> QuantParameters:
    """One scale per index of ``axis``, or one for all where it is None, for a constant weight.

    ``minmax`` takes max|w| / qmax. ``mse`` takes, per scale, that of the least squared error among
    19 fractions of it from 1 down to 0.1, and 9 around the best of those.

    Raises:
        PassError: the weight holds NaN or infinity.

    >>> weight_parameters(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), Grid(-1, 1, True), 0, "w").scale
    tensor([2.0000, 0.5000])
    """
    if axis is None:
        rows = weight.detach().double().reshape(1, -1)
    else:
        rows = weight.detach().double().movedim(axis, 0).flatten(1)
    bound = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    best = choose_parameters(-bound, bound, grid, name, 0)
    if method != "minmax":
        best = _least_error(rows, bound, grid, name)
    if axis is None:
        return QuantParameters(best.scale[0], best.zero_point[0], grid)
    return QuantParameters(best.scale, best.zero_point, grid, axis)


def _least_error(
    rows: torch.Tensor, bound: torch.Tensor, grid: Grid, name: str
) -> QuantParameters:
    best = torch.ones_like(bound)
    least = torch.full_like(bound, torch.inf)

    def attempt(fractions: torch.Tensor) -> None:
        nonlocal best, least
        chosen = choose_parameters(-bound * fractions, bound * fractions, grid, name, 0)
        error = (chosen.reals(chosen.integers(rows)) - rows).square().sum(1)
        best, least = torch.where(error < least, fractions, best), torch.minimum(error, least)

    for fraction in _COARSE:
        attempt(torch.full_like(bound, float(fraction)))
    around = best
    for step in _FINE:
        attempt(around + step)
    return choose_parameters(-bound * best, bound * best, grid, name, 0)

"""Self-noise of programs that compute in bfloat16 or float16.

Such a program has no float32 answer to compare an artifact with: right implementations round each
result to the nearest number of its dtype, keep it in float32 up to the next operator, or sum in
another order and so round to the other neighbour. `run_rounded` runs the program in float64 and
rounds every result of a low-precision operator to one of its two neighbours at random,

    y -> u with the probability (y - d) / (u - d), else d

where d <= y <= u are numbers of the dtype (stochastic rounding: no bias, and twice the variance of
rounding to nearest). Within one operator the choice is a function of y: every implementation
rounds equal values alike, and where an image is black, its errors do not average out. What is
moved or selected stays as it is, since it is a number of the dtype already. Overflow gives
infinity, as in the dtype itself.

Limits: sums inside one operator count as exact, since kernels accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pruna_ir.equivalence import Lifted
from pruna_ir.program import Program, computed_nodes, dtype_of

LOW = (torch.bfloat16, torch.float16)
COMPUTES_IN = "computes-in"
"""The program attribute that names the dtype which its layers were cast to."""


def computes_low(program: Program) -> bool:
    """Whether a result that depends on an input is in bfloat16 or float16."""
    return any(dtype_of(node) in LOW for node in computed_nodes(program))


def run_rounded(
    program: Program, inputs: Sequence[torch.Tensor], *, seed: int
) -> tuple[torch.Tensor, ...]:
    """The outputs, in float64, of a program whose low-precision results are rounded at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return tuple(_Rounded(program, generator).run(*(value.clone() for value in inputs)))


class _Rounded(Lifted):
    """Runs a program in float64 and rounds what it computes in a lower precision."""

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        super().__init__(program)
        self._generator = generator

    def run_node(self, n: fx.Node) -> Any:
        """One node; its result lies on the grid of the node's own dtype."""
        result = super().run_node(n)
        dtype = dtype_of(n)
        if n.op != "call_function" or dtype not in LOW or not isinstance(result, torch.Tensor):
            return result
        return rounded(result, dtype, self._generator)


def rounded(x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Each float64 number as one of its two neighbours in a dtype, at random and unbiased.

    Equal numbers go to the same neighbour.

    >>> x = torch.linspace(1.0, 1.0078125, 1001, dtype=torch.float64)
    >>> found = rounded(x, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> sorted(set(found.tolist())), abs(float(found.mean() - x.mean())) < 5e-4
    ([1.0, 1.0078125], True)
    """
    below = x.to(dtype).double()
    # Towards x from the nearest number is the other neighbour.
    direction = torch.where(x > below, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(x.to(dtype), direction).double()
    share = ((x - below) / (other - below)).nan_to_num(0.0)
    between = torch.isfinite(other) & (x != below)
    return torch.where(between & (_draws(x, generator) < share), other, below)


def _draws(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform numbers in [0, 1), the same for values that are equal in float32.

    The bits of a value and a random number, mixed as SplitMix64 does (Steele et al., 2014).
    """
    salt = int(torch.randint(2**62, (), generator=generator))
    mixed: torch.Tensor = x.float().view(torch.int32).long() * _GOLDEN + salt
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    bits = _shifted(mixed ^ _shifted(mixed, 31), 11)
    return bits.double() * 2.0**-53


def _shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """Bits shifted to the right without their sign."""
    kept: torch.Tensor = (x >> count) & (2 ** (64 - count) - 1)
    return kept


_GOLDEN, _FIRST, _SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""The constants of SplitMix64 as signed 64-bit integers."""

"""Self-noise of programs that compute in bfloat16 or float16.

Such a program has no float32 answer to compare an artifact with: right implementations round each
result to the nearest number of its dtype, keep it in float32 up to the next operator, or sum in
another order and so round to the other neighbour. `run_rounded` runs the program in float64 and
rounds every result of a low-precision operator to one of its two neighbours at random,

    y -> u with the probability (y - d) / (u - d), else d

where d <= y <= u are numbers of the dtype (stochastic rounding: no bias, and twice the variance of
rounding to nearest). What is moved or selected stays as it is, since it is a number of the dtype
already. Overflow gives infinity, as in the dtype itself.

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

    >>> x = torch.full((1000,), 1 + 2.0**-10, dtype=torch.float64)
    >>> found = rounded(x, torch.bfloat16, torch.Generator().manual_seed(0))
    >>> sorted(set(found.tolist())), abs(float(found.mean() - x.mean())) < 2.0**-11
    ([1.0, 1.0078125], True)
    """
    nearest = x.to(dtype)
    # Towards x from the nearest number is the other neighbour.
    direction = torch.where(x > nearest.double(), torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, direction).double()
    below = nearest.double()
    share = ((x - below) / (other - below)).nan_to_num(0.0)
    draws = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    between = torch.isfinite(other) & (x != below)
    return torch.where(between & (draws < share), other, below)

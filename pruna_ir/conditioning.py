"""Conditioning: differences that a program shows against itself tell nothing about another.

Float64 tells right from wrong only where the function is stable. An all-zero image can be a
singular point: an instance norm divides what rounding left of a constant by its spread, and a
deep net of them turns 1e-16 into 1. So where a difference is found, the program before the pass
is run again with other roundings: each value v that a node computes becomes

    v (1 + PERTURBATION n)        n standard normal, seeded

and the difference says nothing if it is within ROUNDING_FACTOR of how far the outputs moved.
Well-conditioned networks move by 1e-14 to 1e-11, far below the tolerance, which alone decides
there. Exact zeros stay exact, so that a stimulus of zeros still tells ``x > 0`` from ``x >= 0``.

Examples and data are never set aside, whatever moves there: a check that passes has compared
every output on inputs of the program's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pruna_ir.equivalence import (
    LIFTED_TOLERANCE,
    ROUNDING_FACTOR,
    Lifted,
    differences,
    run_float64,
)
from pruna_ir.program import Program
from pruna_ir.stimuli import Stimulus

PERTURBATION = 1e-14
"""Size of the relative noise that stands for float64 rounding: 45 units in the last place."""

_DRAWS = 2

_OWN = ("example", "data")
"""The stimuli that are never set aside."""


class _Rounded(Lifted):
    """A float64 run in which every computed value is off by a rounding error."""

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        super().__init__(program)
        self._generator = generator

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call's result with noise, unless it only shows values of its operands."""
        result = super().call_function(target, args, kwargs)
        schema = getattr(target, "_schema", None)
        if schema is None or any(value.alias_info for value in schema.returns):
            return result
        return pytree.tree_map(self._off, result)

    def _off(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return value
        noise = torch.randn(value.shape, generator=self._generator, dtype=torch.float64)
        return value * (1 + PERTURBATION * noise)


def movement(program: Program, inputs: Sequence[torch.Tensor]) -> list[float]:
    """How far each output moves, relative to its largest value, when the roundings differ.

    >>> from pruna_ir.capture import capture
    >>> x = torch.ones(2, 3)
    >>> program = capture(torch.nn.Linear(3, 2), (x,))
    >>> 1e-15 < movement(program, (x,))[0] < 1e-12
    True
    """
    generator = torch.Generator().manual_seed(0)
    outputs = run_float64(program, inputs)
    with torch.no_grad():
        draws = [
            differences(_Rounded(program, generator).run(*(x.clone() for x in inputs)), outputs)
            for _ in range(_DRAWS)
        ]
    return [max(errors) for errors in zip(*draws, strict=True)]


def place(stimulus: Stimulus, program: Program, position: int) -> str:
    """Words for an output on a stimulus."""
    return f"stimulus '{stimulus.kind}', output {program.outputs[position].name}"


class Comparison:
    """Collects float64 differences over stimuli, without those that the program itself shows.

    Attributes:
        found: the error of every output that counts, and its place.
        notes: a sentence for each stimulus on which the program is unstable.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.found: list[tuple[float, str]] = []
        self.notes: list[str] = []

    def add(
        self, stimulus: Stimulus, new: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
    ) -> list[int]:
        """Compare all outputs on one stimulus; the positions of those that count."""
        errors = list(differences(new, truth))
        unstable = self._unstable(stimulus, errors)
        if unstable:
            self.notes.append(self._note(stimulus, unstable))
        aside = {} if stimulus.kind in _OWN else unstable
        counted = [position for position in range(len(errors)) if position not in aside]
        self.found += [(errors[p], place(stimulus, self._program, p)) for p in counted]
        return [position for position in counted if position < min(len(new), len(truth))]

    def _unstable(self, stimulus: Stimulus, errors: Sequence[float]) -> dict[int, float]:
        """By position, how far the program itself moves, where that is as far as the error."""
        suspects = [p for p, error in enumerate(errors) if LIFTED_TOLERANCE < error < math.inf]
        if not suspects:
            return {}
        moved = movement(self._program, stimulus.inputs)
        return {
            p: moved[p]
            for p in suspects
            if LIFTED_TOLERANCE < moved[p] < math.inf and errors[p] <= ROUNDING_FACTOR * moved[p]
        }

    def _note(self, stimulus: Stimulus, unstable: dict[int, float]) -> str:
        position = max(unstable, key=lambda p: unstable[p])
        outputs = self._program.outputs
        remedy = "; give inputs where it is stable" if stimulus.kind in _OWN else ""
        return (
            f"stimulus '{stimulus.kind}' says nothing about {len(unstable)} of {len(outputs)} "
            f"outputs: the program's own {outputs[position].name} moves by "
            f"{unstable[position]:.1g} when its roundings differ by {PERTURBATION:.0e}{remedy}"
        )

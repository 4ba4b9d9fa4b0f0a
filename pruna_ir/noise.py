"""Self-noise: how far a quantised program strays from itself when each rounding sees a bit of noise.

A quantised program is a staircase, so implementations that differ in the last bit before a
rounding differ by a whole step after it. `run_noisy` runs the program in float64 with

    fake_quant(x + u * scale)        u uniform in [-NOISE_STEPS, NOISE_STEPS]

at every activation: the freedom that a right integer implementation has, whose int32 biases
(rounded to scale_x * scale_w) and float requantisation miss the exact value by a fraction of a
step. Weights are rounded ahead of time, exactly, and see no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pruna_ir.call import Call
from pruna_ir.equivalence import Lifted
from pruna_ir.program import Program

NOISE_STEPS = 1 / 32
"""The largest noise before a rounding, in quantisation steps."""


def is_fake_quant(node: fx.Node) -> bool:
    """Whether a node rounds to an integer grid."""
    return str(node.target) == "pruna.fake_quant.default"


class _Noisy(Lifted):
    """Runs a program in float64 with noise before each rounding of an activation."""

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        super().__init__(program)
        self._program = program
        self._generator = generator

    def run_node(self, n: fx.Node) -> Any:
        """One node; a fake-quant of a computed value sees it off by a fraction of a step."""
        if n.op != "call_function" or not is_fake_quant(n):
            return super().run_node(n)
        call = Call(self._program, n)
        source, steps = call.producer("x"), call.producer("scale")
        if source is None or steps is None or source.op == "get_attr":
            return super().run_node(n)
        x, scale = self.env[source], self.env[steps]
        axis = call.arg("axis")
        if axis is not None:
            scale = scale.reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))
        noise = torch.rand(x.shape, generator=self._generator, dtype=torch.float32) * 2 - 1
        self.env[source] = x + noise * (scale * NOISE_STEPS)
        try:
            return super().run_node(n)
        finally:
            self.env[source] = x


def run_noisy(
    program: Program, inputs: Sequence[torch.Tensor], *, seed: int
) -> tuple[torch.Tensor, ...]:
    """The outputs, in float64, of a quantised program with noise before each rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return tuple(_Noisy(program, generator).run(*inputs))

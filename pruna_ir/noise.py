"""Self-noise: how far a quantised program strays from itself when its roundings see noise.

A quantised program is a staircase, so implementations that differ in the last bit before a
rounding differ by a whole step after it. `run_noisy` runs the program in float64 with

    fake_quant(x + u * scale)        u uniform in [-NOISE_STEPS, NOISE_STEPS]

at every activation, where moreover the one value nearest to a rounding boundary, if within
NEAREST_STEPS, goes to its other side: in a small program no value may happen to lie within the
noise, and still one that rounds differently, after an earlier one did, is right.

That is the freedom of a right integer implementation. Its int32 biases, rounded to
scale_x * scale_w, miss by about 1/1000 step of the result, and it requantises in float32.
On narrower grids those biases miss by more, a tenth of a step for 4-bit weights and activations;
so there every second run rounds them as integer kernels do, to scale_x * scale_w.
Weights are rounded ahead of time, exactly, and see no noise. Deep programs amplify any noise: on
a ResNet-18 with random weights the SQNR falls from 28.0 to 26.7 dB between 1/512 and 1/32 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.equivalence import Lifted
from pruna_ir.program import Program, computed_nodes

NOISE_STEPS = 1 / 512
"""The largest noise before a rounding, in quantisation steps."""
NEAREST_STEPS = 1 / 4
"""How near to a rounding boundary the one value must be that is pushed over it, in steps."""


def is_fake_quant(node: fx.Node) -> bool:
    """Whether a node rounds to an integer grid."""
    return str(node.target) == "pruna.fake_quant.default"


_BIASED = {
    "aten.addmm": ("mat1", "mat2", "self"),
    "pruna.conv_act": ("x", "weight", "bias"),
    **{
        f"aten.{name}": ("input", "weight", "bias")
        for name in ("conv1d", "conv2d", "conv3d", "linear")
    },
}
"""The names of input, weight and bias of the layers that integer kernels give integer biases."""
_FULL_BITS = 16
"""The bits of input and weight together from which on `NOISE_STEPS` covers a bias's rounding."""


class _Noisy(Lifted):
    """Runs a program in float64 with noise before each rounding of an activation."""

    def __init__(
        self, program: Program, generator: torch.Generator, *, integer_biases: bool
    ) -> None:
        super().__init__(program)
        self._program = program
        self._generator = generator
        self._computed = computed_nodes(program)
        self._integer_biases = integer_biases

    def run_node(self, n: fx.Node) -> Any:
        """One node; a fake-quant of a computed value sees it off by a fraction of a step."""
        if self._integer_biases and (found := self._rounded_bias(n)) is not None:
            bias, value = found
            exact, self.env[bias] = self.env[bias], value
            try:
                return super().run_node(n)
            finally:
                self.env[bias] = exact
        if n.op != "call_function" or not is_fake_quant(n):
            return super().run_node(n)
        call = Call(self._program, n)
        source, steps = call.producer("x"), call.producer("scale")
        if source is None or steps is None or source not in self._computed:
            return super().run_node(n)
        x, scale = self.env[source], self.env[steps]
        axis = call.arg("axis")
        if axis is not None:
            scale = scale.reshape([-1] + [1] * (x.dim() - 1 - axis % x.dim()))
        self.env[source] = _pushed(x / scale, self._generator) * scale
        try:
            return super().run_node(n)
        finally:
            self.env[source] = x


    def _rounded_bias(self, n: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
        """The bias of a layer on narrow grids, and its value in steps of scale_x * scale_w."""
        names = _BIASED.get(str(n.target).rpartition(".")[0]) if n.op == "call_function" else None
        if names is None:
            return None
        call = Call(self._program, n)
        x, weight, bias = (call.producer(name) for name in names)
        if x is None or weight is None or bias is None or bias.op != "get_attr":
            return None
        if not (is_fake_quant(x) and is_fake_quant(weight)):
            return None
        scales = [Call(self._program, fake).parameter("scale") for fake in (x, weight)]
        if _bits(x) + _bits(weight) >= _FULL_BITS or scales[0] is None or scales[1] is None:
            return None
        step = scales[0].double() * scales[1].double()
        return bias, torch.round(self.env[bias] / step) * step


def _bits(fake: fx.Node) -> int:
    bound = bind_arguments(fake)
    return int(bound["qmax"] - bound["qmin"]).bit_length()


def _pushed(levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values in units of a step, with noise, and with the most undecided one decided otherwise."""
    noise = torch.rand(levels.shape, generator=generator, dtype=torch.float32) * 2 - 1
    # Contiguous, since one element is written by its number; a permuted value is not.
    noisy = (levels + noise * NOISE_STEPS).contiguous()
    if not levels.numel():
        return noisy
    offset = (levels - levels.floor() - 0.5).reshape(-1)  # from the boundary
    nearest = int(offset.abs().argmin())
    distance = float(offset[nearest])
    if abs(distance) <= NEAREST_STEPS:
        value = levels.reshape(-1)[nearest]
        # A tie goes to the even side: not always up.
        goes_down = bool(value.round() == value.floor())
        noisy.view(-1)[nearest] = float(value) - distance + (1e-3 if goes_down else -1e-3)
    return noisy


def run_noisy(
    program: Program, inputs: Sequence[torch.Tensor], *, seed: int
) -> tuple[torch.Tensor, ...]:
    """The outputs, in float64, of a quantised program with noise before each rounding.

    Biases of layers on narrow grids are rounded where ``seed`` is odd.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return tuple(_Noisy(program, generator, integer_biases=seed % 2 == 1).run(*inputs))

"""Self-noise: how a quantised program strays from itself, for values of any memory layout."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.kernels.fake_quant import KERNEL
from pruna_ir.noise import NOISE_STEPS, run_noisy

SCALE = 0.125


class Rounded(nn.Module):
    """One rounding to u8, of a value that is permuted first, and perhaps copied."""

    def __init__(self, *, copied: bool) -> None:
        super().__init__()
        self.copied = copied
        self.register_buffer("scale", torch.tensor(SCALE))
        self.register_buffer("zero", torch.tensor(128, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(2, 0, 1)
        x = x.clone(memory_format=torch.contiguous_format) if self.copied else x
        return KERNEL.op(x, self.scale, self.zero, None, 0, 255)


def noisy(x: torch.Tensor, *, copied: bool) -> torch.Tensor:
    program = capture(Rounded(copied=copied).eval(), (x,), dynamic_batch=False)
    return run_noisy(program, (x,), seed=3)[0]


def test_a_permuted_value_sees_the_noise_of_its_copy() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5)
    assert torch.equal(noisy(x, copied=False), noisy(x, copied=True))


def test_only_the_most_undecided_value_goes_to_its_other_side() -> None:
    # In steps: 0.1 and 2.9 are far from a boundary, 1.4 is nearest.
    steps = torch.tensor([[[0.1, 1.4, 2.9]]])
    got = noisy(steps * SCALE, copied=False).flatten() / SCALE
    assert got.tolist() == [0.0, 2.0, 3.0]
    assert NOISE_STEPS < 0.1


class Layer(nn.Module):
    """A linear layer of one input, 1, and weight, 1: its result is 1 and the bias."""

    def __init__(self, bits: int, step: float) -> None:
        super().__init__()
        self.bits = bits
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.bias = nn.Parameter(torch.tensor([0.3 * step * step]))
        self.register_buffer("scale", torch.tensor(step))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        most = 2 ** (self.bits - 1) - 1
        x, weight = (
            KERNEL.op(v, self.scale, self.zero, None, -most, most) for v in (x, self.weight)
        )
        return nn.functional.linear(x, weight, self.bias)


def test_biases_on_narrow_grids_are_those_of_integer_kernels_in_every_second_run() -> None:
    x = torch.ones(2, 1)
    for bits, integer in ((4, True), (8, False)):
        program = capture(Layer(bits, step=0.25).eval(), (x,))
        results = [float(run_noisy(program, (x,), seed=seed)[0][0, 0]) for seed in (0, 1)]
        assert abs(results[0] - 1.01875) < 1e-7
        # 0.3 steps of the product of both scales round to none.
        assert (results[1] == 1.0) is integer

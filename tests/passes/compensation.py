"""Networks, data and controls that the tests of the compensation passes share."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.program import Program
from pruna_ir.transform import Context, Pass, PassResult, Rewrite, apply
from tests.networks import seeded

SPOILT = {
    "zeroed": torch.zeros_like,
    "doubled": lambda t: t * 2,
    "a hundredth more": lambda t: t * 1.01,
    "NaN": lambda t: t * float("nan"),
}
UNBIASED = {"unbiased": lambda t: t * (1800 / 1799)}  # of 50 samples of 36 positions


class Mlp(nn.Module):
    """Linear layers alone: the removed neurons are combinations of the kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 9), nn.Linear(9, 7), nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(torch.relu(self.two(self.one(x))))


class Layers(nn.Module):
    """Every way in which a bias may be missing: input float32[batch, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.normed = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.bare = nn.Conv2d(5, 8, 3, stride=2, bias=False)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2)
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.normed(torch.relu(self.first(x)))))
        x = torch.relu(self.grouped(torch.relu(self.bare(x)))).mean((2, 3))
        return self.last(torch.tanh(x @ self.weight))


class Residual(nn.Module):
    """Two residual blocks: input float32[batch, 4, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


def program_of(factory: type[nn.Module], *shape: int, seed: int = 0) -> Program:
    """The captured module with seeded weights."""
    return capture(seeded(factory, seed), (torch.randn(2, *shape),))


def context(*shape: int, samples: int = 50, batch: int = 16, seed: int = 0) -> Context:
    """Seeded calibration data in uneven batches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, *shape, generator=generator) + 0.3
    return Context(data=TensorData((x,), batch_size=batch), seed=seed)


def kept_promise(pass_: Pass, program: Program, where: Context) -> PassResult:
    """The pass's result, verified and checked."""
    result = apply(pass_, program, where)
    verify(result.program)
    if result.modified:
        report = check(pass_, program, result.program, context=where,
                       assurances=result.assurances)  # fmt: skip
        assert report.passed, report
        assert result.program.origin is program.origin
    return result


def spoilt(result: PassResult, name: str, how: str) -> Program:
    """The result with one tensor made wrong."""
    rw = Rewrite(result.program, "spoil", Context())
    rw.set_tensor(name, (SPOILT | UNBIASED)[how](rw.program.tensor(name).detach()))
    rw.set_origin(result.program.origin)
    return rw.finish()


def promise_of_spoilt(
    pass_: Pass, program: Program, result: PassResult, where: Context, name: str, how: str
) -> bool:
    """Whether the check passes although a tensor is wrong."""
    wrong = spoilt(result, name, how)
    return check(pass_, program, wrong, context=where, assurances=result.assurances).passed

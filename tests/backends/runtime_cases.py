"""What every runtime must get right, and the planted faults that its audit and certificate see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.certify import certify
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.program import Program
from pruna_ir.transform import Context, Rewrite


class Lookup(nn.Module):
    """Integer inputs, two dynamic dimensions, two outputs with names, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)
        self.norm = nn.LayerNorm(8)
        self.query = nn.Linear(8, 24)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.table(ids))
        q, k, v = self.query(x).chunk(3, -1)
        bias = torch.where(mask, 0.0, -1e4)[:, None, :]
        weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5 + bias, -1)
        y = weights @ v
        return {"states": y, "pooled": torch.tanh(y.mean(1))}


def lookup() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 17, (2, 6))
    dims = {"ids": {1: "length"}, "mask": {1: "length"}}
    return capture(Lookup().eval(), (ids, ids > 3), dynamic_dims=dims)


class Odd(nn.Module):
    """Odd shapes: 63 channels, groups, dilation, no bias, transposed convolution, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 63, 3, stride=2, padding=1, bias=False)
        self.b = nn.Conv2d(63, 21, 3, dilation=2, groups=21)
        self.c = nn.ConvTranspose2d(21, 5, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.a(x))
        x = nn.functional.silu(self.b(nn.functional.max_pool2d(x, 2, ceil_mode=True)))
        return nn.functional.adaptive_avg_pool2d(nn.functional.gelu(self.c(x)), 1).flatten(1)


def odd() -> Program:
    torch.manual_seed(0)
    return capture(Odd().eval(), (torch.randn(2, 3, 25, 27),))


class Same(nn.Module):
    """Returns an input, one value twice, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.tensor([1.0, 2.0]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + self.offset
        return y, y * 1.0, x


def same() -> Program:
    return capture(Same(), (torch.randn(3, 2),))


def built(program: Program, backend: str, out: Path) -> Artifact:
    artifact = build(program, backend, out, options=LoadOptions(threads=1))
    assert artifact.certificate.verdict is Verdict.PASSED
    return artifact


def check_sizes(program: Program, artifact: Artifact, inputs: Callable[[int, int], list]) -> None:
    """The artifact takes other sizes than the example's and computes what the program does."""
    runner = artifact.load(LoadOptions(threads=1))
    for batch, length in ((1, 1), (3, 5), (2, 11)):
        given = inputs(batch, length)
        with torch.no_grad():
            expected = program(*given)
        actual = runner.run([value.numpy() for value in given])
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e.numpy(), rtol=2e-5, atol=2e-6)


Change = Callable[[torch.Tensor], torch.Tensor]


def changed(program: Program, name: str, change: Change) -> Program:
    rw = Rewrite(program, "test", Context())
    rw.set_tensor(name, change(program.tensor(name).detach()))
    return rw.finish()


FAULTS: dict[str, Change] = {
    "zeroed": torch.zeros_like,
    "doubled": lambda w: w * 2,
    "permuted": lambda w: w.flip(0),
}


def check_faults_fail(program: Program, backend: str, name: str, out: Path) -> None:
    """An artifact with a wrong weight is told from a right one."""
    for fault, change in FAULTS.items():
        wrong = build(changed(program, name, change), backend, out / fault, verify=False)
        runner = wrong.load(LoadOptions(threads=1))
        assert certify(program, runner).verdict is Verdict.FAILED, fault

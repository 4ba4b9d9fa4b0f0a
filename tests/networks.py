"""Small seeded networks and passes that several tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pruna_ir.program import Program
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


class ConvNet(nn.Module):
    """conv-bn-relu6, a residual block, a linear head; input float32[batch, 3, 9, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.bn(self.stem(x)))
        x = torch.relu(self.block(x) + x)
        return self.head(x.mean((2, 3)))


def seeded(factory: type[nn.Module], seed: int = 0) -> nn.Module:
    """The module with seeded weights and batch-norm statistics away from their defaults."""
    torch.manual_seed(seed)
    module = factory()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.running_mean, -1, 1)
            nn.init.uniform_(child.running_var, 0.01, 2)
            nn.init.uniform_(child.weight, 0.5, 2)
            nn.init.uniform_(child.bias, -1, 1)
    return module.eval()


def conv_net() -> Program:
    """The captured `ConvNet`."""
    from pruna_ir.capture import capture

    return capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))


@dataclass(frozen=True)
class DropRelu(Pass):
    """A planted bug: claims to round only, and drops every relu."""

    name: ClassVar[str] = "drop-relu"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        for node in rw.calls(aten.relu.default):
            rw.replace(node, rw.call(node).producer("self"))


@dataclass(frozen=True)
class Identity(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "identity"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        assert rw.graph is not None


@dataclass(frozen=True)
class ScaleHead(Pass):
    """Multiplies a linear layer's weight by a factor, under the effect that it is given."""

    name: ClassVar[str] = "scale-head"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1
    factor: float = 1.0 + 1e-6

    def rewrite(self, rw: Rewrite) -> None:
        for node in rw.calls(aten.linear.default):
            weight = rw.call(node).producer("weight")
            changed = rw.program.tensor(str(weight.target)).detach() * self.factor
            rw.update(node, weight=rw.derive(weight, changed, node))


@dataclass(frozen=True)
class Typed(Pass):
    """Has an option of every type."""

    name: ClassVar[str] = "typed"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    word: str = "a"
    globs: tuple[str, ...] = ()
    limit: int | None = None

    def rewrite(self, rw: Rewrite) -> None:
        assert rw is not None

"""The Python interface in one sitting: write a pass, run it, read its remarks, check its promise.

    python examples/api_tour.py

The pass swaps ReLU and max pooling. Both are monotonic, so the order does not matter, bit for bit,
and behind the pool there are fewer elements left to clamp:

    max_pool(relu(x))  -->  relu(max_pool(x))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pruna_ir import Effect, Pass, PrunaError, Rewrite, capture, print_program
from pruna_ir.call import bind_arguments
from pruna_ir.pipeline import Pipeline

aten = torch.ops.aten


@dataclass(frozen=True)
class PoolBeforeRelu(Pass):
    """Replace ``max_pool2d(relu(x))`` by ``relu(max_pool2d(x))``."""

    name: ClassVar[str] = "pool-before-relu"
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, rw: Rewrite) -> None:
        for pool in rw.calls(aten.max_pool2d.default):
            relu = rw.call(pool).producer("self")
            if relu is None or relu.target is not aten.relu.default:
                continue
            if len(relu.users) > 1:
                rw.skip(pool, f"{relu.name} has other readers, who need it before the pool")
                continue
            arguments = bind_arguments(pool) | {"self": rw.call(relu).arg("self")}
            pooled = rw.insert(pool.target, before=pool, like=pool, **arguments)
            clamped = rw.insert(aten.relu.default, before=pool, like=relu, self=pooled)
            rw.applied(pool, f"{relu.name} moved behind it")
            rw.replace(pool, clamped)


@dataclass(frozen=True)
class DropRelu(Pass):
    """A wrong pass: it claims that a ReLU makes no difference."""

    name: ClassVar[str] = "drop-relu"
    effect: ClassVar[Effect] = Effect.ROUNDING

    def rewrite(self, rw: Rewrite) -> None:
        for relu in rw.calls(aten.relu.default):
            source = rw.call(relu).producer("self")
            if source is not None:
                rw.replace(relu, source)


class Net(nn.Module):
    """Two convolutions; the second one's ReLU is read by the pool and by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pool(self.conv1(image).relu())
        features = self.conv2(x).relu()
        return features, self.pool(features)


def main() -> None:
    torch.manual_seed(0)
    program = capture(Net(), (torch.randn(2, 3, 16, 16),))
    print("The program, as captured (its batch size is dynamic):\n")
    print(print_program(program))

    # A pipeline runs passes in order. After each one it verifies the IR and checks the promise;
    # the program that went in stays as it is.
    result = Pipeline((PoolBeforeRelu(),)).run(program)
    print("after pool-before-relu:\n")
    print(print_program(result.program))
    for remark in result.remarks:
        print(remark)
    print("promise:", result.steps[0].check)
    print("history:", ", ".join(entry.text for entry in result.program.history), "\n")

    image = torch.randn(5, 3, 16, 16)
    same = all(map(torch.equal, program(image), result.program(image)))
    print("both programs run, batch 5, same bits:", same, "\n")

    # Passes that are registered by an entry point go by name as well.
    print("as text:", Pipeline.parse("canonicalize,fixpoint(eliminate-dead-code)"), "\n")

    print("And a pass whose promise does not hold:\n")
    try:
        Pipeline((DropRelu(),)).run(program)
    except PrunaError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

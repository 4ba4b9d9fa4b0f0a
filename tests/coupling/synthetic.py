"""Deep synthetic networks, for tests and benchmarks of compile time against graph size."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import dataclass

import torch
from torch import nn

from pruna_ir import Program, capture
from pruna_ir.coupling import couple, remove
from pruna_ir.transform import Context, Rewrite


class Block(nn.Module):
    """conv - batch norm - relu - conv - batch norm, added to the input: 7 nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm1(self.first(x)))
        return torch.relu(x + self.norm2(self.second(inner)))


def deep_network(nodes: int, width: int = 8) -> nn.Module:
    """A residual network with about this many operator nodes."""
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(max(nodes // 7, 1))]
    return nn.Sequential(
        nn.Conv2d(3, width, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)
    ).eval()


@dataclass(frozen=True)
class Cost:
    """What analysis, planning and rewriting of one program cost."""

    nodes: int
    ids: int
    couple: float
    """Seconds."""
    plan: float
    remove: float
    peak: int
    """Bytes allocated by Python and numpy during the analysis."""


def measure(nodes: int, width: int = 8) -> Cost:
    """Time the analysis, a plan of half of the channels, and its removal."""
    program = capture(deep_network(nodes, width), (torch.randn(2, 3, 8, 8),))
    return measure_program(program)


def measure_program(program: Program) -> Cost:
    """`measure` for a program of one's own."""
    start = time.perf_counter()
    coupling = couple(program)
    coupled = time.perf_counter()
    plan = coupling.plan(
        [u for g in coupling.groups if not g.reason for u in g.units[: len(g.units) // 2]]
    )
    planned = time.perf_counter()
    rw = Rewrite(program, "benchmark", Context())
    forked = time.perf_counter()
    remove(rw, coupling, plan)
    removed = time.perf_counter()
    tracemalloc.start()
    couple(program)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(
        nodes=len(program.graph.nodes),
        ids=len(coupling.solved.unit),
        couple=coupled - start,
        plan=planned - coupled,
        remove=removed - forked,
        peak=peak,
    )

"""Stimuli: inputs that drive a program through both sides of its gates.

An equivalence check is as good as its inputs: on inputs in [0, 1) a dropped ReLU can pass. The
stimuli of a program are its own examples, normal values at scale 1 and 20, and zeros, at the
boundary sizes of its dynamic dimensions. Integer inputs stay inside what the program can look
up: the range of an index is read off the embeddings that it reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from pruna_ir.call import Call
from pruna_ir.program import Program, TensorSpec

aten = torch.ops.aten


@dataclass(frozen=True)
class Stimulus:
    """One set of inputs, in the program's order, and what it is for."""

    kind: str
    """``example``, ``normal``, ``large`` (x20) or ``zeros``."""
    inputs: tuple[torch.Tensor, ...]


def stimuli(program: Program, *, seed: int = 0) -> list[Stimulus]:
    """The stimuli of a program, the same ones for the same seed.

    The drawn ones also cover sizes: normal values and zeros at the smallest size of every dynamic
    dimension, large values at an odd larger one.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    >>> [(s.kind, len(s.inputs[0])) for s in stimuli(program)]
    [('example', 2), ('normal', 1), ('large', 3), ('zeros', 1)]
    """
    generator = torch.Generator().manual_seed(seed)
    limits = index_limits(program)
    smallest, odd = _boundary_sizes(program)
    normal = _draw(program, smallest, limits, 1.0, generator)
    return [
        Stimulus("example", program.examples),
        Stimulus("normal", normal),
        Stimulus("large", _draw(program, odd, limits, 20.0, generator)),
        Stimulus("zeros", tuple(torch.zeros_like(tensor) for tensor in normal)),
    ]


def random_inputs(program: Program, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Normal values (and legal indices) in the sizes of the program's examples."""
    generator = torch.Generator().manual_seed(seed)
    return _draw(program, {}, index_limits(program), 1.0, generator)


def _boundary_sizes(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """The smallest legal size of every dynamic dimension, and an odd larger one."""
    smallest = {name: max(1, bounds.lower) for name, bounds in program.dims.items()}
    odd = {
        name: min(smallest[name] + 2, bounds.upper or smallest[name] + 2)
        for name, bounds in program.dims.items()
    }
    return smallest, odd


def _draw(
    program: Program,
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    scale: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    return tuple(
        _draw_one(spec, example, sizes, limits.get(spec.name), scale, generator)
        for spec, example in zip(program.inputs, program.examples, strict=True)
    )


def _draw_one(
    spec: TensorSpec,
    example: torch.Tensor,
    sizes: Mapping[str, int],
    limit: int | None,
    scale: float,
    generator: torch.Generator,
) -> torch.Tensor:
    shape = [
        size if isinstance(size, int) else sizes.get(size, actual)
        for size, actual in zip(spec.shape, example.shape, strict=True)
    ]
    if spec.dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * scale).to(spec.dtype)
    if limit is not None:
        return torch.randint(0, limit, shape, generator=generator).to(spec.dtype)
    low = int(example.min()) if example.numel() else 0
    high = int(example.max()) if example.numel() else 0
    return torch.randint(low, high + 1, shape, generator=generator).to(spec.dtype)


def index_limits(program: Program) -> dict[str, int]:
    """For each integer input that is looked up in an embedding, the number of its rows."""
    limits: dict[str, int] = {}
    for node in program.calls(aten.embedding.default, aten.embedding_bag.default):
        call = Call(program, node)
        rows = call.producer("weight")
        source = _through_layout(call.producer("indices"))
        if rows is None or source is None or source.op != "placeholder":
            continue
        count = int(rows.meta["val"].shape[0])
        name = str(source.target)
        limits[name] = min(count, limits.get(name, count))
    return limits


_LAYOUT = frozenset(
    {
        aten.view.default, aten.reshape.default, aten.to.dtype, aten.to.dtype_layout,
        aten.alias.default, aten.contiguous.default, aten.unsqueeze.default,
        aten.slice.Tensor, aten.flatten.using_ints, aten.expand.default, aten.clone.default,
    }
)  # fmt: skip


def _through_layout(node: fx.Node | None) -> fx.Node | None:
    """The node whose values another one holds, in whatever shape."""
    while node is not None and node.op == "call_function" and node.target in _LAYOUT:
        source = node.args[0]
        node = source if isinstance(source, fx.Node) else None
    return node

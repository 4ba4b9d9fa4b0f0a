"""Tensors with dead elements, and the calls that read them: what masked semantics are written in.

A handler maps `Masked` operands to `Masked` results; the rules that it follows stand in
`pruna_ir.masked_reference`, the handlers in `masked_layout`, `masked_statistics` and
`masked_layers`, the table in `masked_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.errors import UnsupportedError
from pruna_ir.program import source_line


@dataclass(frozen=True)
class Masked:
    """A tensor and which of its elements are alive (None: all). Dead elements hold 0."""

    value: Tensor
    alive: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """``alive`` as a tensor of the value's shape."""
        if self.alive is not None:
            return self.alive
        return torch.ones((), dtype=torch.bool).expand(self.value.shape)


def masked(value: Tensor, alive: Tensor | None) -> Masked:
    """A pair whose dead elements are 0 (also where they were NaN or infinite)."""
    if alive is None or bool(alive.all()):
        return Masked(value)
    alive = alive.expand(value.shape)
    return Masked(torch.where(alive, value, torch.zeros((), dtype=value.dtype)), alive)


def refusal(node: fx.Node, why: str) -> UnsupportedError:
    """The error that a node does something with dead elements that is not defined."""
    where = f" ({source_line(node)})" if source_line(node) else ""
    return UnsupportedError(f"masked reference: {node.name} = {node.target}{where} {why}")


def plain(value: Any) -> Any:
    """The values alone."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    return value.value if isinstance(value, Masked) else value


def lift(value: Tensor) -> Tensor:
    """A floating-point tensor in float64, a complex one in complex128."""
    if value.is_complex():
        return value.to(torch.complex128)
    return value.to(torch.float64) if value.is_floating_point() else value


def lifted(value: Any) -> Any:
    """Arguments with every floating-point dtype replaced by float64 (complex ones alike)."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(lifted, value))
    if isinstance(value, dict):
        return {key: lifted(item) for key, item in value.items()}
    if isinstance(value, torch.dtype) and value.is_complex:
        return torch.complex128
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def wrap(result: Any) -> Any:
    """Results as `Masked` with everything alive."""
    if isinstance(result, (tuple, list)):
        return tuple(map(wrap, result))
    return Masked(lift(result)) if isinstance(result, Tensor) else result


def restrided(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """``reshape`` for ``view``: kernels give float64 results other strides than the captured."""
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


@dataclass(frozen=True)
class Operands:
    """The arguments of one call by schema name; tensors are `Masked`."""

    node: fx.Node
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """An argument, or None where the operator has none of that name."""
        return self.arguments.get(name)

    def call(
        self,
        pick: Callable[[Masked], Tensor] = lambda m: m.value,
        changed: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operator on the values (or on what ``pick`` takes of each tensor)."""
        target = self.node.target
        assert isinstance(target, torch._ops.OpOverload)
        given = self.arguments | {k: v for k, v in (changed or {}).items() if k in self.arguments}
        bound = {name: _picked(value, pick) for name, value in given.items()}
        names = [a.name for a in target._schema.arguments if not a.kwarg_only]
        positional = [bound.pop(name) for name in names]
        return restrided(target)(*positional, **bound)

    def refuse(self, why: str) -> UnsupportedError:
        """The error that this call reads dead elements in a way that is not defined."""
        return refusal(self.node, why)


def _picked(value: Any, pick: Callable[[Masked], Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return [_picked(item, pick) for item in value]
    return pick(value) if isinstance(value, Masked) else value


Handler = Callable[[Operands], Any]
"""What one operator computes where some of its operands' elements are dead."""


def tensors(operands: Operands) -> list[Masked]:
    """All tensor operands in schema order, lists included."""
    found: list[Masked] = []
    for argument in operands.arguments.values():
        items = argument if isinstance(argument, (tuple, list)) else [argument]
        found += [item for item in items if isinstance(item, Masked)]
    return found


def whole(operands: Operands, *names: str) -> None:
    """Refuse operands of these names (indices, grids) that have dead elements."""
    for name in names:
        given = operands.get(name)
        for item in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(item, Masked) and item.alive is not None:
                raise operands.refuse(f"is given a {name} with dead elements")


def uniform(operands: Operands, alive: Tensor, dims: Iterable[int]) -> Tensor:
    """The mask with these dimensions made 1, along which it must not vary."""
    line = alive
    for dim in dims:
        line = line.narrow(dim, 0, 1)
    if not bool((alive == line).all()):
        raise operands.refuse("mixes dead elements with alive ones")
    return line


def dims_of(operands: Operands, rank: int, name: str = "dim") -> list[int]:
    """A dimension-list argument, counted from the front; all dimensions where it is empty."""
    given = operands.get(name)
    if given is None or given == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (given if isinstance(given, (list, tuple)) else [given])]


def all_alive(results: Any, alive: Tensor) -> Any:
    """Results (one or several) that are alive where ``alive`` is."""
    if isinstance(results, (tuple, list)):
        return tuple(masked(lift(result), alive) for result in results)
    return masked(lift(results), alive)

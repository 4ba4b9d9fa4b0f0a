"""Call: a node's arguments, read by the names of its operator's schema.

Exported graphs leave out defaulted arguments and mix positional with keyword ones, so an
argument is never read by its position: ``Call(program, node).flag("training")``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from pruna_ir.errors import InvalidIRError
from pruna_ir.program import Program


@dataclass(frozen=True)
class _Argument:
    name: str
    keyword_only: bool
    has_default: bool
    default: Any


@cache
def _arguments(target: torch._ops.OpOverload) -> tuple[_Argument, ...]:
    return tuple(
        _Argument(a.name, a.kwarg_only, a.has_default_value(), a.default_value)
        for a in target._schema.arguments
    )


_MISSING = object()


@cache
def _binding(
    target: torch._ops.OpOverload,
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """The names of positional and of required arguments; every name with its default."""
    arguments = _arguments(target)
    return (
        tuple(a.name for a in arguments if not a.keyword_only),
        tuple(a.name for a in arguments if not a.has_default),
        {a.name: a.default if a.has_default else _MISSING for a in arguments},
    )


def bind_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen call by schema name, defaults filled in.

    Raises:
        InvalidIRError: the node is no operator call or lacks a required argument.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise InvalidIRError(f"{node.name}: {node.target} is not an operator with a schema")
    return bind_values(node.target, node.args, node.kwargs)


def bind_values(
    target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by schema name, defaults filled in.

    Raises:
        InvalidIRError: a required argument is missing.
    """
    positional, required, defaults = _binding(target)
    # Called several times for every node: whole dicts at once, in the order of the schema.
    bound = {**defaults, **kwargs}
    if len(bound) > len(defaults):
        bound = {name: bound[name] for name in defaults}
    bound.update(zip(positional, args, strict=False))
    for name in required:
        if bound[name] is _MISSING:
            raise InvalidIRError(f"a call of {target} lacks its argument {name}")
    return bound


def unbind_arguments(
    target: torch._ops.OpOverload, bound: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of `bind_arguments`: ``args`` and ``kwargs`` without trailing defaults."""
    arguments = _arguments(target)
    if unknown := set(bound) - {a.name for a in arguments}:
        raise InvalidIRError(f"{target} has no argument named {', '.join(sorted(unknown))}")
    positional: list[tuple[Any, bool]] = []
    keywords: dict[str, Any] = {}
    for argument in arguments:
        if argument.name not in bound and not argument.has_default:
            raise InvalidIRError(f"{target} needs its argument {argument.name}")
        value = bound.get(argument.name, argument.default)
        is_default = argument.has_default and _same(value, argument.default)
        if not argument.keyword_only:
            positional.append((value, is_default))
        elif not is_default:
            keywords[argument.name] = value
    while positional and positional[-1][1]:
        positional.pop()
    return tuple(value for value, _ in positional), keywords


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


@dataclass(frozen=True)
class Call:
    """A view of one ATen call node of a program."""

    program: Program
    node: fx.Node

    def arg(self, name: str) -> Any:
        """The argument of this schema name, or its default."""
        bound = bind_arguments(self.node)
        if name not in bound:
            raise InvalidIRError(f"{self.node.target} has no argument named {name}")
        return bound[name]

    def flag(self, name: str) -> bool:
        """A bool argument."""
        return bool(self.arg(name))

    def number(self, name: str) -> float:
        """A constant number argument.

        Raises:
            InvalidIRError: the argument is computed in the graph.
        """
        value = self.arg(name)
        if isinstance(value, fx.Node) or value is None:
            raise InvalidIRError(f"{self.node.name}: argument {name} is not a constant number")
        return float(value)

    def ints(self, name: str, length: int = 0) -> tuple[int, ...]:
        """A constant integer-list argument; a single value is repeated to ``length``.

        Raises:
            InvalidIRError: an element is computed in the graph.
        """
        value = self.arg(name)
        items = list(value) if isinstance(value, Sequence) else [value]
        if any(not isinstance(item, int) for item in items):
            raise InvalidIRError(f"{self.node.name}: argument {name} is not constant integers")
        return tuple(items) * length if length and len(items) == 1 else tuple(items)

    def producer(self, name: str) -> fx.Node | None:
        """The node that computes a tensor argument; None where the argument is absent."""
        value = self.arg(name)
        return value if isinstance(value, fx.Node) else None

    def parameter(self, name: str) -> torch.Tensor | None:
        """The constant tensor behind an argument; None where it is absent or computed."""
        source = self.producer(name)
        if source is None or source.op != "get_attr":
            return None
        return self.program.tensor(str(source.target))

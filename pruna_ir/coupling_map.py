"""Coupling map: which channels go together, as a table and as JSON (drawn: `coupling_drawing`).

The JSON document, whose ``format`` changes with any change that is not an addition:

    {"format": 1, "model": text, "pipeline": text, "calls": number of operator calls,
     "layers": [{"name", "operator", "source", "tensors": [{"name", "shape"}]}],
     "groups": [{"name", "kind", "units", "prunable",
                 "reason": null or {"text", "node", "operator", "source"},
                 "members": [{"tensor", "dim", "shape", "layer", "produced",
                              "indices_per_unit"}]}]}

``kind`` is what a channel of the group is (`pruna_ir.coupling.kinds`), ``units`` how many there
are: filters, heads, neurons, each of which goes as a whole or not at all. A unit takes
``indices_per_unit`` indices from dimension ``dim`` of every member's tensor. ``produced`` marks
the outputs of the layers that make the channels. ``source`` is the user's line, empty where
unknown. Layers stand in program order: by the first call that reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from pruna_ir.coupling import Coupling, Group, Member, Reason
from pruna_ir.coupling.kinds import kinds_of
from pruna_ir.errors import UsageError
from pruna_ir.program import Program, source_line
from pruna_ir.report import Table

FORMAT = 1
_NUMBER = re.compile(r"((?<![^.])|(?<=[a-z_]))\d+(?=\..*\.)")
"""A number in a path, but not in the name of the module that owns the tensor."""
_SHOWN = 6
"""Patterns of member names in one cell of the table."""


@dataclass(frozen=True)
class Layer:
    """A module that owns tensors (or a tensor of the model itself).

    Attributes:
        name: the module's path; the tensor's own name where the model itself owns it.
        operator: the first call that reads its largest tensor, such as ``conv2d``.
        source: the user's line of that call; empty where unknown.
        tensors: names and shapes of the floating-point tensors.
    """

    name: str
    operator: str
    source: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def title(self) -> str:
        """The name; with the tensor's own where that says more than the module's."""
        name = self.tensors[0][0]
        plain = name.rpartition(".")[2] == "weight"
        return self.name if len(self.tensors) > 1 or plain else name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the largest tensor."""
        return max((shape for _, shape in self.tensors), key=_elements)


@dataclass(frozen=True)
class CouplingMap:
    """The layers and groups of one program.

    Attributes:
        model: what the user gave.
        pipeline: the passes that had changed the program before the analysis.
        calls: the number of operator calls.
        layers: in program order.
        groups: in the order of `pruna_ir.coupling.Coupling.groups`.
        kinds: of each group.
    """

    model: str
    pipeline: str
    calls: int
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    kinds: tuple[str, ...]

    def only(self, globs: Sequence[str] = (), kinds: Sequence[str] = ()) -> CouplingMap:
        """The map of the groups of these kinds that have a tensor or layer that a glob matches.

        No glob stands for every name, no kind for every kind.

        Raises:
            UsageError: no group is of these kinds, or none has such a tensor.
        """
        if not globs and not kinds:
            return self
        chosen = [
            (group, kind)
            for group, kind in zip(self.groups, self.kinds, strict=True)
            if not kinds or kind in kinds
        ]
        if not chosen:
            there = ", ".join(sorted(set(self.kinds))) or "none: the program has no tensors"
            raise UsageError(f"no group is of kind {' or '.join(kinds)}; kinds here: {there}")
        found = [pair for pair in chosen if not globs or _matches(pair[0], globs)]
        if not found:
            raise UsageError(
                f"no group has a tensor or layer that matches {' or '.join(map(repr, globs))}; "
                f"names are such as {chosen[0][0].members[0].tensor}"
            )
        touched = {layer_name(m.tensor) for group, _ in found for m in group.members}
        return replace(
            self,
            layers=tuple(layer for layer in self.layers if layer.name in touched),
            groups=tuple(group for group, _ in found),
            kinds=tuple(kind for _, kind in found),
        )

    def to_json(self) -> dict[str, Any]:
        """The document that the module describes."""
        shapes = {name: list(shape) for layer in self.layers for name, shape in layer.tensors}
        return {
            "format": FORMAT,
            "model": self.model,
            "pipeline": self.pipeline,
            "calls": self.calls,
            "layers": [
                {
                    "name": layer.name,
                    "operator": layer.operator,
                    "source": layer.source,
                    "tensors": [{"name": n, "shape": list(shape)} for n, shape in layer.tensors],
                }
                for layer in self.layers
            ],
            "groups": [
                _group_json(group, kind, shapes)
                for group, kind in zip(self.groups, self.kinds, strict=True)
            ],
        }

    def summary(self) -> str:
        """One line: how much there is, and how much of it may go."""
        free = [group for group in self.groups if why_not(group) is None]
        return (
            f"{self.model}: {self.calls} calls, {len(self.layers)} layers with tensors, "
            f"{len(self.groups)} groups of channels; {len(free)} may lose channels, "
            f"{len(self.groups) - len(free)} stay"
        )


def coupling_map(program: Program, coupling: Coupling, model: str = "") -> CouplingMap:
    """The map of a program and its coupling.

    >>> import torch
    >>> from pruna_ir import capture
    >>> from pruna_ir.coupling import couple
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> program = capture(net, (torch.zeros(2, 3),))
    >>> found = coupling_map(program, couple(program), "net")
    >>> print(found.summary())
    net: 3 calls, 2 layers with tensors, 3 groups of channels; 1 may lose channels, 2 stay
    >>> [(group.name, len(group.units)) for group in found.groups if why_not(group) is None]
    [('0.weight[0]', 8)]
    """
    return CouplingMap(
        model=model,
        pipeline=",".join(entry.text for entry in program.history),
        calls=sum(1 for _ in program.calls()),
        layers=_layers(program, coupling),
        groups=coupling.groups,
        kinds=kinds_of(program, coupling),
    )


def layer_name(tensor: str) -> str:
    """The layer of a tensor: its module's path, or its own name where the model owns it."""
    return tensor.rpartition(".")[0] or tensor


def why_not(group: Group) -> Reason | None:
    """Why a group's channels stay; None where they may go."""
    if group.reason is not None:
        return group.reason
    if len(group.units) == 1:
        return Reason("", "", "", "all of them are coupled with one another")
    if not any(member.produced for member in group.members):
        return Reason("", "", "", "no layer of the program produces them")
    return None


def indices_each(group: Group) -> str:
    """How many indices one channel takes from its tensors: ``1``, or ``64-192``."""
    counts = sorted({per_unit(member) for member in group.members})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def per_unit(member: Member) -> int:
    """How many indices of the member's dimension one unit takes."""
    return int(member.indices.shape[1])


def _layers(program: Program, coupling: Coupling) -> tuple[Layer, ...]:
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    readers = {
        str(node.target): min(node.users, key=order.__getitem__)
        for node in program.graph.find_nodes(op="get_attr")
        if node.users
    }
    owned: dict[str, list[str]] = {}
    for tensor in sorted(coupling.tensors, key=lambda name: order[readers[name]]):
        owned.setdefault(layer_name(tensor), []).append(tensor)
    return tuple(_layer(program, name, tensors, readers) for name, tensors in owned.items())


def _layer(
    program: Program, name: str, tensors: list[str], readers: dict[str, fx.Node]
) -> Layer:
    shapes = [(tensor, tuple(program.tensor(tensor).shape)) for tensor in tensors]
    largest = max(shapes, key=lambda entry: _elements(entry[1]))[0]
    reader = readers[largest]
    operator = getattr(reader.target, "_schema", None)
    word = operator.name.rpartition("::")[2] if operator is not None else str(reader.target)
    return Layer(name, word, source_line(reader), tuple(shapes))


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _matches(group: Group, globs: Iterable[str]) -> bool:
    names = {name for m in group.members for name in (m.tensor, layer_name(m.tensor))}
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _group_json(group: Group, kind: str, shapes: dict[str, list[int]]) -> dict[str, Any]:
    reason = why_not(group)
    return {
        "name": group.name,
        "kind": kind,
        "units": len(group.units),
        "prunable": reason is None,
        "reason": None
        if reason is None
        else {
            "text": reason.text,
            "node": reason.node,
            "operator": reason.operator,
            "source": reason.source,
        },
        "members": [
            {
                "tensor": member.tensor,
                "dim": member.dim,
                "shape": shapes.get(member.tensor, []),
                "layer": layer_name(member.tensor),
                "produced": member.produced,
                "indices_per_unit": per_unit(member),
            }
            for member in group.members
        ],
    }


# -- table ---------------------------------------------------------------------------------------


def table(found: CouplingMap) -> Table:
    """One row a group: name, channels, indices a channel takes, whether it may go, members.

    Members whose names differ in numbers only share an entry: ``3x layer1.*.conv3.weight[0]``.
    """
    columns = ("group", "kind", "channels", "of indices", "prunable", "members")
    rows = [_row(*pair) for pair in zip(found.groups, found.kinds, strict=True)]
    return "groups", columns, rows


def _row(group: Group, kind: str) -> list[str]:
    reason = why_not(group)
    return [
        group.name,
        kind,
        str(len(group.units)),
        indices_each(group),
        "yes" if reason is None else f"no: {in_words(reason)}",
        _members(group.members),
    ]


def in_words(reason: Reason) -> str:
    """The reason with what reads the channels and the user's source line."""
    place = ", ".join(part for part in (reason.operator, reason.source) if part)
    return f"{reason.text} ({place})" if place else reason.text


def _members(members: Sequence[Member]) -> str:
    """``made by ...; read by ...``: the producing dimensions, then all others."""
    made = _patterns([m for m in members if m.produced])
    rest = _patterns([m for m in members if not m.produced])
    parts = [f"made by {made}" if made else "", f"in {rest}" if rest else ""]
    return "; ".join(part for part in parts if part)


def _patterns(members: Sequence[Member]) -> str:
    """Names that differ in numbers only as one, with their count in front."""
    alike: dict[tuple[str, int], list[Member]] = {}
    for member in members:
        alike.setdefault((_NUMBER.sub("*", member.tensor), member.dim), []).append(member)
    shown = [
        f"{same[0].tensor}[{dim}]" if len(same) == 1 else f"{len(same)}x {pattern}[{dim}]"
        for (pattern, dim), same in alike.items()
    ]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more

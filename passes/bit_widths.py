"""Bit widths: which layer gets how many bits, in one option.

    w4a8                      every layer: weights on 4 bits, the layer's input on 8
    [w4a8, "head:float"]      all but ``head`` and what is inside
    [w4a4, "stem:w8a8", "aten.addmm:w4a8", "layer4*:w8a4"]

An entry is a width, or a glob and a width. A glob names module paths (``layer4*``; ``head`` means
everything inside it too) or operators (``aten.addmm``). Later entries win over earlier ones.

Limits: 2 to 8 bits. Widths are those of layers: residual adds, average pools and results that only
float operators read keep the target's full grid.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from pruna_ir.calibration import layer_name
from pruna_ir.errors import UsageError
from pruna_ir.registry import unknown

FEWEST_BITS = 2
MOST_BITS = 8
FLOAT = "float"
_WIDTH = re.compile(r"w(\d+)a(\d+)")


@dataclass(frozen=True)
class Width:
    """The bits of a layer's weight and of its input.

    >>> str(Width(4, 8))
    'w4a8'
    """

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


@dataclass(frozen=True)
class Rule:
    """One entry of an option: ``width`` is None for ``float``, ``glob`` empty for all layers."""

    text: str
    glob: str
    width: Width | None

    def __str__(self) -> str:
        return self.text


def parse_width(text: str, option: str) -> Width | None:
    """The width that a word such as ``w4a8`` means; None for ``float``.

    Raises:
        UsageError: it is no width, or the bits are out of bounds.

    >>> parse_width("w4a8", "bits")
    Width(weight=4, activation=8)
    """
    if text == FLOAT:
        return None
    found = _WIDTH.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{option}: '{text}' is no width; write w<bits>a<bits>, such as w4a8, or float"
        )
    width = Width(int(found[1]), int(found[2]))
    for bits, what in ((width.weight, "weights"), (width.activation, "activations")):
        if not FEWEST_BITS <= bits <= MOST_BITS:
            raise UsageError(
                f"{option}: '{text}' asks for {bits}-bit {what}; integer grids have "
                f"{FEWEST_BITS} to {MOST_BITS} bits: choose one of them, or float"
            )
    return width


def parse_rules(entries: Iterable[str], option: str) -> tuple[Rule, ...]:
    """The rules that the entries of an option state.

    Raises:
        UsageError: an entry is malformed; the message quotes it.

    >>> parse_rules(["w4a4", "head:float"], "bits")[1]
    Rule(text='head:float', glob='head', width=None)
    """
    rules = []
    for entry in entries:
        glob, colon, word = entry.rpartition(":")
        if colon and not glob:
            raise UsageError(f"{option}: '{entry}' names no layer before the colon")
        rules.append(Rule(entry, glob, parse_width(word, option)))
    return tuple(rules)


@dataclass(frozen=True)
class WidthRules:
    """What the options ``bits`` and ``ends`` say of each layer.

    Entries with a glob win over ``ends``, and ``ends`` over entries without one.
    """

    named: tuple[Rule, ...]
    general: tuple[Rule, ...]
    ends: Rule | None

    @staticmethod
    def parse(bits: Iterable[str], ends: str) -> WidthRules:
        """The rules that the two options state.

        Raises:
            UsageError: an entry is malformed, or its bits are out of bounds.
        """
        rules = parse_rules(bits, "bits")
        return WidthRules(
            tuple(rule for rule in rules if rule.glob),
            tuple(rule for rule in rules if not rule.glob),
            Rule(ends, "", parse_width(ends, "ends")) if ends else None,
        )

    def narrowest(self) -> int:
        """The fewest bits that any rule gives."""
        rules = [*self.named, *self.general, *([self.ends] if self.ends else [])]
        widths = [rule.width for rule in rules if rule.width is not None]
        return min((min(w.weight, w.activation) for w in widths), default=MOST_BITS)

    def check(self, layers: Sequence[fx.Node]) -> None:
        """Refuse globs that name no layer.

        Raises:
            UsageError: with the nearest name.
        """
        check_globs("bits", [rule.glob for rule in self.named], layers)

    def rule_for(self, node: fx.Node, ends: Container[fx.Node]) -> Rule | None:
        """The rule that decides on a node; None where none does.

        Args:
            node: a layer, add or average pool.
            ends: the layers to which the option ``ends`` applies.
        """
        rule = next((r for r in reversed(self.named) if matches(node, r.glob)), None)
        if rule is None and node in ends:
            rule = self.ends
        return rule or (self.general[-1] if self.general else None)


def operator_name(node: fx.Node) -> str:
    """A call's operator as users write it, such as ``aten.conv2d``."""
    return str(node.target).removesuffix(".default")


def matches(node: fx.Node, glob: str) -> bool:
    """Whether a glob names a node, by its module path, one above it, or its operator."""
    path = layer_name(node)
    return (
        fnmatchcase(path, glob)
        or fnmatchcase(path, f"{glob}.*")
        or fnmatchcase(operator_name(node), glob)
    )


def check_globs(option: str, globs: Iterable[str], layers: Sequence[fx.Node]) -> None:
    """Refuse globs that name no layer.

    Raises:
        UsageError: with the nearest name.
    """
    for glob in globs:
        if not any(matches(node, glob) for node in layers):
            names = {layer_name(node) for node in layers} | set(map(operator_name, layers))
            raise UsageError(f"{option}: {unknown('layer', glob, names)}")


def end_layers(layers: Sequence[fx.Node]) -> set[fx.Node]:
    """The layers before which there is no other, and those after which there is none.

    Args:
        layers: the layers of one graph, in its order.
    """
    wanted = set(layers)
    if not layers:
        return set()
    behind: set[fx.Node] = set()  # nodes that a layer's result reaches
    ahead: set[fx.Node] = set()  # nodes whose results reach a layer
    found: set[fx.Node] = set()
    nodes = list(layers[0].graph.nodes)
    for node in nodes:
        if any(operand in behind or operand in wanted for operand in node.all_input_nodes):
            behind.add(node)
        elif node in wanted:
            found.add(node)
    for node in reversed(nodes):
        if any(user in ahead or user in wanted for user in node.users):
            ahead.add(node)
        elif node in wanted:
            found.add(node)
    return found

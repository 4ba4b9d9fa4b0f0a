"""Where a linear layer's input channels come from: back to what can take a factor per channel.

From the input of a layer, `trace` walks back through operators that only move values (reshape,
transpose, expand, split...), through attention by its value operand, and through products, to a
*source*: a layer norm or RMS norm with a scale, the scale of a norm that is spelled out, or a
linear layer. Dividing channels of the source by s and multiplying the layer's columns by s leaves
the function as it is, provided that nothing else reads what lies between.

Which column belongs to which channel of the source is found by running the operators between on
channel numbers in place of values (`columns`), with the sizes of the program's examples.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.call import bind_arguments
from pruna_ir.passes.linear_layers import CONVOLUTIONS, FORMS, TRANSPOSED
from pruna_ir.program import Program, shape_of

aten = torch.ops.aten

LINEAR = frozenset(FORMS) - CONVOLUTIONS - TRANSPOSED
"""Layers whose channels are the last dimension."""
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_MOVERS = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default,
        aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.flatten.using_ints,
        aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.select.int,
        aten.to.dtype, aten._to_copy.default,
    }
)  # fmt: skip
_PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
_ATTENTION = aten.scaled_dot_product_attention.default
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


@dataclass(frozen=True, eq=False)
class Source:
    """What can take a factor per channel of its last dimension.

    Attributes:
        node: the node whose value is scaled.
        vectors: the operands, [channels] each, that are divided: a norm's scale and shift.
        layer: whether it is a linear layer, whose weight and bias are scaled by rows.
    """

    node: fx.Node
    vectors: tuple[str, ...] = ()
    layer: bool = False


@dataclass(eq=False)
class Path:
    """The nodes from a source to a layer's input, both included where they are no layers."""

    source: Source
    nodes: list[fx.Node] = field(default_factory=list)


def trace(node: fx.Node) -> Path | str:
    """The path from a source to a value; the reason where there is none."""
    source = _source(node)
    if source is not None:
        return Path(source, [node])
    operands = list(_through(node))
    if not operands:
        return f"its input comes from {node.name} ({node.target}), through which no scale goes"
    why = ""
    for operand in operands:
        found = trace(operand)
        if isinstance(found, Path):
            found.nodes.append(node)
            return found
        why = why or found
    return why


def _source(node: fx.Node) -> Source | None:
    if node.op != "call_function":
        return None
    if node.target in _NORMS:
        return _norm(node)
    if node.target in LINEAR:
        weight = bind_arguments(node)[FORMS[node.target].weight]
        return Source(node, layer=True) if weight.op == "get_attr" else None
    if node.target is aten.mul.Tensor:
        bound = bind_arguments(node)
        names = [name for name in ("self", "other") if _is_vector(bound[name], node)]
        return Source(node, (names[0],)) if len(names) == 1 else None
    return None


def _norm(node: fx.Node) -> Source | None:
    bound = bind_arguments(node)
    if len(bound["normalized_shape"]) != 1 or not _is_vector(bound["weight"], node):
        return None
    bias = bound.get("bias")
    if bias is None:
        return Source(node, ("weight",))
    return Source(node, ("weight", "bias")) if _is_vector(bias, node) else None


def _is_vector(operand: Any, node: fx.Node) -> bool:
    """Whether an operand is a stored vector along the node's last dimension."""
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return False
    return shape_of(operand) == (shape_of(node) or ())[-1:]


def _through(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of a node through which a factor per channel reaches its value."""
    if node.op != "call_function":
        return
    if node.target in _MOVERS or node.target in _PARTS or node.target is operator.getitem:
        yield node.all_input_nodes[0]
    elif node.target is _ATTENTION:
        yield bind_arguments(node)["value"]
    elif node.target in _PRODUCTS:
        bound = bind_arguments(node)
        yield bound["other"] if "other" in bound else bound["mat2"]
    elif node.target is aten.mul.Tensor:
        bound = bind_arguments(node)
        for name in ("self", "other"):
            if isinstance(bound[name], fx.Node) and bound[name].op != "get_attr":
                yield bound[name]


def other_readers(paths: Sequence[Path], layers: Sequence[fx.Node]) -> list[str]:
    """The names of nodes that read what lies on the paths to some layers, but are not on them.

    The other parts of a split read other channels; a node that reads a value twice counts, too.
    """
    on_path = {node for path in paths for node in path.nodes}
    known = on_path | set(layers)
    found = []
    for node in on_path:
        for user in node.users:
            strange = user not in known or _reads(user, node) != 1
            if strange and not (node.target in _PARTS and _other_part(user, on_path)):
                found.append(user.name)
    return sorted(set(found))


def _other_part(user: fx.Node, on_path: set[fx.Node]) -> bool:
    if user.target is not operator.getitem:
        return False
    parts, index = user.args
    taken = [n.args for n in on_path if n.target is operator.getitem]
    return all(args != (parts, index) for args in taken)


def _reads(reader: fx.Node, node: fx.Node) -> int:
    places: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), places.append)
    return places.count(node)


def columns(program: Program, paths: Sequence[Path]) -> list[Tensor | None]:
    """For each path, the source's channel that each channel at its end is, int64.

    None where channels are mixed on the way, or a position decides which channel is where.
    """
    walk = _Channels(program, paths)
    with torch.no_grad():
        walk.run(*(value.clone() for value in program.examples))
    return [walk.at_end(path) for path in paths]


class _Channels(fx.Interpreter):
    """Runs the program and, beside the values on some paths, the numbers of their channels."""

    def __init__(self, program: Program, paths: Sequence[Path]) -> None:
        super().__init__(program.module, garbage_collect_values=False, graph=program.graph)
        self.extra_traceback = False
        self._sources = {path.source.node for path in paths}
        self._on_path = {node for path in paths for node in path.nodes}
        self._numbers: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n in self._sources:
            channels = torch.arange(value.shape[-1], dtype=torch.int64)
            self._numbers[n] = channels.expand(value.shape)
        elif n in self._on_path:
            self._numbers[n] = self._moved(n, value)
        return value

    def _moved(self, node: fx.Node, value: Any) -> Any:
        operands = [o for o in _through(node) if self._numbers.get(o) is not None]
        if len(operands) != 1:
            return None
        (operand,) = operands
        numbers = self._numbers[operand]
        if node.target is aten.mul.Tensor:
            return numbers.expand(value.shape)
        if node.target in _PRODUCTS or node.target is _ATTENTION:
            return _mixed(numbers, value)
        if node.target in (aten.to.dtype, aten._to_copy.default):
            return numbers
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: numbers if n is operand else self.env[n]
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def at_end(self, path: Path) -> Tensor | None:
        """The channel of each index of the last dimension, where it is the same everywhere."""
        numbers = self._numbers.get(path.nodes[-1])
        if not isinstance(numbers, torch.Tensor):
            return None
        rows = numbers.reshape(-1, numbers.shape[-1])
        return rows[0] if bool((rows == rows[:1]).all()) else None


def _mixed(numbers: Tensor, value: Tensor) -> Tensor | None:
    """The channels behind a weighted mean over the positions (the last dimension but one)."""
    first = numbers[..., :1, :]
    if not bool((numbers == first).all()):
        return None
    if first.dim() > 2 and value.dim() == first.dim() and first.shape[-3] != value.shape[-3]:
        first = first.repeat_interleave(value.shape[-3] // first.shape[-3], -3)
    return first.expand(value.shape)

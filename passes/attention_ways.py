"""The ways from one tensor through projections to an attention, and on through its output layer.

    x -> views -> layer -> views, numbers times it -> query, key or value
    result -> views -> layer -> views -> [..., tokens, out]

``view_layout`` follows what the views do: a block's projections cut the outputs of a layer into
heads, and leave batch and tokens whole; its last layer reads heads that are joined again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from pruna_ir.coupling.value import Extent, extent
from pruna_ir.passes.attention_patterns import Turned, number_times, unturned
from pruna_ir.passes.attention_surroundings import obstacle
from pruna_ir.passes.ffn_patterns import Dense, dense
from pruna_ir.passes.view_layout import Dim, Layout, positions, through, viewed, whole

aten = torch.ops.aten

_LAYERS = (aten.linear.default, aten.addmm.default)
_ARITHMETIC = (operator.mul, operator.add, operator.sub, operator.floordiv)
ROLES = ("queries", "keys", "values")


@dataclass(frozen=True)
class Way:
    """From what a layer reads to an operand of an attention.

    Attributes:
        layer: the projection.
        before: what it reads, and what that is a view of, and so on.
        behind: from the layer to the operand.
        factor: what the layer's result is multiplied by.
    """

    layer: Dense
    before: tuple[fx.Node, ...]
    behind: tuple[fx.Node, ...]
    factor: float

    def nodes(self) -> set[fx.Node]:
        """The layer and all behind it, with the splits that parts are taken of."""
        splits = {n.args[0] for n in self.behind if n.target is operator.getitem}
        return {*self.layer.nodes, *self.behind, *splits}  # type: ignore[arg-type]


def plain_layer(node: fx.Node) -> Dense | None:
    """The layer that a node is by itself, reshapes around it aside."""
    return dense(node) if node.target in _LAYERS else None


def way(operand: fx.Node, role: str) -> Way | str:
    """The way to an operand; why it is none; or "" where no layer is behind it at all."""
    node, behind, factor = operand, list[fx.Node](), 1.0
    while (layer := plain_layer(node)) is None:
        source = viewed(node)
        scaled = number_times(node) if source is None and role != "values" else None
        if scaled is not None:
            factor, source = factor * scaled[0], scaled[1]
        if source is None:
            found = obstacle(node)
            return f"{found} and its {role}" if found else ""
        behind.append(node)
        node = source
    before = [layer.input]
    while (source := viewed(before[-1])) is not None:
        before.append(source)
    return Way(layer, tuple(before), tuple(reversed(behind)), factor)


@dataclass(frozen=True)
class Projections:
    """The layers that project one tensor to queries, keys and values.

    Attributes:
        source: the tensor, its dimensions in the order [..., tokens, in].
        layers: of queries, keys and values.
        rows: the outputs of each layer that are its heads, one head behind the other.
        factor: what the products of queries and keys are multiplied by.
    """

    source: Turned
    layers: tuple[Dense, Dense, Dense]
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    factor: float


def projections(ways: Sequence[Way]) -> Projections | str:
    """The projections of three ways from one tensor; why there are none."""
    shared = [n for n in ways[0].before if all(n in other.before for other in ways[1:])]
    if not shared:
        return _reason_against_sources(ways)
    found = [one for source in shared if (one := _from(source, ways)) is not None]
    if not found:
        return (
            f"the views between {ways[0].layer.nodes[-1].name} and its queries, keys or values do "
            "not leave batch and tokens whole, or cut them off"
        )
    straight = [one for one in found if one.source.order == tuple(range(len(one.source.order)))]
    return (straight or found)[0]


def _reason_against_sources(ways: Sequence[Way]) -> str:
    first = ways[0]
    for other, role in zip(ways[1:], ROLES[1:], strict=True):
        if not set(first.before) & set(other.before):
            return (
                f"its queries are projected from {first.layer.input.name}, its {role} from "
                f"{other.layer.input.name}: cross attention has no fused form"
            )
    return "its queries, keys and values are projected from different views"


def _from(source: fx.Node, ways: Sequence[Way]) -> Projections | None:
    traced = [_traced(one, source) for one in ways]
    if any(one is None for one in traced) or len({one[0] for one in traced if one}) != 1:
        return None
    order, rows = traced[0][0], [one[1] for one in traced if one]  # type: ignore[index]
    turned = unturned(Turned(source, (*order, len(order))))
    factor = ways[0].factor * ways[1].factor * ways[2].factor
    layers = [one.layer for one in ways]
    return Projections(
        turned, (layers[0], layers[1], layers[2]), (rows[0], rows[1], rows[2]), factor
    )


def _traced(one: Way, source: fx.Node) -> tuple[tuple[int, ...], torch.Tensor] | None:
    """The order of the source's dimensions in an operand, and the rows that are its heads."""
    sizes = [extent(size) for size in source.meta["val"].shape]
    views = one.before[: one.before.index(source)]
    layout = _through(Layout.of(source), reversed(views))
    if layout is None or layout.dims[-1] != whole(len(sizes) - 1, sizes[-1]):
        return None
    layout = _through(layout.with_last(one.layer.outputs), one.behind)
    if layout is None or len(layout.dims) < 3:
        return None
    rank, axis = len(layout.dims), len(sizes)
    order = _order(layout, [*range(rank - 3), rank - 2], sizes[:-1])
    rows = positions(layout, [rank - 3, rank - 1], axis)
    return None if order is None or rows is None else (order, rows)


def _through(layout: Layout | None, nodes: Sequence[fx.Node] | Iterator[fx.Node]) -> Layout | None:
    """The layout behind views; numbers that are multiplied by change none."""
    for node in nodes:
        if layout is not None and viewed(node) is not None:
            layout = through(layout, node)
    return layout


def _order(
    layout: Layout, dims: Sequence[int], sizes: Sequence[Extent]
) -> tuple[int, ...] | None:
    """The axis, of these sizes, that each dimension is; each axis once. None where they are not.

    Dimensions of size 1 are axes of size 1, in their order.
    """
    single = [axis for axis, size in enumerate(sizes) if whole(axis, size) == ()]
    found = []
    for dim in dims:
        pieces = layout.dims[dim]
        axis = pieces[0].axis if pieces else single.pop(0) if single else -1
        if not 0 <= axis < len(sizes) or layout.dims[dim] != whole(axis, sizes[axis]):
            return None
        found.append(axis)
    moved = any(layout.starts[axis] for axis in found)
    return tuple(found) if sorted(found) == list(range(len(sizes))) and not moved else None


# -- behind an attention -----------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """The output layer of an attention.

    Attributes:
        layer: the layer.
        nodes: what stands behind the attention, the node that ends the block last.
        order: the order of [..., tokens, out] in the value of that node.
    """

    layer: Dense
    nodes: tuple[fx.Node, ...]
    order: tuple[int, ...]


def output(attention: fx.Node) -> Output | str:
    """The layer that reads an attention's heads, joined; why there is none."""
    layout, nodes = Layout.of(attention), [attention]
    while True:
        readers = direct_readers(nodes[-1])
        if len(readers) != 1:
            names = ", ".join(sorted(reader.name for reader in readers))
            return f"{nodes[-1].name} is read by {names or 'nothing'}, not by one layer"
        (reader,) = readers
        layer = plain_layer(reader)
        if layer is not None and layer.input is nodes[-1]:
            return _joined(attention, layout, layer, [*nodes[1:], reader])
        known = through(layout, reader) if viewed(reader) is nodes[-1] else None
        if known is None:
            return f"{reader.name} stands between its heads and a layer"
        layout = known
        nodes.append(reader)


def _joined(
    attention: fx.Node, layout: Layout, layer: Dense, nodes: list[fx.Node]
) -> Output | str:
    """The output behind a layer that reads an attention's result in this layout."""
    sizes = [extent(size) for size in attention.meta["val"].shape]
    rank = len(sizes)
    heads = (*whole(rank - 3, sizes[-3]), *whole(rank - 1, sizes[-1]))
    if layout.dims[-1] != heads or any(layout.starts):
        return f"{layer.nodes[-1].name} does not read its heads one behind the other"
    rows = [whole(axis, sizes[axis]) for axis in (*range(rank - 3), rank - 2)]
    goal = [*rows, whole(rank, layer.outputs)]
    found = _ends(layer, layout.with_last(layer.outputs), goal, nodes)
    if not found:
        return f"the result of {layer.nodes[-1].name} has no dimension of tokens alone"
    return next((end for end in found if end.order == tuple(range(rank - 1))), found[0])


def _ends(
    layer: Dense, layout: Layout | None, goal: Sequence[Dim], nodes: list[fx.Node]
) -> list[Output]:
    """Where a block may end: the views behind its layer that have the goal's dimensions."""
    found = []
    while layout is not None:
        order = _permutation(layout.dims, goal)
        if order is not None:
            found.append(Output(layer, tuple(nodes), order))
        readers = direct_readers(nodes[-1])
        if len(readers) != 1 or viewed(readers[0]) is not nodes[-1]:
            break
        layout = through(layout, readers[0])
        nodes = [*nodes, readers[0]]
    return found


def _permutation(dims: Sequence[Dim], goal: Sequence[Dim]) -> tuple[int, ...] | None:
    """For each dimension the place in the goal that it has; None where they are others."""
    left, found = list(range(len(goal))), []
    for dim in dims:
        place = next((place for place in left if goal[place] == dim), None)
        if place is None:
            return None
        left.remove(place)
        found.append(place)
    return None if left else tuple(found)


def direct_readers(node: fx.Node) -> list[fx.Node]:
    """Who reads more of a value than its sizes."""
    return [user for user in node.users if not _is_size(user)]


def all_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, or its sizes."""
    for user in node.users:
        if _is_size(user):
            yield from all_readers(user)
        else:
            yield user


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)) and (
        node.target is aten.sym_size.int or node.target in _ARITHMETIC
    )

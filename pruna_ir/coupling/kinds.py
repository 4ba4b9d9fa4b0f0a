"""Kinds of coupled groups, by data flow: what a channel of the group is.

    conv        channels that only convolutions produce
    heads       attention heads (query heads; whole groups where several share a key head)
    head-size   the dimensions inside of every head
    ffn         hidden neurons: what one layer, or gate and value of the same input, produce
    width       the residual width: layers of different inputs write into the same channels
    other       recurrent states, and channels of operators that are none of these

Attention is found where two activations are multiplied (``scaled_dot_product_attention``,
``matmul``, ``bmm``, ``einsum``), whether a softmax stands between or not. No module type and no
name is looked at.

Limits: the embedding dimension of a product of two-dimensional activations (CLIP's logits) counts
as the width that it is, not as a head.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.coupling.analysis import Coupling, Group
from pruna_ir.coupling.value import Block, Factor, Ids, Value
from pruna_ir.program import Program

CONV, HEADS, HEAD_SIZE, FFN, WIDTH, OTHER = "conv", "heads", "head-size", "ffn", "width", "other"
KINDS = (CONV, HEADS, HEAD_SIZE, FFN, WIDTH, OTHER)
TRANSFORMER = (HEADS, HEAD_SIZE, FFN, WIDTH)
"""The kinds that the name ``transformer`` stands for."""

_PRODUCTS = {
    "aten::matmul": ("self", "other"),
    "aten::bmm": ("self", "mat2"),
    "aten::baddbmm": ("batch1", "batch2"),
}
_DENSE = frozenset(
    {"aten::linear", "aten::addmm", "aten::mm", "aten::einsum", "aten::embedding", *_PRODUCTS}
)
_LAYOUT = frozenset(
    f"aten::{name}"
    for name in ("reshape", "view", "flatten", "permute", "transpose", "to", "_to_copy", "squeeze",
                 "unsqueeze", "contiguous", "clone", "alias", "t")
)  # fmt: skip


def kinds_of(program: Program, coupling: Coupling) -> tuple[str, ...]:
    """The kind of every group of the coupling, in their order.

    Args:
        program: the program that ``coupling`` was made from.
        coupling: its analysis.

    >>> from pruna_ir import capture
    >>> from pruna_ir.coupling import couple
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
    ...                           torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> program = capture(net, (torch.ones(2, 3, 3, 3),))
    >>> coupling = couple(program)
    >>> kinds = zip(coupling.groups, kinds_of(program, coupling), strict=True)
    >>> [(group.name, kind) for group, kind in kinds if group.reason is None]
    [('0.weight[0]', 'conv'), ('3.weight[0]', 'ffn')]
    """
    constants = _constants(program)
    uses = _uses(program, constants)
    heads, sizes = _attention(program, coupling, constants)
    kinds = []
    for group in coupling.groups:
        unit = int(group.units[0])
        inner = HEAD_SIZE if unit in sizes else ""
        kinds.append(HEADS if unit in heads else inner or _layer_kind(group, uses, constants))
    return tuple(kinds)


def _layer_kind(
    group: Group, uses: Mapping[str, list[fx.Node]], constants: Container[fx.Node]
) -> str:
    names = dict.fromkeys(member.tensor for member in group.members if member.produced)
    layers = [node for name in names for node in uses.get(name, ())]
    conv = [node for node in layers if _name(node).startswith("aten::conv")]
    dense = [node for node in layers if _name(node) in _DENSE]
    if len(conv) + len(dense) < len(layers) or not layers:
        return OTHER
    if not dense:
        return CONV
    return FFN if _one_input([*conv, *dense], constants) else WIDTH


def _one_input(layers: Sequence[fx.Node], constants: Container[fx.Node]) -> bool:
    """Whether all layers read one activation; tables that are looked up hold a width."""
    if any(_name(node) == "aten::embedding" for node in layers):
        return False
    return len({_source(node, constants) for node in layers}) == 1


def _source(layer: fx.Node, constants: Container[fx.Node]) -> fx.Node | None:
    """The activation that a layer reads, before changes of layout."""
    node = next((n for n in layer.all_input_nodes if n not in constants), None)
    while node is not None and _name(node) in _LAYOUT:
        node = node.all_input_nodes[0]
    return node


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _constants(program: Program) -> dict[fx.Node, dict[str, None]]:
    """The nodes that are computed from stored tensors alone, with the names of these."""
    names: dict[fx.Node, dict[str, None]] = {}
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            names[node] = {str(node.target): None}
        elif node.op == "call_function" and sources and all(n in names for n in sources):
            names[node] = {name: None for source in sources for name in names[source]}
    return names


def _uses(program: Program, constants: Mapping[fx.Node, Iterable[str]]) -> dict[
    str, list[fx.Node]
]:
    """The layers that read each tensor, as it is or computed from it and other tensors."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.calls():
        if node in constants or not (
            _name(node) in _DENSE or _name(node).startswith(("aten::conv", *_RECURRENT))
        ):
            continue
        for source in node.all_input_nodes:
            for name in constants.get(source, ()):
                found.setdefault(name, []).append(node)
    return found


_RECURRENT = ("aten::lstm", "aten::gru", "aten::rnn")


# -- attention -------------------------------------------------------------------------------


def _attention(
    program: Program, coupling: Coupling, constants: Container[fx.Node]
) -> tuple[set[int], set[int]]:
    """The units that are heads, and those that are dimensions of heads."""
    heads: set[int] = set()
    sizes: set[int] = set()
    for node in program.calls():
        for operand, outer, inner in _operands(node, constants):
            value = coupling.values.get(operand.name)
            if not isinstance(value, Value):
                continue
            outside = {f for dim in outer for f in value.dims[dim]}
            inside = {f for dim in inner for f in value.dims[dim]}
            for block in value.blocks:
                units = _units(coupling, block)
                if _varies(block, units, outside):
                    heads.update(units[units >= 0].tolist())
                elif _varies(block, units, inside):
                    sizes.update(units[units >= 0].tolist())
    return heads, sizes - heads


def _units(coupling: Coupling, block: Block) -> Ids:
    """The unit of each id; -1 for those that stay."""
    units = coupling.solved.unit[block.ids]
    return np.where(coupling.solved.frozen[units], -1, units)


def _varies(block: Block, units: Ids, factors: set[Factor]) -> bool:
    axes = [k for k, factor in enumerate(block.factors) if factor in factors]
    return any(bool((units != units.take([0], axis=axis)).any()) for axis in axes)


def _operands(
    node: fx.Node, constants: Container[fx.Node]
) -> Iterator[tuple[fx.Node, Sequence[int], Sequence[int]]]:
    """The activations that are multiplied: (node, dimensions outside heads, inside of them)."""
    name = _name(node)
    if name == "aten::scaled_dot_product_attention":
        pair = [bind_arguments(node)[key] for key in ("query", "key", "value")]
    elif name in _PRODUCTS:
        bound = bind_arguments(node)
        pair = [bound[key] for key in _PRODUCTS[name]]
    elif name == "aten::einsum":
        yield from _einsum_operands(node, constants)
        return
    else:
        return
    if any(operand in constants for operand in pair):
        return
    for operand in pair:
        rank = operand.meta["val"].dim()
        if rank > 2:
            yield operand, range(rank - 2), (rank - 2, rank - 1)


def _einsum_operands(
    node: fx.Node, constants: Container[fx.Node]
) -> Iterator[tuple[fx.Node, Sequence[int], Sequence[int]]]:
    """Letters of both operands and the result stand outside of heads, all others inside."""
    bound: dict[str, Any] = dict(bind_arguments(node))
    operands, equation = bound["tensors"], str(bound["equation"]).replace(" ", "")
    inputs, _, output = equation.partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or "." in equation or any(o in constants for o in operands):
        return
    batch = set(letters[0]) & set(letters[1]) & set(output)
    for operand, own in zip(operands, letters, strict=True):
        if len(own) > 2:
            yield (
                operand,
                [k for k, letter in enumerate(own) if letter in batch],
                [k for k, letter in enumerate(own) if letter not in batch],
            )

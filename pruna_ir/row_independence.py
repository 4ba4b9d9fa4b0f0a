"""Whether each row of a batch is computed by itself, so that a batch may be run in parts.

A row is an index of dimension 0, of the size that all inputs share. The proof goes operator by
operator: a value is row-wise where its dimension 0 is the batch and row i of it depends on
constants and on row i of the inputs only. Known are pointwise operators, convolutions, linear
layers, pools, inference batch norms and operators that work along other dimensions. Where a single
one of the operators in question is not known, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program, shape_of

aten = torch.ops.aten


def rows_are_independent(program: Program, nodes: Collection[fx.Node]) -> bool:
    """Whether all of these nodes are row-wise or constant.

    Args:
        program: its inputs must share a dynamic dimension 0.
        nodes: with each node those that it depends on, in any order.
    """
    placeholders = program.placeholders()
    batch = _batch(program, placeholders)
    if batch is None:
        return False
    rowwise = set(placeholders)
    for node in program.graph.nodes:
        if node not in nodes or node.op != "call_function":
            continue
        if not any(source in rowwise for source in node.all_input_nodes):
            continue
        if not _has_rows(node, batch) or not _is_rowwise(node, rowwise):
            return False
        rowwise.add(node)
    return True


def _batch(program: Program, placeholders: list[fx.Node]) -> torch.SymInt | None:
    """The size that is dimension 0 of every input; None where there is no such."""
    first = {spec.shape[0] if spec.shape else 1 for spec in program.inputs}
    if len(first) != 1 or not isinstance(next(iter(first)), str):
        return None
    shape = shape_of(placeholders[0])
    size = shape[0] if shape else None
    return size if isinstance(size, torch.SymInt) else None


def _has_rows(node: fx.Node, batch: torch.SymInt) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape is not None and statically_known_true(shape[0] == batch)


def _is_rowwise(node: fx.Node, rowwise: Collection[fx.Node]) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return False
    if torch.Tag.pointwise in tags:
        return _broadcasts_over_rows(node, rowwise)
    rule = _RULES.get(node.target)
    return rule is not None and rule(_Operands(node, rowwise))


def _broadcasts_over_rows(node: fx.Node, rowwise: Collection[fx.Node]) -> bool:
    """Whether constants are the same for all rows, and the rows of all others lie together."""
    rank = len(shape_of(node) or ())
    for source in node.all_input_nodes:
        shape = shape_of(source)
        if shape is None:
            return False
        if source in rowwise:
            if len(shape) != rank:
                return False
        elif len(shape) == rank and shape[0] != 1:
            return False
    return True


class _Operands:
    """The arguments of a call, with what is known of them."""

    def __init__(self, node: fx.Node, rowwise: Collection[fx.Node]) -> None:
        self.bound = bind_arguments(node)
        self.sources = node.all_input_nodes
        self.rowwise = rowwise

    def only(self, name: str) -> bool:
        """Whether this operand alone is computed from the inputs."""
        return self.bound[name] in self.rowwise and all(
            source is self.bound[name] for source in self.sources if source in self.rowwise
        )

    def rank(self, name: str) -> int:
        """The number of dimensions of an operand, 0 where it is no tensor."""
        value: Any = self.bound[name]
        return len(shape_of(value) or ()) if isinstance(value, fx.Node) else 0

    def spares_rows(self, name: str, dims: str) -> bool:
        """Whether a dimension, or each of some, is a constant one other than 0."""
        value, rank = self.bound[dims], self.rank(name)
        listed = value if isinstance(value, (list, tuple)) else [value]
        return bool(listed) and all(isinstance(d, int) and d % rank != 0 for d in listed)


def _layer(rank: int | None = None) -> Callable[[_Operands], bool]:
    """Of a rule for operators of one computed operand that has a dimension of rows."""

    def rule(operands: _Operands) -> bool:
        name = "input" if "input" in operands.bound else "self"
        found = operands.rank(name)
        return operands.only(name) and (found == rank if rank else found >= 2)

    return rule


def _along(dims: str) -> Callable[[_Operands], bool]:
    """Of a rule for operators that work along named dimensions of their operand."""

    def rule(operands: _Operands) -> bool:
        name = "input" if "input" in operands.bound else "self"
        return operands.only(name) and operands.spares_rows(name, dims)

    return rule


def _batch_norm(operands: _Operands) -> bool:
    return operands.only("input") and operands.bound["training"] is False


def _layer_norm(operands: _Operands) -> bool:
    return operands.only("input") and len(operands.bound["normalized_shape"]) < operands.rank(
        "input"
    )


def _concatenation(operands: _Operands) -> bool:
    parts = operands.bound["tensors"]
    rank, dim = len(shape_of(parts[0]) or ()), operands.bound["dim"]
    return all(part in operands.rowwise for part in parts) and dim % rank != 0


_RULES: dict[Any, Callable[[_Operands], bool]] = {
    aten.conv1d.default: _layer(3),
    aten.conv2d.default: _layer(4),
    aten.conv3d.default: _layer(5),
    aten.linear.default: _layer(),
    aten.max_pool2d.default: _layer(4),
    aten.avg_pool2d.default: _layer(4),
    aten.adaptive_avg_pool2d.default: _layer(4),
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.cat.default: _concatenation,
    aten.flatten.using_ints: _along("start_dim"),
    aten.mean.dim: _along("dim"),
    aten.softmax.int: _along("dim"),
}

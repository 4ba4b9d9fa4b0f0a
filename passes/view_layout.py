"""What views show of a tensor: for each of their dimensions, the indices of the tensor's axes.

    view[i, j, k, ...] = tensor[..., start + i * stride_i + k * stride_k, ...]

A dimension is a list of pieces, outermost first; a piece counts along one axis in steps of its
stride, and pieces of one axis add up. Reshapes only regroup pieces, so that merging dimensions and
cutting them again is exact, with sizes known or not. Dimensions of size 1 have no piece.

    x [b, 17, 96] -> reshape [b, 17, 3, 2, 16] -> permute [2, 0, 3, 1, 4] -> its first third:
    [(axis 0, b)], [(axis 2, 2 steps of 16)], [(axis 1, 17)], [(axis 2, 16 steps of 1)]

Limits: an axis of unknown size is not cut; slices have step 1, and take one piece apart.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.coupling.value import Extent, extent, quotient
from pruna_ir.passes.attention_patterns import transposition
from pruna_ir.passes.layer_parts import SPLITS

aten = torch.ops.aten

_REGROUPS = (
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default)
_PARTS = (*SPLITS, aten.unbind.int)


@dataclass(frozen=True)
class Piece:
    """``size`` steps of ``stride`` along an axis."""

    axis: int
    size: Extent
    stride: int = 1


Dim = tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """The pieces of each dimension, and where each axis starts."""

    dims: tuple[Dim, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(node: fx.Node) -> Layout:
        """A tensor as it is: each dimension is an axis."""
        sizes = _sizes(node)
        dims = tuple(whole(axis, size) for axis, size in enumerate(sizes))
        return Layout(dims, (0,) * len(sizes))

    def with_last(self, size: int) -> Layout:
        """The layout with the last dimension replaced by a new axis, the last one."""
        new = whole(len(self.starts), size)
        return Layout((*self.dims[:-1], new), (*self.starts, 0))


def whole(axis: int, size: Extent) -> Dim:
    """The dimension that is an axis of this size."""
    return () if isinstance(size, int) and size == 1 else (Piece(axis, size),)


def _sizes(node: fx.Node) -> list[Extent]:
    return [extent(size) for size in node.meta["val"].shape]


def viewed(node: fx.Node) -> fx.Node | None:
    """The tensor of which a node is a view; None where it computes something.

    The part of a split is a view of what is split.
    """
    if node.target is operator.getitem:
        parts = node.args[0]
        split = isinstance(parts, fx.Node) and parts.target in _PARTS
        return bind_arguments(parts)["self"] if split else None  # type: ignore[arg-type]
    known = (*_REGROUPS, *_SAME, aten.select.int, aten.slice.Tensor)
    if node.target in known or transposition(node) is not None:
        source = bind_arguments(node)["self"]
        return source if isinstance(source, fx.Node) else None
    return None


def through(layout: Layout, node: fx.Node) -> Layout | None:
    """The layout of a view of what has this layout; None where it has none."""
    if node.target in _SAME:
        return layout
    if node.target in _REGROUPS:
        return _regrouped(layout, _sizes(node))
    if (order := transposition(node)) is not None:
        return Layout(tuple(layout.dims[axis] for axis in order), layout.starts)
    if node.target is operator.getitem:
        return _part(layout, *node.args)
    bound = bind_arguments(node)
    dim = int(bound["dim"]) % len(layout.dims)
    if node.target is aten.select.int:
        return _selected(layout, dim, bound["index"], bound["self"].meta["val"].shape[dim])
    return _sliced(layout, dim, bound)


def _regrouped(layout: Layout, sizes: Sequence[Extent]) -> Layout | None:
    todo = [piece for dim in reversed(layout.dims) for piece in reversed(dim)]
    dims = []
    for size in sizes:
        dim = _taken(todo, size)
        if dim is None:
            return None
        dims.append(_merged(dim))
    return None if todo else Layout(tuple(dims), layout.starts)


def _taken(todo: list[Piece], size: Extent) -> list[Piece] | None:
    """The pieces of a dimension of this size, taken from the end of a list."""
    found = []
    while not (isinstance(size, int) and size == 1):
        if not todo:
            return None
        piece = todo.pop()
        rest = quotient(size, piece.size)
        if rest is None:
            inner = quotient(piece.size, size)
            if not isinstance(inner, int) or not isinstance(size, int):
                return None
            todo.append(Piece(piece.axis, inner, piece.stride))
            piece, rest = Piece(piece.axis, size, piece.stride * inner), 1
        found.append(piece)
        size = rest
    return found


def _merged(dim: list[Piece]) -> Dim:
    """Pieces with those joined that count on where the next one ends."""
    found: list[Piece] = []
    for piece in dim:
        before = found[-1] if found else None
        if before and before.axis == piece.axis and before.stride == piece.stride * piece.size:
            found[-1] = Piece(piece.axis, before.size * piece.size, piece.stride)
        else:
            found.append(piece)
    return tuple(found)


def _narrowed(layout: Layout, dim: int, start: int, length: int) -> Layout | None:
    pieces = layout.dims[dim]
    if not pieces:
        return layout if (start, length) == (0, 1) else None
    if len(pieces) > 1 or not isinstance(pieces[0].size, int):
        return None
    (piece,) = pieces
    starts = list(layout.starts)
    starts[piece.axis] += start * piece.stride
    kept = () if length == 1 else (Piece(piece.axis, length, piece.stride),)
    dims = (*layout.dims[:dim], kept, *layout.dims[dim + 1 :])
    return Layout(dims, tuple(starts))


def _selected(layout: Layout, dim: int, index: Any, size: Any) -> Layout | None:
    if not isinstance(index, int) or not isinstance(size, int):
        return None
    found = _narrowed(layout, dim, index % size, 1)
    if found is None:
        return None
    return Layout((*found.dims[:dim], *found.dims[dim + 1 :]), found.starts)


def _sliced(layout: Layout, dim: int, bound: dict[str, Any]) -> Layout | None:
    size, ends = bound["self"].meta["val"].shape[dim], (bound["start"], bound["end"])
    if bound["step"] != 1 or any(isinstance(end, fx.Node) for end in ends):
        return None
    if not isinstance(size, int):
        return layout if ends[0] in (0, None) and ends[1] in (None, _FAR) else None
    start, stop, _ = slice(*ends).indices(size)
    return _narrowed(layout, dim, start, max(stop - start, 0))


_FAR = 2**63 - 1
"""What a slice without an end has for one."""


def _part(layout: Layout, parts: Any, index: Any) -> Layout | None:
    bound = bind_arguments(parts)
    dim = int(bound["dim"]) % len(layout.dims)
    shapes = [part.shape for part in parts.meta["val"]]
    if parts.target is aten.unbind.int:
        return _selected(layout, dim, index, len(shapes))
    sizes = [shape[dim] for shape in shapes]
    if not all(isinstance(size, int) for size in sizes):
        return None
    stops = list(accumulate(sizes))
    return _narrowed(layout, dim, stops[index] - sizes[index], sizes[index])


def positions(layout: Layout, dims: Sequence[int], axis: int) -> torch.Tensor | None:
    """Where along an axis the elements of some dimensions lie, in their order.

    Returns int64 of one dimension; None where these dimensions count along another axis, too,
    or some size is unknown.
    """
    found = torch.tensor([layout.starts[axis]])
    for piece in (piece for dim in dims for piece in layout.dims[dim]):
        if piece.axis != axis or not isinstance(piece.size, int):
            return None
        found = (found[:, None] + torch.arange(piece.size) * piece.stride).flatten()
    return found

"""Queries, keys and values of one projection, cut apart before anything moves.

    a, b, ... = unbind(permute(reshape(x, [..., n, h, d]), [n's dimension, ...]), 0)
      -->
    a = permute(reshape(slice(x, -1, 0, h * d), [..., h, d]), ...), and so on

ViT, Swin and others of timm write the first form. A runtime takes it literally: it moves the whole
projection, cuts it, and drops a dimension of size 1 from each part. In the second form each part
is one slice of contiguous rows, and one transpose, which products take in.

Limits: the unbound dimension must be the first one of those that the last dimension of ``x`` is
reshaped into; nothing but getitems (or selects) may read what is permuted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program, shape_of
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten

_PERMUTE = aten.permute.default
_RESHAPES = (aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class _Projection:
    """``permute(reshape(source))`` whose first dimension is read index by index.

    Attributes:
        permuted: the permute.
        source: what is reshaped.
        sizes: the reshape's sizes as they were given.
        at: the dimension of the reshape that is read index by index.
        order: the permute's dimensions.
        readers: each reader, and the index that it reads.
    """

    permuted: fx.Node
    source: fx.Node
    sizes: list[Any]
    at: int
    order: list[int]
    readers: list[tuple[fx.Node, int]]


def with_split_projections(program: Program) -> Program:
    """The program with every such projection in the second form; unchanged without any."""
    if not any(_projection(node) for node in program.calls(_PERMUTE)):
        return program
    rw = Rewrite(program, "onnx", Context())
    for node in rw.calls(_PERMUTE):
        found = _projection(node)
        if found is not None:
            _split(rw, found)
    return rw.finish()


def _projection(node: fx.Node) -> _Projection | None:
    arguments = bind_arguments(node)
    reshape = arguments["self"]
    if reshape.target not in _RESHAPES or len(reshape.users) != 1:
        return None
    given = bind_arguments(reshape)
    source, sizes = given["self"], list(given["shape"] if "shape" in given else given["size"])
    order = [dim % len(sizes) for dim in arguments["dims"]]
    readers = _readers(node)
    if readers is None or not _starts_last(source, reshape, order[0]):
        return None
    return _Projection(node, source, sizes, order[0], order, readers)


def _starts_last(source: fx.Node, reshape: fx.Node, at: int) -> bool:
    """Whether ``at`` is the first of the dimensions that the source's last one becomes."""
    was, new = shape_of(source), shape_of(reshape)
    if not was or not new or at != len(was) - 1 or not _static((was[-1], *new[at:])):
        return False
    alike = all(str(a) == str(b) for a, b in zip(was[:-1], new[:at], strict=True))
    return alike and math.prod(map(int, new[at:])) == int(was[-1])


def _static(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _readers(node: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """Who reads which index of the first dimension; None where somebody reads otherwise."""
    found: list[tuple[fx.Node, int]] = []
    for user in node.users:
        if user.target is aten.select.int and bind_arguments(user)["dim"] == 0:
            found.append((user, bind_arguments(user)["index"]))
        elif user.target is aten.unbind.int and bind_arguments(user)["dim"] == 0:
            if any(part.target is not operator.getitem for part in user.users):
                return None
            found += [(part, int(part.args[1])) for part in user.users]  # type: ignore[arg-type]
        else:
            return None
    return found or None


def _split(rw: Rewrite, found: _Projection) -> None:
    new = found.permuted.meta["val"]
    count = int(new.shape[0])
    width = int(found.source.meta["val"].shape[-1]) // count
    sizes = [*found.sizes[: found.at], *found.sizes[found.at + 1 :]]
    order = [dim - (dim > found.at) for dim in found.order[1:]]
    like = found.permuted
    for reader, index in found.readers:
        start = (index % count) * width
        part = rw.insert(
            aten.slice.Tensor, before=reader, like=like,
            self=found.source, dim=-1, start=start, end=start + width,
        )  # fmt: skip
        shaped = rw.insert(
            aten.reshape.default, before=reader, like=like, self=part, shape=sizes
        )
        moved = rw.insert(_PERMUTE, before=reader, like=like, self=shaped, dims=order)
        rw.replace(reader, moved)

"""Values carried back through views: the tensor that a view shows, with what it shows replaced.

    view = slice(base, 1, 0, 4)   -->   slice_scatter(base, value, 1, 0, 4)
    view = transpose(base, 0, 1)  -->   transpose(value, 0, 1)

Every view has one inverse here, or writing through it is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.transform import Rewrite

aten = torch.ops.aten


def same_type(a: fx.Node, b: Any) -> bool:
    """Whether two values agree in dtype and (symbolic) shape."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and str(list(x.shape)) == str(list(y.shape))


def sizes(rw: Rewrite, node: fx.Node, before: fx.Node) -> list[int | fx.Node]:
    """The sizes of a node's value as arguments: integers, or nodes that measure them."""
    return [
        size
        if isinstance(size, int)
        else rw.insert(aten.sym_size.int, before=before, like=node, self=node, dim=axis)
        for axis, size in enumerate(node.meta["val"].shape)
    ]


_Inverse = Callable[[Rewrite, dict[str, Any], fx.Node, fx.Node, fx.Node], fx.Node]


def _scatter(target: torch._ops.OpOverload, *names: str) -> _Inverse:
    def inverse(
        rw: Rewrite, bound: dict[str, Any], base: fx.Node, value: fx.Node, before: fx.Node
    ) -> fx.Node:
        arguments = {name: bound[name] for name in names}
        return rw.insert(target, before=before, like=before, self=base, src=value, **arguments)

    return inverse


def _reshaped(
    rw: Rewrite, _bound: dict[str, Any], base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    shape = sizes(rw, base, before)
    return rw.insert(aten.reshape.default, before=before, like=before, self=value, shape=shape)


def _narrowed(
    rw: Rewrite, bound: dict[str, Any], base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    start, length = bound["start"], bound["length"]
    if isinstance(start, fx.Node) or isinstance(length, fx.Node):
        end: Any = rw.insert_function(operator.add, start, length, before=before, like=before)
    else:
        end = start + length
    return rw.insert(
        aten.slice_scatter.default,
        before=before, like=before, self=base, src=value, dim=bound["dim"], start=start, end=end,
    )  # fmt: skip


def _swapped(first: str, second: str) -> _Inverse:
    def inverse(
        rw: Rewrite, bound: dict[str, Any], _base: fx.Node, value: fx.Node, before: fx.Node
    ) -> fx.Node:
        return rw.insert(
            aten.transpose.int,
            before=before, like=before, self=value, dim0=bound[first], dim1=bound[second],
        )  # fmt: skip

    return inverse


def _transposed(
    rw: Rewrite, _bound: dict[str, Any], base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    if len(base.meta["val"].shape) < 2:
        return value
    return rw.insert(
        aten.transpose.int, before=before, like=before, self=value, dim0=0, dim1=1
    )


def _permuted(
    rw: Rewrite, bound: dict[str, Any], _base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    rank = len(bound["dims"])
    order = [d % rank for d in bound["dims"]]
    dims = [order.index(axis) for axis in range(rank)]
    return rw.insert(aten.permute.default, before=before, like=before, self=value, dims=dims)


def _unchanged(
    _rw: Rewrite, _bound: dict[str, Any], _base: fx.Node, value: fx.Node, _before: fx.Node
) -> fx.Node:
    return value


_INVERSES: dict[Any, _Inverse] = {
    aten.slice.Tensor: _scatter(aten.slice_scatter.default, "dim", "start", "end", "step"),
    aten.select.int: _scatter(aten.select_scatter.default, "dim", "index"),
    aten.diagonal.default: _scatter(aten.diagonal_scatter.default, "offset", "dim1", "dim2"),
    aten.narrow.default: _narrowed,
    aten.transpose.int: _swapped("dim0", "dim1"),
    aten.swapaxes.default: _swapped("axis0", "axis1"),
    aten.swapdims.default: _swapped("dim0", "dim1"),
    aten.t.default: _transposed,
    aten.permute.default: _permuted,
    **dict.fromkeys(
        (
            aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int,
            aten.view_as.default, aten.reshape_as.default, aten.squeeze.default,
            aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
        ),
        _reshaped,
    ),
    **dict.fromkeys(
        (
            aten.alias.default, aten.detach.default, aten.contiguous.default, aten.dropout.default,
            aten.lift_fresh.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
            aten.to.other, aten.positive.default, aten.type_as.default,
        ),
        _unchanged,
    ),
}  # fmt: skip


def written_back(
    rw: Rewrite, view: fx.Node, base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    """``base`` with the part that ``view`` shows replaced by ``value``."""
    inverse = _INVERSES.get(view.target)
    expands = view.target in (aten.expand.default, aten.expand_as.default)
    if expands and same_type(view, base):
        inverse = _unchanged
    if inverse is None:
        raise rw.error(
            before, f"{before.target} writes through the view {view.name} ({view.target}), which "
            "cannot be written back functionally; copy the tensor (clone) before writing into it",
        )  # fmt: skip
    return inverse(rw, bind_arguments(view), base, value, before)


_PARTS = frozenset(
    {
        aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default,
        aten.tensor_split.sections, aten.tensor_split.indices, aten.unbind.int,
    }
)  # fmt: skip


def part_written_back(
    rw: Rewrite, item: fx.Node, parts: fx.Node, base: fx.Node, value: fx.Node, before: fx.Node
) -> fx.Node:
    """``base`` with one part of its split, chunk or unbind replaced by ``value``."""
    if parts.target not in _PARTS:
        raise rw.error(
            before, f"{before.target} writes through {parts.name} ({parts.target}), which cannot "
            "be written back functionally; copy the tensor (clone) before writing into it",
        )  # fmt: skip
    dim, index = bind_arguments(parts)["dim"], item.args[1]
    assert isinstance(index, int)
    shapes = [part.shape for part in parts.meta["val"]]
    index %= len(shapes)
    if parts.target is aten.unbind.int:
        return rw.insert(
            aten.select_scatter.default,
            before=before, like=before, self=base, src=value, dim=dim, index=index,
        )  # fmt: skip
    lengths = [shape[dim] for shape in shapes]
    if any(not isinstance(length, int) for length in lengths[: index + 1]):
        raise rw.error(
            before, f"{before.target} writes through {parts.name} ({parts.target}), whose parts "
            "have dynamic sizes; copy the tensor (clone) before writing into it",
        )  # fmt: skip
    start = sum(lengths[:index])
    return rw.insert(
        aten.slice_scatter.default,
        before=before, like=before, self=base, src=value, dim=dim,
        start=start, end=start + lengths[index],
    )  # fmt: skip

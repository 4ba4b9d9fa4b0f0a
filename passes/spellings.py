"""One spelling per operator: what `canonicalize` turns each alternative into, bit for bit.

    view, _unsafe_view, view_as, unflatten     reshape
    swapaxes, swapdims, t, mT, numpy_T         transpose.int (permute beyond two dimensions)
    movedim                                    permute
    narrow                                     slice.Tensor
    expand_as, broadcast_to                    expand
    to.*, type_as, _to_copy                    to.dtype, where the device stays
    relu6                                      hardtanh(x, 0, 6)
    conv*d.padding, convolution                conv*d, conv_transpose*d
    pad with mode "constant"                   constant_pad_nd
    rsub.Tensor(x, y)                          sub(y, x)
    rsub.Scalar(x, s), x floating              add(neg(x), s): s - x = (-x) + s for every float
    clip, concat, multiply, __and__, ...       clamp, cat, mul, bitwise_and, ...
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.passes.view_inverses import sizes
from pruna_ir.program import dtype_of
from pruna_ir.transform import Rewrite

aten = torch.ops.aten


def respell(rw: Rewrite, node: fx.Node) -> fx.Node | None:
    """Replace a call by the canonical spelling; the new node, or None where it was canonical."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    renamed = _renamed(target)
    if renamed is not None:
        bound = bind_arguments(node)
        names = [argument.name for argument in renamed._schema.arguments]
        arguments = dict(zip(names, bound.values(), strict=False))
        new = rw.insert(renamed, before=node, like=node, **arguments)
    else:
        rule = _RULES.get(target)
        found = rule(rw, node, bind_arguments(node)) if rule is not None else None
        if found is None:
            return None
        new = found
    rw.replace(node, new)
    return new


# -- other names of the same operator ----------------------------------------------------------

_ALIASES = {
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "absolute": "abs",
    "negative": "neg",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "special_erf": "erf",
    "moveaxis": "movedim",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "fix": "trunc",
}


def _renamed(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    space, name = target._schema.name.split("::")
    if space != "aten" or name not in _ALIASES:
        return None
    packet = getattr(aten, _ALIASES[name])
    overload = getattr(packet, target._overloadname, None)
    if not isinstance(overload, torch._ops.OpOverload):
        return None
    count = len(target._schema.arguments)
    return overload if len(overload._schema.arguments) == count else None


# -- shapes ------------------------------------------------------------------------------------

_Bound = dict[str, Any]
_Rule = Callable[[Rewrite, fx.Node, _Bound], fx.Node | None]


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _new(
    rw: Rewrite, node: fx.Node, target: torch._ops.OpOverload, **arguments: Any
) -> fx.Node:
    return rw.insert(target, before=node, like=node, **arguments)


def _reshape(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    return _new(rw, node, aten.reshape.default, self=bound["self"], shape=bound["size"])


def _reshape_like(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    shape = sizes(rw, bound["other"], node)
    return _new(rw, node, aten.reshape.default, self=bound["self"], shape=shape)


def _unflatten(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    source = bound["self"]
    dim = bound["dim"] % _rank(source)
    around = sizes(rw, source, node)
    inner = list(bound["sizes"])
    shape = [*around[:dim], *inner, *around[dim + 1 :]]
    return _new(rw, node, aten.reshape.default, self=source, shape=shape)


def _expand_like(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    size = sizes(rw, bound["other"], node)
    return _new(rw, node, aten.expand.default, self=bound["self"], size=size)


def _expand(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    return _new(rw, node, aten.expand.default, self=bound["self"], size=bound["size"])


def _transpose(first: str, second: str) -> _Rule:
    def rule(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
        dims = {"dim0": bound[first], "dim1": bound[second]}
        return _new(rw, node, aten.transpose.int, self=bound["self"], **dims)

    return rule


def _t(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    if _rank(bound["self"]) < 2:
        source: fx.Node = bound["self"]
        return source
    return _new(rw, node, aten.transpose.int, self=bound["self"], dim0=0, dim1=1)


def _last_two(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    return _new(rw, node, aten.transpose.int, self=bound["self"], dim0=-2, dim1=-1)


def _all_reversed(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    rank = _rank(bound["self"])
    if rank <= 2:
        return _t(rw, node, bound)
    dims = list(reversed(range(rank)))
    return _new(rw, node, aten.permute.default, self=bound["self"], dims=dims)


def _movedim(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    rank = _rank(bound["self"])

    def axes(value: Any) -> list[int]:
        return [v % rank for v in (value if isinstance(value, (list, tuple)) else [value])]

    source, destination = axes(bound["source"]), axes(bound["destination"])
    moved = dict(zip(destination, source, strict=True))
    rest = iter(axis for axis in range(rank) if axis not in source)
    dims = [moved[axis] if axis in moved else next(rest) for axis in range(rank)]
    return _new(rw, node, aten.permute.default, self=bound["self"], dims=dims)


def _narrow(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node | None:
    start, length = bound["start"], bound["length"]
    if isinstance(start, int) and start < 0:
        return None
    if isinstance(start, int) and isinstance(length, int):
        end: Any = start + length
    else:
        end = rw.insert_function(operator.add, start, length, before=node, like=node)
    arguments = {"dim": bound["dim"], "start": start, "end": end}
    return _new(rw, node, aten.slice.Tensor, self=bound["self"], **arguments)


# -- dtypes and values -------------------------------------------------------------------------


def _cast(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node | None:
    """``to.dtype``; None for a change of device, layout or pinning, which stays as it is."""
    source = bound["self"]
    before, after = source.meta["val"], node.meta["val"]
    if node.target is aten.to.dtype and set(_given(bound)) == {"self", "dtype"}:
        return None
    if before.device != after.device or before.layout != after.layout or bound.get("pin_memory"):
        return None
    return _new(rw, node, aten.to.dtype, self=source, dtype=after.dtype)


def _given(bound: _Bound) -> list[str]:
    return [name for name, value in bound.items() if value is not None and value is not False]


def _relu6(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    return _new(rw, node, aten.hardtanh.default, self=bound["self"], min_val=0, max_val=6)


def _rsub_tensor(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    return _new(
        rw, node, aten.sub.Tensor,
        self=bound["other"], other=bound["self"], alpha=bound["alpha"],
    )  # fmt: skip


def _rsub_scalar(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node | None:
    dtype = dtype_of(bound["self"])
    if bound["alpha"] != 1 or dtype is None or not dtype.is_floating_point:
        return None
    negative = _new(rw, node, aten.neg.default, self=bound["self"])
    return _new(rw, node, aten.add.Tensor, self=negative, other=bound["other"])


def _pad(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node | None:
    if bound["mode"] != "constant":
        return None
    value = bound["value"] if bound["value"] is not None else 0.0
    arguments = {"pad": bound["pad"], "value": value}
    return _new(rw, node, aten.constant_pad_nd.default, self=bound["self"], **arguments)


# -- convolutions ------------------------------------------------------------------------------

_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_CONV_TRANSPOSE = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


def _convolution(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node | None:
    spatial = len(bound["stride"])
    if spatial not in _CONV or _rank(bound["input"]) != spatial + 2:
        return None
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    arguments = {name: bound[name] for name in names}
    if bound["transposed"]:
        arguments["output_padding"] = bound["output_padding"]
        return _new(rw, node, _CONV_TRANSPOSE[spatial], **arguments)
    if any(bound["output_padding"]):
        return None
    return _new(rw, node, _CONV[spatial], **arguments)


def _named_padding(rw: Rewrite, node: fx.Node, bound: _Bound) -> fx.Node:
    """``"valid"`` pads nothing; ``"same"`` pads d (k - 1), the odd one after the last element."""
    weight = bound["weight"].meta["val"]
    kernel = [int(size) for size in weight.shape[2:]]
    dilation = [int(d) for d in bound["dilation"]]
    dilation = dilation * len(kernel) if len(dilation) == 1 else dilation
    total = [0] * len(kernel)
    if bound["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    source = bound["input"]
    if any(t % 2 for t in total):
        pads = [side for t in reversed(total) for side in (0, t % 2)]
        source = _new(rw, node, aten.constant_pad_nd.default, self=source, pad=pads, value=0.0)
    arguments = bound | {"input": source, "padding": [t // 2 for t in total]}
    return _new(rw, node, _CONV[len(kernel)], **arguments)


_RULES: dict[Any, _Rule] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.view_as.default: _reshape_like,
    aten.reshape_as.default: _reshape_like,
    aten.unflatten.int: _unflatten,
    aten.expand_as.default: _expand_like,
    aten.broadcast_to.default: _expand,
    aten.swapaxes.default: _transpose("axis0", "axis1"),
    aten.swapdims.default: _transpose("dim0", "dim1"),
    aten.t.default: _t,
    aten.mT.default: _last_two,
    aten.numpy_T.default: _all_reversed,
    aten.movedim.intlist: _movedim,
    aten.movedim.int: _movedim,
    aten.narrow.default: _narrow,
    aten.relu6.default: _relu6,
    aten.rsub.Tensor: _rsub_tensor,
    aten.rsub.Scalar: _rsub_scalar,
    aten.pad.default: _pad,
    aten.convolution.default: _convolution,
    **dict.fromkeys(
        (
            aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other,
            aten._to_copy.default, aten.type_as.default,
        ),
        _cast,
    ),
    **dict.fromkeys(
        (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _named_padding
    ),
}  # fmt: skip

"""Calls that return their operand bit for bit, and so may vanish.

    dropout outside training, alias, detach, contiguous, clone, lift_fresh, casts to the same
    dtype, reshape and expand to the same shape, slices of everything, permutes in order,
    constant_pad_nd by nothing, cat of one tensor, x * 1, x / 1, x - 0, integer x + 0

Not ``x + 0`` on floats: it turns -0.0 into 0.0. Sizes count as equal only where they are provably
the same symbolic expression. ``detach`` stays in training programs, where it stops gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.propagate import same_value

aten = torch.ops.aten

_COPIES = (aten.contiguous.default, aten.clone.default)
_STRICT = (aten.view_as_complex.default,)
"""Operators that refuse tensors whose memory is in another order: a copy before them stays."""

_Bound = dict[str, Any]
_Rule = Callable[[_Bound], fx.Node | None]


def identity_source(node: fx.Node, *, training: bool) -> fx.Node | None:
    """The operand that a call returns unchanged; None where it does, or may do, anything."""
    if node.target is operator.getitem:
        return _dropout_item(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if training and node.target is aten.detach.default:
        return None
    if node.target in _COPIES and any(user.target in _STRICT for user in node.users):
        return None
    rule = _RULES.get(node.target)
    source = rule(bind_arguments(node)) if rule is not None else None
    if source is None or not _same_type(source, node):
        return None
    return source


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return same_value(x, y) and x.device == y.device and x.layout == y.layout


def _dropout_item(node: fx.Node) -> fx.Node | None:
    """The first result of ``native_dropout`` outside training."""
    source, index = node.args
    if not isinstance(source, fx.Node) or source.target is not aten.native_dropout.default:
        return None
    bound = bind_arguments(source)
    return bound["input"] if index == 0 and bound["train"] is False else None


def _operand(bound: _Bound) -> fx.Node | None:
    """The first operand; `identity_source` compares the types."""
    first = next(iter(bound.values()))
    return first if isinstance(first, fx.Node) else None


def _dropout(bound: _Bound) -> fx.Node | None:
    return bound["input"] if bound["train"] is False else None


def _slice(bound: _Bound) -> fx.Node | None:
    """A slice with step 1 that keeps the size keeps everything."""
    return bound["self"] if bound["step"] == 1 else None


def _permute(bound: _Bound) -> fx.Node | None:
    dims = [d % len(bound["dims"]) for d in bound["dims"]]
    return bound["self"] if dims == list(range(len(dims))) else None


def _transpose(bound: _Bound) -> fx.Node | None:
    rank = max(len(bound["self"].meta["val"].shape), 1)
    return bound["self"] if bound["dim0"] % rank == bound["dim1"] % rank else None


def _cat(bound: _Bound) -> fx.Node | None:
    (first, *rest) = bound["tensors"]
    return first if not rest else None


def _constant_pad(bound: _Bound) -> fx.Node | None:
    return bound["self"] if all(type(p) is int and p == 0 for p in bound["pad"]) else None


def _repeat(bound: _Bound) -> fx.Node | None:
    return bound["self"] if all(type(r) is int and r == 1 for r in bound["repeats"]) else None


def _times_one(bound: _Bound) -> fx.Node | None:
    return bound["self"] if _is_number(bound["other"], 1) else None


def _minus_zero(bound: _Bound) -> fx.Node | None:
    """x - 0 = x for every float; x - (-0.0) is not, since -0.0 + 0.0 = 0.0."""
    other = bound["other"]
    exact = _is_number(other, 0) and not str(other).startswith("-") and bound["alpha"] == 1
    return bound["self"] if exact else None


def _plus_zero(bound: _Bound) -> fx.Node | None:
    dtype = bound["self"].meta["val"].dtype
    floating = dtype.is_floating_point or dtype.is_complex
    return bound["self"] if _is_number(bound["other"], 0) and not floating else None


def _is_number(value: Any, number: int) -> bool:
    return type(value) in (int, float) and value == number


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(
        (
            aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default,
            aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.positive.default,
            aten.resolve_conj.default, aten.resolve_neg.default, aten.to.dtype,
            aten.reshape.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim,
            aten.squeeze.dims, aten.flatten.using_ints,
        ),
        _operand,
    ),
    **dict.fromkeys(
        (
            aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default,
        ),
        _dropout,
    ),
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _constant_pad,
    aten.repeat.default: _repeat,
    aten.mul.Tensor: _times_one,
    aten.div.Tensor: _times_one,
    aten.sub.Tensor: _minus_zero,
    aten.add.Tensor: _plus_zero,
}  # fmt: skip

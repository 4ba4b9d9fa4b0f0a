"""Products that read one value, run as one: query, key and value of attention, gate and value.

    q = linear(x, Wq, bq); k = linear(x, Wk); v = linear(x, Wv, bv)
      -->
    y = packed(x, [Wq; Wk; Wv], [bq; 0; bv]); q, k, v = slices of y, in place

One call reads x once and shares its rows among the threads once. Measured on attention blocks, 192
and 768 wide, with two threads (with one): 1.29 (1.19) times as fast for one token, 1.12 (1.06) for
16, 1.03 (0.99) for 64, 1.03 (1.00) for 512, 1.08 (1.04) for ViT-Tiny's 197.

Slices have other strides than the values that they stand for, so products stay apart where someone
might care: where a reader is neither a view nor known to take any strides.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

import pruna_ir.kernels.attention
from pruna_ir.backends.packed_layers import Layer

aten = torch.ops.aten

_VIEWS = (
    aten.reshape.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default,
    aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.expand.default, operator.getitem,
)  # fmt: skip
_ANY_STRIDES = (
    aten.scaled_dot_product_attention.default, pruna_ir.kernels.attention.KERNEL.op,
    aten.matmul.default, aten.bmm.default, aten.linear.default, aten.cat.default,
    aten.softmax.int, aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim,
    aten.sym_size.int,
)  # fmt: skip
_IN_PLACE = (aten.relu.default, aten.silu.default, aten.sigmoid.default)
"""Activations that oneDNN would not compute in the product's own loop."""


def group_products(layers: Iterable[Layer]) -> dict[Layer, tuple[Layer, ...]]:
    """The products that run as one, each with all of its group; those alone are left out.

    Args:
        layers: in the order of the graph.
    """
    found: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        if _may_join(layer):
            found.setdefault(layer.source, []).append(layer)
    groups = [tuple(group) for group in found.values() if len(group) > 1]
    return {layer: group for group in groups for layer in group}


def _may_join(layer: Layer) -> bool:
    """Whether a layer is a float product by itself that may give out a slice."""
    plain = layer.geometry is None and layer.integers is None and layer.residual is None
    activation = layer.activation
    return (
        plain
        and (activation is None or activation.target in _IN_PLACE)
        and _takes_slices(layer.last)
    )


def _takes_slices(node: fx.Node) -> bool:
    """Whether all who read a value, or a view of it, do so with any strides."""
    return all(
        _takes_slices(user) if user.target in _VIEWS else _takes_any(user) for user in node.users
    )


def _takes_any(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    pointwise = torch.Tag.pointwise in tags and schema is not None and not schema.is_mutable
    return pointwise or node.target in _ANY_STRIDES

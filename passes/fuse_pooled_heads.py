"""Fuse the head of an image classifier into one operator.

    p = mean(x, all spatial dimensions); y = act(linear(flatten(p), W, b))
      -->
    y = pruna::pooled_linear(x, W, b, act)

The mean is ``adaptive_avg_pool`` to one position or ``mean`` over every dimension behind the
channels; what flattens it is any reshape, squeeze or select that only drops dimensions of size 1.
The layer is ``linear`` or ``addmm``, whose weight [in, out] is stored transposed under a name of
its own. The activation behind it, MobileNetV3's, is optional.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

import pruna_ir.kernels.pooled_linear
from pruna_ir.call import bind_arguments
from pruna_ir.passes.layer_activations import Applied, activation_behind
from pruna_ir.passes.weight_copies import copied
from pruna_ir.program import dtype_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
POOLED_LINEAR = pruna_ir.kernels.pooled_linear.KERNEL.op

_POOLS = (
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)  # fmt: skip
_LARGEST = (
    aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.amax.default,
    aten.max_pool2d.default,
)  # fmt: skip
_FLATTENERS = (
    aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.select.int,
)  # fmt: skip
"""What may drop the dimensions of size 1 that a pool leaves."""
_OTHERS = (
    aten.dropout.default, aten.layer_norm.default, aten.batch_norm.default, aten.permute.default,
    aten.transpose.int,
)  # fmt: skip
_FARTHEST = 8
"""How many nodes a near miss may have between pool and layer."""


@dataclass(frozen=True)
class FusePooledHeads(Pass):
    """Replace a global mean, a linear layer and its activation by ``pruna::pooled_linear``.

    Rewrite:
        p = adaptive_avg_pool2d(x, 1); f = flatten(p, 1); l = linear(f, W, b); y = hardswish(l)
          -->
        y = pooled_linear(x, W, b, "hardswish")

    Requires: nobody else reads p, f or (before an activation) l; no dropout in between.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> from torch import nn
    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    >>> program = apply(FusePooledHeads(), capture(model, (torch.zeros(2, 3, 8, 8),))).program
    >>> [str(node.target) for node in program.calls()]
    ['pruna.pooled_linear.default']
    """

    name: ClassVar[str] = "fuse-pooled-heads"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Look at every linear layer as the one behind a pool."""
        for node in rw.calls(aten.linear.default, aten.addmm.default):
            found = _match(node)
            if isinstance(found, _Head):
                _fuse(rw, found)
            elif found:
                rw.skip(node, found)


@dataclass(frozen=True)
class _Head:
    """A linear layer behind a pool of ``source``; ``inner`` are the nodes in between."""

    source: fx.Node
    layer: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    inner: tuple[fx.Node, ...]
    activation: Applied | None = None
    transposed: bool = field(default=False)


def _match(node: fx.Node) -> _Head | str:
    """The head that ends in a linear layer; a reason; or "" where nothing resembles one."""
    bound = bind_arguments(node)
    transposed = node.target is aten.addmm.default
    pooled = bound["mat1" if transposed else "input"]
    inner = _between(pooled)
    pool = inner[-1] if inner else None
    if pool is None:
        return ""
    if reason := _reason_against_pool(pool) or _reason_between(node, inner):
        return reason
    weight = bound["mat2" if transposed else "weight"]
    bias = bound["self" if transposed else "bias"]
    if reason := _reason_against_layer(node, bound, weight, bias):
        return reason
    source = bind_arguments(pool)["self"]
    dtypes = {dtype_of(n) for n in (source, weight, bias, node) if n is not None}
    if len(dtypes) > 1:
        return f"its operands have different dtypes: {', '.join(sorted(map(str, dtypes)))}"
    activation = activation_behind(node)
    return _Head(source, node, weight, bias, inner, activation, transposed)


def _between(node: Any) -> tuple[fx.Node, ...]:
    """The nodes from a linear layer's input up to a pool; empty where there is none.

    Some that no head may have are among them, so that they can be named.
    """
    found: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and len(found) < _FARTHEST:
        found.append(node)
        if _is_pool(node):
            return tuple(found)
        computed = [source for source in node.all_input_nodes if source.op != "get_attr"]
        sources = [source for source in computed if source.target is not aten.sym_size.int]
        if len(sources) != 1 or not (node.target in (*_FLATTENERS, *_OTHERS) or _bends(node)):
            return ()
        (node,) = sources
    return ()


def _bends(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_pool(node: fx.Node) -> bool:
    """Whether a node takes the mean or the largest of positions."""
    if node.target in (*_POOLS, *_LARGEST):
        return True
    return node.target is aten.mean.dim and _rank(bind_arguments(node)["self"]) > 2


def _reason_against_pool(pool: fx.Node) -> str:
    """Why a pool is no mean over all positions; empty where it is."""
    bound = bind_arguments(pool)
    source = bound["self"]
    if pool.target in _LARGEST:
        return f"{pool.name} takes the largest value, not the mean"
    if pool.target is aten.mean.dim:
        axes = sorted(axis % _rank(source) for axis in bound["dim"] or range(_rank(source)))
        if axes == list(range(2, _rank(source))) and bound["dtype"] is None:
            return ""
        where = f"over dimensions {axes}, not over all behind the channels"
        return f"{pool.name} takes the mean {where}"
    spatial = pool.meta["val"].shape[2:]
    if any(not isinstance(size, int) or size != 1 for size in spatial):
        return f"{pool.name} leaves {list(spatial)} positions, not one"
    if "output_size" in bound:
        batched = _rank(source) == len(spatial) + 2
        return "" if batched else "it is called without a batch dimension"
    kernel, sizes = bound["kernel_size"], source.meta["val"].shape[2:]
    whole = [size == k for size, k in zip(sizes, list(kernel) * len(sizes), strict=False)]
    if all(whole) and not any(bound["padding"]) and bound.get("divisor_override") is None:
        return ""
    return f"{pool.name} averages windows of {list(kernel)}, not whole images"


def _reason_between(node: fx.Node, inner: tuple[fx.Node, ...]) -> str:
    pool = inner[-1]
    rows, channels = pool.meta["val"].shape[:2]
    for step in inner:
        if step.target is aten.dropout.default:
            live = bind_arguments(step)["train"]
            return (
                f"{step.name} drops values in training mode"
                if live
                else f"{step.name} stands in between; run canonicalize first"
            )
        if step is not pool and step.target not in _FLATTENERS:
            return f"{step.name} stands between the pool {pool.name} and the layer"
    shape = list(inner[0].meta["val"].shape)
    if str(shape) != str([rows, channels]):
        return f"the layer reads {shape}, not [{rows}, {channels}]"
    chain = (node, *inner)
    for reader, step in zip(chain, inner, strict=False):
        if others := sorted(user.name for user in step.users if user is not reader):
            return f"{step.name} is also read by {', '.join(others)}"
    return ""


def _reason_against_layer(
    node: fx.Node, bound: dict[str, Any], weight: fx.Node, bias: fx.Node | None
) -> str:
    if node.target is not aten.addmm.default:
        return "" if _rank(weight) == 2 else f"{node.name} has a weight that is not a matrix"
    if bound["alpha"] != 1 or bound["beta"] != 1:
        return f"{node.name} has alpha={bound['alpha']} and beta={bound['beta']}"
    if bias is None or _rank(bias) != 1:
        return f"{node.name} adds a matrix, not a bias"
    if weight.op != "get_attr":
        return f"the weight of {node.name} is computed in the graph"
    return ""


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _fuse(rw: Rewrite, head: _Head) -> None:
    last = head.layer if head.activation is None else head.activation.node
    fused = rw.insert(
        POOLED_LINEAR, before=last, like=head.layer, x=head.source, weight=_weight(rw, head, last),
        bias=head.bias, activation="none" if head.activation is None else head.activation.name,
        activation_args=[] if head.activation is None else list(head.activation.arguments),
    )  # fmt: skip
    parts = ["mean", "linear layer", *([head.activation.name] if head.activation else [])]
    rw.applied(last, f"fused {', '.join(parts)} into {fused.name}")
    rw.replace(last, fused)
    for node in (head.layer, *head.inner):
        if node is not last:
            rw.erase(node)


def _weight(rw: Rewrite, head: _Head, before: fx.Node) -> fx.Node:
    """The layer's weight as [out, in]."""
    if not head.transposed:
        return head.weight
    turned = rw.program.tensor(str(head.weight.target)).t()
    return copied(rw, [head.weight], turned, "transposed", before)

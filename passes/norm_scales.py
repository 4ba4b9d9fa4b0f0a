"""Norm scales: the vectors that multiply normalised activations, one number a channel.

    gamma of   batch_norm, instance_norm, group_norm, layer_norm, rms_norm
    gamma in   gamma * (x * rsqrt(...))  and  x / sqrt(...) * gamma      (norms spelled out)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program

aten = torch.ops.aten

_NORMS = frozenset(
    f"aten::{name}"
    for name in (
        "batch_norm", "native_batch_norm", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "instance_norm", "group_norm",
        "native_group_norm", "layer_norm", "native_layer_norm", "rms_norm",
    )
)  # fmt: skip
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.reshape.default, aten.unsqueeze.default)


def norm_scales(program: Program) -> frozenset[str]:
    """The names of all vectors that scale normalised activations."""
    found = set()
    for node in program.calls():
        for source in _scales(node):
            if isinstance(source, fx.Node) and source.op == "get_attr":
                name = str(source.target)
                if program.tensor(name).dim() == 1:
                    found.add(name)
    return frozenset(found)


def _scales(node: fx.Node) -> list[Any]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target._schema.name in _NORMS:
        return [bind_arguments(node)["weight"]]
    if node.target is aten.mul.Tensor:
        a, b = (_uncast(bind_arguments(node)[name]) for name in ("self", "other"))
        return [scale for scale, other in ((a, b), (b, a)) if _normalised(other)]
    return []


def _uncast(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    return node


def _normalised(node: Any) -> bool:
    """Whether a node is x * rsqrt(...) or x / sqrt(...)."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.mul.Tensor:
        return any(_is(operand, aten.rsqrt.default) for operand in node.args)
    if node.target is aten.div.Tensor:
        return _is(node.args[1], aten.sqrt.default)
    return False


def _is(node: Any, target: Any) -> bool:
    node = _uncast(node)
    return isinstance(node, fx.Node) and node.target is target

"""Folding a batch norm into the linear map before it, as plain functions that passes share.

With s = gamma / sqrt(var + eps) per output channel, for every map y = W x + b that is linear in x:

    batch_norm(W x + b) = (s W) x + (b - mean) s + beta

`try_fold` computes s, s W and the new bias in float64; what is stored is rounded once, to the
dtype of the original weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from pruna_ir.call import Call
from pruna_ir.transform import Rewrite

aten = torch.ops.aten

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
TRANSPOSED = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
FOLDABLE = CONVOLUTIONS | TRANSPOSED | {aten.linear.default}


@dataclass(frozen=True)
class Folded:
    """The weight and bias of a linear map that absorbed a batch norm; both float64."""

    weight: torch.Tensor
    bias: torch.Tensor


def try_fold(norm: Call) -> Folded | str:
    """What the source of a batch norm becomes when it absorbs it, or why it cannot."""
    reason = _reason_against_norm(norm)
    if reason:
        return reason
    source = norm.producer("input")
    assert source is not None
    call = Call(norm.program, source)
    if reason := _reason_against_source(norm, call):
        return reason
    folded = _fold(call, norm)
    return _reason_against_values(call, folded) or folded


def _fold(call: Call, norm: Call) -> Folded:
    weight = _float64(call.parameter("weight"))
    assert weight is not None
    mean, var = _float64(norm.parameter("running_mean")), _float64(norm.parameter("running_var"))
    assert mean is not None
    assert var is not None
    gamma, beta = _float64(norm.parameter("weight")), _float64(norm.parameter("bias"))
    bias = _float64(call.parameter("bias"))
    scale = torch.rsqrt(var + norm.number("eps"))
    scale = scale if gamma is None else scale * gamma
    shift = (0.0 - mean if bias is None else bias - mean) * scale
    return Folded(_scaled(call, weight, scale), shift if beta is None else shift + beta)


def _float64(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().double()


def _scaled(call: Call, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight with each output channel scaled.

    Weights are [out, ...], except those of transposed convolutions: [in, out / groups, ...], where
    the outputs of group g belong to the inputs of group g.
    """
    if call.node.target not in TRANSPOSED:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = int(call.number("groups"))
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    factors = scale.reshape(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (grouped * factors).reshape(weight.shape)


def output_channels(call: Call) -> int:
    """The number of output channels of a foldable call."""
    shape = call.arg("weight").meta["val"].shape
    if call.node.target in TRANSPOSED:
        return int(shape[1]) * int(call.number("groups"))
    return int(shape[0])


def _reason_against_norm(norm: Call) -> str:
    for name in ("running_mean", "running_var"):
        if norm.producer(name) is None:
            return f"batch norm has no {name} and normalises with each batch's own statistics"
    if norm.flag("training"):
        return "batch norm is in training mode; call model.eval() before capture"
    for name in ("weight", "bias", "running_mean", "running_var"):
        if norm.producer(name) is not None and norm.parameter(name) is None:
            return f"the {name} of the batch norm is computed in the graph"
    source = norm.producer("input")
    if source is None or source.target not in FOLDABLE:
        what = "an input" if source is None or source.op == "placeholder" else str(source.target)
        return f"batch norm reads {what}, not a convolution or linear layer"
    return ""


def _reason_against_source(norm: Call, call: Call) -> str:
    source = call.node
    others = sorted(user.name for user in source.users if user is not norm.node)
    if others:
        return f"{source.name} is also read by {', '.join(others)}"
    for name in ("weight", "bias"):
        if call.producer(name) is not None and call.parameter(name) is None:
            return f"the {name} of {source.name} is computed in the graph"
    rank, wanted = len(source.meta["val"].shape), len(call.arg("weight").meta["val"].shape)
    if rank != wanted:
        return (
            f"{source.name} has {rank} dimensions, so that dimension 1, which batch norm "
            "normalises, does not hold its output channels"
        )
    return ""


def _reason_against_values(call: Call, folded: Folded) -> str:
    weight = call.parameter("weight")
    assert weight is not None
    largest = torch.finfo(weight.dtype).max
    for tensor in (folded.weight, folded.bias):
        top = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not math.isfinite(top) or top > largest:
            return f"the folded weights would not be finite in {weight.dtype}"
    return ""


def apply_fold(rw: Rewrite, norm: Call, folded: Folded) -> fx.Node:
    """Give the batch norm's source the folded weights; returns the source, which replaces it.

    The batch norm itself is left to the caller to replace.
    """
    source = norm.producer("input")
    assert source is not None
    call = Call(rw.program, source)
    weight, bias = call.producer("weight"), call.producer("bias")
    assert weight is not None
    new_weight = rw.derive(weight, folded.weight, source)
    if bias is not None:
        new_bias = rw.derive(bias, folded.bias, source)
    else:
        dtype = rw.program.tensor(str(weight.target)).dtype
        path = str(weight.target).rpartition(".")[0]
        name = f"{path}.bias" if path else f"{weight.target}_bias"
        parameter = torch.nn.Parameter(folded.bias)
        new_bias = rw.constant(parameter, name, before=source, rounded_to=dtype)
    rw.update(source, weight=new_weight, bias=new_bias)
    return source

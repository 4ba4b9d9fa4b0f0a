"""Scaling channels: the weights of a linear map seen by channel, and what a scale passes through.

A layer's weight, in whatever layout its operator wants, is viewed as

    blocks: [groups, outputs / groups, inputs / groups, taps]

so that scaling its output channels, its input channels, and the largest weight of each channel are
one line each. `homogeneous` says through which operators a positive factor per channel passes
unchanged: f(x / s) = f(x) / s, and where the channels are behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.passes.linear_layers import CONVOLUTIONS, FORMS, TRANSPOSED, Form
from pruna_ir.program import Program, shape_of

aten = torch.ops.aten

SCALABLE: dict[Any, Form] = FORMS | {CONV_ACT.op: Form("x", "weight", "bias")}
"""Operators that are linear in their input; a fused activation acts behind."""

_POOLS = {
    aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}  # fmt: skip
"""Pools, and over how many trailing dimensions each works."""
_ELEMENTWISE = frozenset({aten.relu.default, aten.leaky_relu.default, aten.prelu.default})


@dataclass(frozen=True)
class Scalable:
    """A linear map with a stored weight, whose channels can be scaled."""

    program: Program
    node: fx.Node

    @property
    def form(self) -> Form:
        """Where its operator has what."""
        return SCALABLE[self.node.target]

    @property
    def convolves(self) -> bool:
        """Whether its channels are dimension 1, not the last one."""
        return self.node.target in CONVOLUTIONS | TRANSPOSED | {CONV_ACT.op}

    @property
    def input(self) -> fx.Node:
        """What it reads."""
        return self._node(self.form.input)

    @property
    def weight(self) -> fx.Node:
        """The node of its stored weight."""
        return self._node(self.form.weight)

    @property
    def bias(self) -> fx.Node | None:
        """The node of its bias argument."""
        name = self.form.bias
        found = None if name is None else bind_arguments(self.node)[name]
        return found if isinstance(found, fx.Node) else None

    @property
    def groups(self) -> int:
        """The number of groups; 1 for what is no convolution."""
        return int(Call(self.program, self.node).number("groups")) if self.convolves else 1

    def axis(self, of: fx.Node) -> int:
        """The dimension of the channels of its input or output."""
        return 1 if self.convolves else len(shape_of(of) or ()) - 1

    def tensor(self) -> Tensor:
        """The weight, float64."""
        return self.program.tensor(str(self.weight.target)).detach().double()

    def blocks(self, weight: Tensor) -> Tensor:
        """A weight as [groups, outputs / groups, inputs / groups, taps]."""
        if self.node.target in TRANSPOSED:
            inputs = weight.shape[0] // self.groups
            return weight.reshape(self.groups, inputs, weight.shape[1], -1).transpose(1, 2)
        if self.form.reads == 0:
            return weight.mT[None, :, :, None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)

    def unblocked(self, blocks: Tensor, weight: Tensor) -> Tensor:
        """The inverse of `blocks`, in the layout of a weight."""
        if self.node.target in TRANSPOSED:
            blocks = blocks.transpose(1, 2)
        elif self.form.reads == 0:
            blocks = blocks[0, :, :, 0].mT
        return blocks.reshape(weight.shape).contiguous()

    def _node(self, name: str) -> fx.Node:
        node = bind_arguments(self.node)[name]
        assert isinstance(node, fx.Node)
        return node


def of_outputs(blocks: Tensor) -> Tensor:
    """The largest |weight| of each output channel.

    >>> of_outputs(torch.tensor([[[[1.0], [-3.0]], [[2.0], [0.0]]]])).tolist()
    [3.0, 2.0]
    """
    return blocks.abs().amax((2, 3)).flatten()


def of_inputs(blocks: Tensor) -> Tensor:
    """The largest |weight| of each input channel.

    >>> of_inputs(torch.tensor([[[[1.0], [-3.0]], [[2.0], [0.0]]]])).tolist()
    [2.0, 3.0]
    """
    return blocks.abs().amax((1, 3)).flatten()


def scale_outputs(blocks: Tensor, factor: Tensor) -> Tensor:
    """The weights with each output channel times its factor, [outputs]."""
    return blocks * factor.reshape(blocks.shape[0], -1, 1, 1)


def scale_inputs(blocks: Tensor, factor: Tensor) -> Tensor:
    """The weights with each input channel times its factor, [inputs]."""
    return blocks * factor.reshape(blocks.shape[0], 1, -1, 1)


def why_not_scalable(layer: Scalable) -> str:
    """Why a layer's channels cannot be scaled; empty where they can."""
    program, node = layer.program, layer.node
    source = layer.weight
    if source.op != "get_attr":
        return "its weight is computed in the graph"
    if node.target is aten.addmm.default:
        bound = bind_arguments(node)
        if not (bound["alpha"] == bound["beta"] == 1):
            return "it scales its operands"
    expected = len(shape_of(layer.input) or ()) if layer.convolves else 2
    if len(shape_of(source) or ()) != expected:
        return f"its weight has {len(shape_of(source) or ())} dimensions, not {expected}"
    if others := readers_of(program, source) - {node.name}:
        return f"its weight is also read by {', '.join(sorted(others))}"
    return ""


def readers_of(program: Program, source: fx.Node) -> set[str]:
    """The names of all nodes that read a stored tensor, through any of its get_attr nodes."""
    found = program.graph.find_nodes(op="get_attr", target=source.target)
    return {user.name for get in found for user in get.users}


@dataclass(frozen=True)
class Place:
    """Where channels are in a node's value: ``repeat`` neighbours of dimension ``axis`` each."""

    node: fx.Node
    axis: int
    repeat: int = 1


def homogeneous(reader: fx.Node, place: Place) -> Place | None:
    """Where the channels are behind an operator that a positive factor per channel passes.

    None where it does not pass.
    """
    target = reader.target
    if target in _ELEMENTWISE:
        first = bind_arguments(reader)
        data = first.get("self", first.get("input"))
        return Place(reader, place.axis, place.repeat) if data is place.node else None
    rank = len(shape_of(place.node) or ())
    if target in _POOLS:
        return Place(reader, place.axis) if rank - _POOLS[target] > place.axis else None
    if target is aten.mean.dim:
        return _mean(reader, place, rank)
    if target in (aten.flatten.using_ints, aten.reshape.default):
        return _flattened(reader, place)
    return None


def _mean(reader: fx.Node, place: Place, rank: int) -> Place | None:
    bound = bind_arguments(reader)
    if not bound["dim"] or place.repeat != 1:
        return None
    dims = {dim % rank for dim in bound["dim"]}
    if place.axis in dims:
        return None
    before = 0 if bound["keepdim"] else sum(dim < place.axis for dim in dims)
    return Place(reader, place.axis - before)


def _flattened(reader: fx.Node, place: Place) -> Place | None:
    """[batch, channels, ...] as [batch, channels * ...]: each channel's values stay together."""
    old, new = shape_of(place.node) or (), shape_of(reader) or ()
    inner = old[1:]
    if place.axis != 1 or len(new) != 2 or not all(isinstance(size, int) for size in inner):
        return None
    if str(new[0]) != str(old[0]) or new[1] != math.prod(int(size) for size in inner):
        return None
    return Place(reader, 1, place.repeat * math.prod(int(size) for size in inner[1:]))

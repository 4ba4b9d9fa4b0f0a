"""Layers whose weight is fake-quantised: the weight in steps of its grid, and the counterpart.

A layer reads its weight as ``fake_quant(W, s, z, axis, qmin, qmax)``. In units of the step, the
weight is W / s, the grid the integers qmin - z to qmax - z, and what the layer computes with is an
integer there. The layer's *counterpart* is the node of the same name in the float program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.learned_rounding import Problem
from pruna_ir.passes.linear_layers import TRANSPOSED, Layer, layer_at
from pruna_ir.program import Program, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Rounded:
    """A layer with a fake-quantised stored weight.

    Attributes:
        layer: in the quantised program.
        counterpart: the layer's node in the float program.
    """

    layer: Layer
    counterpart: fx.Node

    @property
    def node(self) -> fx.Node:
        """The layer's node."""
        return self.layer.node

    @property
    def input(self) -> fx.Node:
        """What the layer reads."""
        return self.layer.input

    @property
    def fake(self) -> fx.Node:
        """The fake-quant of the weight."""
        return self.layer.weight

    @property
    def source(self) -> fx.Node:
        """The node of the stored weight."""
        source = self.layer.stored
        assert source is not None
        return source

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return int((shape_of(self.node) or ())[self.layer.channel_dim])

    def weight(self) -> Tensor:
        """The stored weight, as it is now."""
        return self.layer.program.tensor(str(self.source.target)).detach()

    def nearest(self) -> Tensor:
        """What the fake-quant makes of the stored weight."""
        return self._fake_quant(self.weight())

    def off_grid(self) -> int:
        """How many stored weights are no grid points."""
        return int((self.nearest() != self.weight()).sum())

    def on_grid(self, levels: Tensor) -> Tensor:
        """The weight that integers in the units of `weight_steps` stand for, on the grid."""
        levels = self.layer.weight_of(levels, self.weight().shape)
        return self._fake_quant((levels.double() * self._along("scale")).to(self.weight().dtype))

    def weight_steps(self) -> Tensor:
        """The stored weight in steps, [groups, outputs, inputs]; integers where on the grid."""
        weight = self.weight()
        steps = weight.double() / self._along("scale")
        settled = self.nearest() == weight
        return self.layer.matrix(torch.where(settled, steps.round(), steps).float())

    def choose(self, first: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Output channels of weight ``a`` where ``first`` [channels] says so, else of ``b``."""
        matrix = self.layer.matrix(a)
        mask = first.to(a.device).reshape(matrix.shape[0], matrix.shape[1], 1)
        return self.layer.weight_of(torch.where(mask, matrix, self.layer.matrix(b)), a.shape)

    def problem(self, x: Tensor, y: Tensor, bounds: tuple[float, float] | None) -> Problem:
        """The rounding of this layer's weights, for x and y as [groups, positions, ...]."""
        steps = self.weight_steps()
        scale, zero = (self._matrix_of(name, steps) for name in ("scale", "zero_point"))
        call = Call(self.layer.program, self.fake)
        return Problem(
            x, y, steps, scale, self._bias(steps),
            call.number("qmin") - zero, call.number("qmax") - zero, bounds,
        )  # fmt: skip

    def squared_error(
        self, made: Tensor, wanted: Tensor, bounds: tuple[float, float] | None
    ) -> Tensor:
        """The summed squared difference of each output channel, float64 on the CPU."""
        a, b = made.double(), wanted.double()
        if bounds is not None:
            a, b = a.clamp(*bounds), b.clamp(*bounds)
        return (a - b).square().movedim(self.layer.channel_dim, -1).flatten(0, -2).sum(0).cpu()

    def _bias(self, steps: Tensor) -> Tensor:
        if self.layer.bias is None:
            return torch.zeros(steps.shape[0], 1, steps.shape[1], device=steps.device)
        bias = self.layer.program.tensor(str(self.layer.bias.target)).detach().float()
        return bias.broadcast_to(self.channels).reshape(steps.shape[0], 1, steps.shape[1])

    def _matrix_of(self, name: str, steps: Tensor) -> Tensor:
        """A parameter of the grid for every weight, like `weight_steps`; columns are equal."""
        spread = self._along(name).expand(self.weight().shape)
        matrix = self.layer.matrix(spread).to(steps.dtype)
        return matrix[:, :, :1] if self._by_output() else matrix

    def _by_output(self) -> bool:
        call = Call(self.layer.program, self.fake)
        axis, rank = call.arg("axis"), self.weight().dim()
        return axis is None or axis % rank == self.layer.form.makes % rank

    def _along(self, name: str) -> Tensor:
        """A parameter of the grid, shaped to broadcast with the weight, float64."""
        call = Call(self.layer.program, self.fake)
        parameter, axis = call.parameter(name), call.arg("axis")
        assert parameter is not None
        if axis is None:
            return parameter.detach().double()
        rank = self.weight().dim()
        return parameter.detach().double().reshape([-1] + [1] * (rank - 1 - axis % rank))

    def _fake_quant(self, weight: Tensor) -> Tensor:
        call = Call(self.layer.program, self.fake)
        result: Tensor = FAKE_QUANT.op(
            weight, call.parameter("scale"), call.parameter("zero_point"), call.arg("axis"),
            int(call.number("qmin")), int(call.number("qmax")),
        )  # fmt: skip
        return result.detach()


def rounded_layers(
    program: Program, original: Program
) -> Iterator[Rounded | tuple[fx.Node, str]]:
    """The layers with a fake-quantised stored weight, and those that cannot serve, with why."""
    counterparts = {node.name: node for node in original.calls()}
    for node in program.calls():
        layer = layer_at(program, node)
        if layer is None or layer.weight.target is not FAKE_QUANT.op or layer.stored is None:
            continue
        match = counterparts.get(node.name)
        if match is None or match.target is not node.target:
            yield node, "the float program has no such layer"
        elif why := _unfit(layer):
            yield node, why
        else:
            yield Rounded(layer, match)


def _unfit(layer: Layer) -> str:
    """Why a layer's weight cannot be rounded for the layer; empty where it can."""
    program = layer.program
    call, source = Call(program, layer.weight), layer.stored
    assert source is not None
    if layer.node.target in TRANSPOSED:
        return "it is a transposed convolution"
    if layer.node.target is aten.addmm.default:
        bound = Call(program, layer.node)
        if not (bound.arg("alpha") == bound.arg("beta") == 1):
            return "it scales its operands"
    if call.parameter("scale") is None or call.parameter("zero_point") is None:
        return "the scale of its weight is computed in the graph"
    if layer.bias is not None and layer.bias.op != "get_attr":
        return "its bias is computed in the graph"
    readers = [u for u in layer.weight.users if u is not layer.node] + [
        user
        for get in program.graph.find_nodes(op="get_attr", target=source.target)
        for user in get.users
        if user is not layer.weight and user.target is FAKE_QUANT.op
    ]
    if readers:
        return f"its weight is also read by {', '.join(sorted(u.name for u in readers))}"
    rank = len(shape_of(layer.input) or ()) if layer.convolves else 2
    if len(shape_of(source) or ()) != rank:
        return f"its weight has {len(shape_of(source) or ())} dimensions, not {rank}"
    return ""


def activation_behind(layer: Rounded) -> tuple[float, float] | None:
    """The interval to which the only reader of a layer's output clips it, in both programs."""
    now, was = _clip(layer.node), _clip(layer.counterpart)
    return now if now == was else None


def _clip(node: fx.Node) -> tuple[float, float] | None:
    readers = list(node.users)
    if len(readers) != 1:
        return None
    (reader,) = readers
    if reader.target is aten.relu.default:
        return 0.0, torch.inf
    if reader.target is aten.hardtanh.default:
        bound = bind_arguments(reader)
        return float(bound["min_val"]), float(bound["max_val"])
    return None

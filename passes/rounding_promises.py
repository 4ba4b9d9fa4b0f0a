"""What round-weights promises, as tests on the programs before and after and on the data.

Each test works on whole programs and stored tensors: it reads nothing that the pass computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.errors import VerificationError
from pruna_ir.passes.layer_inputs import batches_of, observed
from pruna_ir.passes.linear_layers import Layer
from pruna_ir.passes.promises import rounding_limit
from pruna_ir.passes.weight_grids import Rounded, activation_behind, rounded_layers
from pruna_ir.program import Origin, Program
from pruna_ir.transform import Context, Finding


@dataclass(frozen=True)
class OnGrid:
    """The weights of some layers are grid points, each next to where its weight was.

    Attributes:
        layers: node names.
    """

    layers: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """Two counts a layer, both to be 0: weights off the grid, and weights moved too far."""
        old = {node.name: node for node in before.calls()}
        found = []
        for layer in _chosen(self.layers, after):
            name = layer.node.name
            # A fake-quant's own name is free to change: it is found through its layer.
            was = Rounded(Layer(before, old[name]), layer.counterpart)
            found.append(Finding(f"weights of {name} off the grid", float(layer.off_grid()), 0.0))
            far = _far(was, was.weight(), layer.weight())
            found.append(Finding(f"weights of {name} moved a step or more", float(far), 0.0))
        return found


def _far(layer: Rounded, old: Tensor, new: Tensor) -> int:
    """How many weights moved by a step or more, from where the grid clips them."""
    call = Call(layer.layer.program, layer.fake)
    scale, zero = call.parameter("scale"), call.parameter("zero_point")
    assert scale is not None
    assert zero is not None
    axis = call.arg("axis")
    rank = old.dim()
    shape = [] if axis is None else [-1] + [1] * (rank - 1 - axis % rank)
    step, offset = scale.detach().double().reshape(shape), zero.double().reshape(shape)
    low, high = call.number("qmin") - offset, call.number("qmax") - offset
    start = torch.minimum(torch.maximum(old.double() / step, low), high)
    end = (new.double() / step).round()
    # A weight on the grid may stand an ulp away from its integer.
    settled = layer.nearest() == old
    start = torch.where(settled, start.round(), start)
    return int((~((end - start).abs() < 1.0)).sum())


@dataclass(frozen=True)
class NoWorse:
    """No layer's output is further from the float program's than with rounding to nearest.

    Both are computed on the inputs that the layer has in the program after the pass.

    Attributes:
        layers: node names.
        activations: compare behind a ReLU that alone reads the output.
    """

    layers: tuple[str, ...]
    activations: bool

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """One figure a layer: the squared error over that of rounding to nearest."""
        if context.data is None:
            raise VerificationError("the calibration data that the pass was fitted to is gone")
        chosen = _chosen(self.layers, after)
        old = {node.name: node for node in before.calls()}
        nearest = {
            layer.node: Rounded(Layer(before, old[layer.node.name]), layer.counterpart).nearest()
            for layer in chosen
        }
        errors = {layer.node: [0.0, 0.0] for layer in chosen}
        for inputs in batches_of(after, context.data):
            now = observed(after, inputs, [n for c in chosen for n in (c.node, c.input)])
            was = observed(_origin(after).program, inputs, [c.counterpart for c in chosen])
            for layer in chosen:
                bounds = activation_behind(layer) if self.activations else None
                plain = _run(layer, now[layer.input], nearest[layer.node])
                for place, made in enumerate((now[layer.node], plain)):
                    lost = layer.squared_error(made, was[layer.counterpart], bounds)
                    errors[layer.node][place] += float(lost.sum())
        return [
            Finding(
                f"error of {layer.node.name} over that of rounding to nearest",
                _ratio(*errors[layer.node]),
                1.0 + rounding_limit(layer.weight().dtype),
            )
            for layer in chosen
        ]


def _ratio(new: float, old: float) -> float:
    return new / old if old else (1.0 if new == 0.0 else float("inf"))


def _run(layer: Rounded, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's output for an input and a weight."""
    given = {layer.input: x, layer.fake: weight}

    def read(node: fx.Node) -> Tensor:
        return given[node] if node in given else layer.layer.program.tensor(str(node.target))

    args, kwargs = fx.map_arg((layer.node.args, layer.node.kwargs), read)
    with torch.no_grad():
        result: Tensor = layer.node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _chosen(names: tuple[str, ...], after: Program) -> list[Rounded]:
    found = rounded_layers(after, _origin(after).program)
    return [layer for layer in found if isinstance(layer, Rounded) and layer.node.name in names]


def _origin(program: Program) -> Origin:
    if program.origin is None:
        raise VerificationError("the program lost its origin, with which it must be compared")
    return program.origin

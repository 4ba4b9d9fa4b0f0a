"""Fake-quant nodes in a graph: found, read and inserted, with their constants.

Scales and zero points are buffers next to the layer's parameters (``conv1.weight_scale``,
``conv1.output_zero_point``); tensors that share their range share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.quant_placement import KINDS, Placement, is_quantised, wanted_bits
from pruna_ir.program import module_path
from pruna_ir.quantization import Grid, QuantParameters
from pruna_ir.transform import Rewrite

Shared = tuple[fx.Node, int]
"""The root of a group of tensors that share their range, and the bits that they are read with."""


def existing(value: fx.Node, grid: Grid) -> fx.Node | None:
    """The fake-quant on this grid that already reads a value, from a run on another scope."""
    bounds = (grid.qmin, grid.qmax)
    for user in value.users:
        if is_quantised(user):
            bound = bind_arguments(user)
            if (bound["qmin"], bound["qmax"]) == bounds:
                return user
    return None


def parameters_of(rw: Rewrite, fake: fx.Node) -> QuantParameters:
    """The parameters of a fake-quant of an activation."""
    call = rw.call(fake)
    scale, zero = call.parameter("scale"), call.parameter("zero_point")
    if scale is None or zero is None:
        raise rw.error(fake, "its scale or zero point is no constant of the program")
    grid = Grid(int(call.number("qmin")), int(call.number("qmax")), symmetric=False)
    return QuantParameters(scale, zero, grid)


def quantise_activations(
    rw: Rewrite, plan: Placement, parameters: Mapping[Shared, QuantParameters]
) -> None:
    """Put a fake-quant behind every tensor that the plan wants, for each width that is read."""
    constants: dict[Shared, tuple[fx.Node, fx.Node]] = {}
    order = {node: position for position, node in enumerate(rw.graph.nodes)}
    for value, bits in sorted(wanted_bits(plan), key=lambda pair: (order[pair[0]], -pair[1])):
        readers = [reader for reader, wanted in plan.readers[value].items() if wanted == bits]
        fake = existing(value, plan.grid(value, bits))
        if fake is None:
            key = (plan.root(value), bits)
            found, before = parameters[key], _after(value)
            if key not in constants:
                constants[key] = _constants(rw, found, _output_name(value), before)
            like = value if value.meta.get("nn_module_stack") else readers[0]
            fake = _insert(rw, value, *constants[key], found, before=before, like=like)
        for reader in readers:
            rw.redirect(reader, {value: fake})


def quantise_weight(rw: Rewrite, node: fx.Node, parameters: QuantParameters) -> None:
    """Put a fake-quant between a layer and its weight."""
    kind = KINDS[node.target]
    source = rw.call(node).producer(kind.weight)
    if source is None:
        raise rw.error(node, "its weight is no constant")
    scale, zero = _constants(rw, parameters, str(source.target), node)
    fake = _insert(rw, source, scale, zero, parameters, before=node, like=node)
    rw.update(node, **{kind.weight: fake})


def _after(value: fx.Node) -> fx.Node:
    """The first node behind a value that is no placeholder."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def _output_name(value: fx.Node) -> str:
    path = module_path(value).split("@")[0]
    return f"{path}.output" if path else value.name


def _constants(
    rw: Rewrite, parameters: QuantParameters, name: str, before: fx.Node
) -> tuple[fx.Node, fx.Node]:
    scale = rw.constant(parameters.scale, f"{name}_scale", before=before)
    return scale, rw.constant(parameters.zero_point, f"{name}_zero_point", before=before)


def _insert(
    rw: Rewrite,
    value: fx.Node,
    scale: fx.Node,
    zero_point: fx.Node,
    parameters: QuantParameters,
    *,
    before: fx.Node,
    like: fx.Node,
) -> fx.Node:
    arguments: dict[str, Any] = {
        "x": value, "scale": scale, "zero_point": zero_point, "axis": parameters.axis,
        "qmin": parameters.grid.qmin, "qmax": parameters.grid.qmax,
    }  # fmt: skip
    return rw.insert(FAKE_QUANT.op, before=before, like=like, **arguments)

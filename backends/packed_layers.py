"""The layers of a program that oneDNN runs on packed weights, and what is fused into each.

    conv2d(x, W, b)                      -> packed(x, W', b)
    linear(x, W, b), addmm(b, x, W^T)    -> packed(x, W', b)
    add(layer, r)                        -> the same with r added in the layer's own loop
    relu, relu6, hardtanh, hardswish, silu, sigmoid, tanh, leaky_relu, gelu (layer)
                                         -> the same, activated in place or in the loop

What stands in the middle of such a chain has no other reader. Layers of fake-quantised operands
run on integers (see `packed_integers`). A layer that stays plain is listed with the reason
(`Layers.plain`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from pruna_ir.backends.packed_integers import (
    Constants,
    Integers,
    grid_of,
    integer_weight,
    post_op,
    usable,
)
from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.onednn import Geometry, lacking
from pruna_ir.packed_convolutions import is_contiguous
from pruna_ir.program import Program, dtype_of, shape_of

aten = torch.ops.aten

_LINEAR = (aten.linear.default, aten.addmm.default, aten.mm.default)
_NO_FORM = {
    aten.conv1d.default: "one-dimensional convolutions have no packed form",
    aten.conv3d.default: "three-dimensional convolutions have no packed form",
    aten.conv1d.padding: "one-dimensional convolutions have no packed form",
    aten.conv3d.padding: "three-dimensional convolutions have no packed form",
    aten.conv2d.padding: "its padding is named; run canonicalize",
    aten.conv_transpose1d.default: "transposed convolutions have no packed form",
    aten.conv_transpose2d.input: "transposed convolutions have no packed form",
    aten.conv_transpose3d.input: "transposed convolutions have no packed form",
    aten.convolution.default: "it is spelt as aten.convolution; capture the model again",
}
ACTIVATIONS: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    aten.relu.default: (aten.relu_.default, ()),
    aten.relu6.default: (aten.relu6_.default, ()),
    aten.hardtanh.default: (aten.hardtanh_.default, ("min_val", "max_val")),
    aten.hardswish.default: (aten.hardswish_.default, ()),
    aten.silu.default: (aten.silu_.default, ()),
    aten.sigmoid.default: (aten.sigmoid_.default, ()),
    aten.tanh.default: (aten.tanh_.default, ()),
    aten.leaky_relu.default: (aten.leaky_relu_.default, ("negative_slope",)),
    aten.gelu.default: (aten.gelu_.default, ("approximate",)),
}
"""What runs in place of each activation, and its further arguments by schema name."""


@dataclass(eq=False)
class Layer:
    """One packed layer.

    Attributes:
        node: the convolution or product.
        last: the node whose value the layer computes.
        source: what it reads.
        weight: the node of the constant [out, in / groups, height, width], or [out, in].
        bias: the node of the constant [out], if any.
        geometry: of a convolution; None for a product.
        transposed: the weight is stored as [in, out].
        residual: what is added, if anything.
        activation: the node of the activation that ends it, if any.
        integers: how it runs on integers; None where it does not.
        parts: every node that it computes, in order.
    """

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    geometry: Geometry | None = None
    transposed: bool = False
    residual: fx.Node | None = None
    activation: fx.Node | None = None
    integers: Integers | None = None
    parts: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        """The node whose value the layer computes."""
        return self.parts[-1]


@dataclass(frozen=True)
class Layers:
    """The packed layers by their last nodes, and why others stay plain, by node."""

    packed: dict[fx.Node, Layer]
    plain: dict[fx.Node, str]

    def inner(self) -> set[fx.Node]:
        """The nodes that are not computed by themselves."""
        return {node for layer in self.packed.values() for node in layer.parts[:-1]}

    def read_as_integers(self) -> set[fx.Node]:
        """The fake-quants whose values nobody wants in float32."""
        inner = self.inner()
        uses: dict[fx.Node, set[fx.Node]] = {}
        for layer in self.packed.values():
            if layer.integers is not None:
                uses.setdefault(layer.source, set()).add(layer.node)
                if layer.integers.residual is not None:
                    sums = [part for part in layer.parts if part.target is aten.add.Tensor]
                    uses.setdefault(layer.integers.residual.node, set()).update(sums)
        return {node for node, readers in uses.items() if readers >= set(node.users)} - inner


def find_layers(program: Program, constants: Constants) -> Layers:
    """The layers of a program that can run packed.

    Args:
        program: with fused operators spelt out.
        constants: the values of the nodes that depend on no input.
    """
    packed: dict[fx.Node, Layer] = {}
    plain: dict[fx.Node, str] = {}
    claimed: set[fx.Node] = set()
    written = _writer(program)
    for node in program.calls():
        if node in constants or not is_layer(node):
            continue
        found = (
            f"{written} writes into a value" if written else _layer(program, node, constants)
        )
        if isinstance(found, str):
            plain[node] = found
            continue
        _extend(found, claimed, constants)
        if usable():
            _to_integers(found, claimed, constants)
        packed[found.last] = found
    return Layers(packed, plain)


def is_layer(node: fx.Node) -> bool:
    """Whether a node is a convolution or a product that could have a constant weight."""
    return node.target is aten.conv2d.default or node.target in (*_LINEAR, *_NO_FORM)


def _writer(program: Program) -> str:
    """An operator of the graph that writes into its operands; empty where none does."""
    for node in program.calls():
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return node.name
    return ""


def _layer(program: Program, node: fx.Node, constants: Collection[fx.Node]) -> Layer | str:
    """A layer by itself, or why it cannot be packed."""
    if node.target in _NO_FORM:
        return _NO_FORM[node.target]
    call = Call(program, node)
    found = _convolution(call) if node.target is aten.conv2d.default else _product(call)
    if isinstance(found, str):
        return found
    operands = [part for part in (found.weight, found.bias) if part is not None]
    if any(part not in constants for part in operands):
        return "its weight or bias is computed"
    if reason := _unfit(node, [found.source, *operands]):
        return reason
    found.parts.append(node)
    return found


def _unfit(node: fx.Node, operands: list[fx.Node]) -> str:
    """What about values, devices and dtypes keeps a layer plain; empty where nothing does."""
    values = [operand.meta["val"] for operand in (node, *operands)]
    if any(value.device.type != "cpu" for value in values):
        return "it is not on the CPU"
    dtypes = {value.dtype for value in values}
    if len(dtypes) > 1:
        return f"its operands are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if any(free_unbacked_symbols(value) for value in values):
        return "a size depends on the values of the inputs"
    if values[2].numel() == 0:
        return "its weight is empty"
    if not is_contiguous(values[0]):
        return "the program wants its result in another layout"
    return lacking(dtypes.pop())


def _convolution(call: Call) -> Layer | str:
    source, weight = call.producer("input"), call.producer("weight")
    if source is None or weight is None:
        return "it has no input or weight"
    if len(shape_of(source) or ()) != 4:
        return "its input has no batch dimension"
    stride, padding, dilation = (
        call.ints(name, 2) for name in ("stride", "padding", "dilation")
    )
    geometry = Geometry(
        (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]),
        int(call.arg("groups")),
    )  # fmt: skip
    return Layer(call.node, source, weight, call.producer("bias"), geometry)


def _product(call: Call) -> Layer | str:
    if call.node.target is aten.linear.default:
        names, bias = ("input", "weight"), call.producer("bias")
    elif call.node.target is aten.mm.default:
        names, bias = ("self", "mat2"), None
    elif call.number("beta") != 1 or call.number("alpha") != 1:
        return "it scales its operands"
    else:
        names, bias = ("mat1", "mat2"), call.producer("self")
    source, weight = (call.producer(name) for name in names)
    if source is None or weight is None or len(shape_of(weight) or ()) != 2:
        return "its weight is no matrix"
    if bias is not None and len(shape_of(bias) or ()) != 1:
        return "its bias is no vector"
    transposed = call.node.target is not aten.linear.default
    outputs = (shape_of(weight) or ())[1 if transposed else 0]
    if bias is not None and (shape_of(bias) or ())[0] != outputs:
        return "its bias is broadcast"
    return Layer(call.node, source, weight, bias, transposed=transposed)


def _extend(layer: Layer, claimed: set[fx.Node], constants: Collection[fx.Node]) -> None:
    """Take in the sum and the activation that follow, as far as nobody else reads between."""
    follower = _only_reader(layer.last, claimed)
    if follower is not None and follower.target is aten.add.Tensor:
        other = _addend(follower, layer.last)
        if other is not None and other not in constants:
            layer.residual = other
            _take(layer, follower, claimed)
            follower = _only_reader(layer.last, claimed)
    if follower is not None and follower.target in ACTIVATIONS:
        layer.activation = follower
        _take(layer, follower, claimed)


def _to_integers(layer: Layer, claimed: set[fx.Node], constants: Constants) -> None:
    """Let a layer of fake-quantised operands run on integers, and take in the rounding behind."""
    source = grid_of(layer.source, constants)
    weight = integer_weight(layer.weight, constants, transposed=layer.transposed)
    if source is None or weight is None:
        return
    layer.integers = Integers(source, *weight)
    follower = _only_reader(layer.last, claimed)
    out = None if follower is None else grid_of(follower, constants)
    ends = post_op(layer.activation, linear=layer.geometry is None)
    residual = None if layer.residual is None else grid_of(layer.residual, constants)
    added = layer.residual is None or (residual is not None and layer.geometry is not None)
    if out is not None and out.whole and ends is not None and added:
        layer.integers = Integers(source, *weight, residual, out, ends)
        _take(layer, out.node, claimed)


def _take(layer: Layer, node: fx.Node, claimed: set[fx.Node]) -> None:
    layer.parts.append(node)
    claimed.add(node)


def _only_reader(node: fx.Node, claimed: set[fx.Node]) -> fx.Node | None:
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return None if reader in claimed else reader


def _addend(add: fx.Node, own: fx.Node) -> fx.Node | None:
    """What is added to a layer's result; None where it is not a tensor of its shape and dtype."""
    bound = bind_arguments(add)
    other = next((bound[name] for name in ("self", "other") if bound[name] is not own), None)
    if not isinstance(other, fx.Node) or bound["alpha"] != 1:
        return None
    ours, theirs = shape_of(own) or (), shape_of(other) or ()
    if dtype_of(other) != dtype_of(own) or len(ours) != len(theirs):
        return None
    same = all(statically_known_true(a == b) for a, b in zip(ours, theirs, strict=True))
    return other if same and is_contiguous(other.meta["val"]) else None



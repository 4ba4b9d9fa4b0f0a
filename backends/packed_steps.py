"""The graph that runs in place of a program: oneDNN calls on packed weights, ATen for the rest.

    constants are computed once            layers run packed (see `packed_layers`)
    images stay channels-last between the operators that take them so, and are made contiguous
    for all others                         fake-quantised values stay uint8 between integer layers

Fused operators of ours are spelt out first: their layers run faster packed one by one, products of
one value as one (see `packed_groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import pruna_ir.kernels.attention_block
import pruna_ir.kernels.conv_act
import pruna_ir.kernels.ffn
import pruna_ir.kernels.pooled_linear
from pruna_ir.backends.packed_groups import group_products
from pruna_ir.backends.packed_integers import FAKE_QUANT, Grid8, Integers
from pruna_ir.backends.packed_layers import ACTIVATIONS, Layer, find_layers
from pruna_ir.call import bind_arguments
from pruna_ir.decompose import decompose
from pruna_ir.kernels.onednn import convolution_call, linear_call, pack_convolution, pack_linear
from pruna_ir.kernels.onednn_integers import (
    Levels,
    integer_convolution_call,
    integer_linear_call,
    pack_integer_convolution,
    pack_integer_linear,
)
from pruna_ir.lowering import KernelRow
from pruna_ir.packed_convolutions import Layouts
from pruna_ir.program import Program, computed_nodes, dtype_of, module_path
from pruna_ir.registry import kernels
from pruna_ir.transform import COMPUTES, is_pure

aten = torch.ops.aten

_SPELT_OUT = (
    pruna_ir.kernels.attention_block.KERNEL.op, pruna_ir.kernels.conv_act.KERNEL.op,
    pruna_ir.kernels.ffn.KERNEL.op, pruna_ir.kernels.pooled_linear.KERNEL.op,
)  # fmt: skip
"""The fused operators whose layers run faster packed one by one."""


@dataclass(frozen=True)
class Packer:
    """How a convolution's weight is packed: for the shape of its source."""

    source: fx.Node
    weight: fx.Node
    pack: Callable[[torch.Tensor, list[int]], torch.Tensor]


class Steps:
    """The graph of what runs, with the tensors that it reads.

    Attributes:
        graph: calls of ATen and oneDNN operators; ``get_attr`` nodes name ``tensors``.
        tensors: constants, packed weights of products, plain weights of convolutions.
        convolutions: the packed convolutions of the graph.
        rows: the audit.
        names: ``module path/node`` of every call of the graph.
    """

    def __init__(self, program: Program) -> None:
        whole = set(kernels()) - set(_SPELT_OUT)
        self._program = decompose(program, keep=whole)
        self._constants = _constants(self._program)
        self._layers = find_layers(self._program, self._constants)
        self._groups = group_products(self._layers.packed.values())
        self._env: dict[fx.Node, fx.Node] = {}
        self._levels: dict[fx.Node, fx.Node] = {}
        self._products: dict[tuple[Layer, ...], fx.Node] = {}
        self._names_of: dict[Any, str] = {}
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self.convolutions: dict[fx.Node, Packer] = {}
        self.rows: list[KernelRow] = []
        self.names: dict[fx.Node, str] = {}
        self._build()

    def _build(self) -> None:
        images = {last for last, layer in self._layers.packed.items() if layer.geometry}
        layouts = Layouts(images, (FAKE_QUANT,))
        inner = self._layers.inner()
        on_integers = self._layers.read_as_integers()
        for node in self._program.graph.nodes:
            if node in self._constants or node in inner:
                continue
            restored = layouts.restores(node)
            layer = self._layers.packed.get(node)
            if layer in self._groups:
                self._run_grouped(layer, restored)
            elif layer is not None:
                self._run_packed(layer, restored)
            elif node not in on_integers:
                self._env[node] = self._plain(node, restored)
        self.graph.lint()

    def _plain(self, node: fx.Node, restored: Collection[fx.Node]) -> fx.Node:
        """A node as it is, on operands of which some must be made contiguous."""
        operands = {source: self._read(source) for source in node.all_input_nodes}
        for source in restored:
            operands[source] = self._contiguous(source)
        copied = self.graph.node_copy(node, operands.__getitem__)
        if node.op == "call_function":
            self.names[copied] = _name(node)
            reason = self._layers.plain.get(node)
            self._row(node, f"{node.target}{f', plain: {reason}' if reason else ''}")
        return copied

    def _call(self, target: Any, arguments: tuple[Any, ...], origin: fx.Node) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        self.names[node] = _name(origin)
        return node

    def _read(self, node: fx.Node) -> fx.Node:
        """The node of the new graph that has this one's value."""
        if node in self._constants:
            return self._attribute(node, lambda: self._constants[node])
        return self._env[node]

    def _attribute(self, key: Any, make: Callable[[], torch.Tensor]) -> fx.Node:
        """Reads a tensor, which is made when it is first asked for."""
        if key not in self._names_of:
            self._names_of[key] = f"tensor_{len(self._names_of)}"
            self.tensors[self._names_of[key]] = make()
        return self.graph.get_attr(self._names_of[key])

    def _run_packed(self, layer: Layer, restored: Collection[fx.Node]) -> None:
        """Emit a layer, and what its readers want of it."""
        words = "packed by oneDNN: " + ", ".join(short_name(part.target) for part in layer.parts)
        out = None if layer.integers is None else layer.integers.out
        if out is None:
            self._env[layer.last] = self._packed(layer, restored)
        else:
            self._levels[layer.last] = self._packed(layer, restored)
            if layer.last not in self._layers.read_as_integers():
                self._env[layer.last] = self._dequantised(out)
        self._row(layer.node, words, "" if layer.integers is None else "int8")

    def _run_grouped(self, layer: Layer, restored: Collection[fx.Node]) -> None:
        """Emit the product of a layer's group where that is not there yet, and its slice."""
        group = self._groups[layer]
        sizes = [_outputs(one) for one in group]
        if group not in self._products:
            self._products[group] = self._joined(group, sizes, restored)
        start = sum(sizes[: group.index(layer)])
        part = self._call(
            aten.slice.Tensor, (self._products[group], -1, start, start + _outputs(layer)),
            layer.node,
        )  # fmt: skip
        self._env[layer.last] = self._activated(part, layer.activation)
        words = ", ".join(short_name(one.target) for one in layer.parts)
        others = ", ".join(_layer_name(one.node) for one in group if one is not layer)
        self._row(layer.node, f"packed by oneDNN: {words}, in one product with {others}")

    def _joined(
        self, group: tuple[Layer, ...], sizes: list[int], restored: Collection[fx.Node]
    ) -> fx.Node:
        """The product of a group's weights, one below the other."""
        first = group[0]
        weight = self._attribute(
            group, lambda: pack_linear(torch.cat([self._rows(layer) for layer in group]))
        )
        bias = None
        if any(layer.bias is not None for layer in group):
            dtype = self._constants[first.weight].dtype
            bias = self._attribute((group, "bias"), lambda: torch.cat([
                torch.zeros(size, dtype=dtype) if layer.bias is None
                else self._constants[layer.bias]
                for layer, size in zip(group, sizes, strict=True)
            ]))  # fmt: skip
        source = first.source
        x = self._contiguous(source) if source in restored else self._read(source)
        return self._call(*linear_call(x, weight, bias), first.node)

    def _rows(self, layer: Layer) -> torch.Tensor:
        """The weight of a product, [out, in]."""
        plain = self._constants[layer.weight]
        return plain.t() if layer.transposed else plain

    def _packed(self, layer: Layer, restored: Collection[fx.Node]) -> fx.Node:
        """The calls that compute a layer."""
        if layer.integers is not None:
            return self._on_integers(layer, layer.integers)
        if layer.geometry is not None:
            return self._activated(self._convolution(layer), layer.activation)
        return self._product(layer, restored)

    def _convolution(self, layer: Layer) -> fx.Node:
        """A convolution and what is added to it."""
        geometry, plain = layer.geometry, self._constants[layer.weight]
        assert geometry is not None
        source = self._read(layer.source)
        # Two convolutions that share a weight may need it in two layouts.
        weight = self._attribute(layer, lambda: plain)
        arguments = convolution_call(
            source, weight, self._optional(layer.bias), geometry, self._optional(layer.residual)
        )
        result = self._call(*arguments, layer.node)
        self.convolutions[result] = Packer(
            source, weight, lambda value, shape: pack_convolution(value, geometry, shape)
        )
        return result

    def _product(self, layer: Layer, restored: Collection[fx.Node]) -> fx.Node:
        """A product, what is added to it, and its activation."""
        weight = self._attribute(
            (layer.weight, layer.transposed), lambda: pack_linear(self._rows(layer))
        )
        source, residual = (
            self._contiguous(node) if node is not None and node in restored
            else self._optional(node)
            for node in (layer.source, layer.residual)
        )
        gelu = "" if layer.residual is not None else _gelu(layer.activation)
        arguments = linear_call(source, weight, self._optional(layer.bias), residual, gelu)
        result = self._call(*arguments, layer.node)
        return result if gelu else self._activated(result, layer.activation)

    def _on_integers(self, layer: Layer, integers: Integers) -> fx.Node:
        """An integer layer: uint8 where its result is on a grid, else float32."""
        source, levels = self._as_levels(integers.source), integers.source.levels
        geometry, scale = layer.geometry, integers.scale
        scales = self._attribute((layer, "scale"), lambda: scale)
        zeros = self._attribute(
            (layer, "zero"), lambda: torch.zeros(len(scale), dtype=torch.int32)
        )
        out = None if integers.out is None else integers.out.levels
        if geometry is None:
            packed = self._attribute(layer, lambda: pack_integer_linear(integers.weight))
            arguments = integer_linear_call(
                source, levels, (packed, scales, zeros), self._optional(layer.bias), out=out,
                post_op=integers.post_op,
            )  # fmt: skip
            result = self._call(*arguments, layer.node)
        else:
            packed = self._attribute(layer, lambda: integers.weight)
            arguments = integer_convolution_call(
                source, levels, (packed, scales, zeros), self._optional(layer.bias), geometry,
                out=out, post_op=integers.post_op, accum=self._accum(integers),
            )  # fmt: skip
            result = self._call(*arguments, layer.node)
            self.convolutions[result] = Packer(
                source,
                packed,
                lambda value, shape: pack_integer_convolution(
                    value, scale, levels, geometry, shape
                ),
            )
        if out is not None:
            return result
        if layer.residual is not None:
            result = self._call(aten.add_.Tensor, (result, self._read(layer.residual)), layer.node)
        return self._activated(result, layer.activation)

    def _accum(self, integers: Integers) -> tuple[fx.Node, Levels] | None:
        """What is added on integers, copied, since it is overwritten."""
        if integers.residual is None:
            return None
        node = self.graph.call_function(
            aten.clone.default,
            (self._as_levels(integers.residual),),
            {"memory_format": torch.channels_last},
        )
        self.names[node] = _name(integers.residual.node)
        return node, integers.residual.levels

    def _as_levels(self, grid: Grid8) -> fx.Node:
        """A fake-quantised value as uint8; rounded as the operator rounds."""
        if grid.node not in self._levels:
            step = self._attribute((grid.node, "scale"), lambda: torch.tensor(grid.levels.scale))
            value = self._call(aten.div.Tensor, (self._read(grid.source), step), grid.node)
            value = self._call(aten.round_.default, (value,), grid.node)
            value = self._call(aten.add_.Scalar, (value, grid.levels.zero), grid.node)
            value = self._call(aten.clamp_.default, (value, grid.low, grid.high), grid.node)
            self._levels[grid.node] = self._call(
                aten.to.dtype, (value, torch.uint8), grid.node
            )
        return self._levels[grid.node]

    def _dequantised(self, grid: Grid8) -> fx.Node:
        """The real numbers of a value that was computed as uint8."""
        value = self._call(aten.to.dtype, (self._levels[grid.node], torch.float32), grid.node)
        value = self._call(aten.sub_.Scalar, (value, grid.levels.zero), grid.node)
        return self._call(aten.mul_.Scalar, (value, grid.levels.scale), grid.node)

    def _optional(self, node: fx.Node | None) -> fx.Node | None:
        return None if node is None else self._read(node)

    def _contiguous(self, node: fx.Node) -> fx.Node:
        return self._call(aten.contiguous.default, (self._read(node),), node)

    def _activated(self, result: fx.Node, activation: fx.Node | None) -> fx.Node:
        if activation is None:
            return result
        target, names = ACTIVATIONS[activation.target]
        bound = bind_arguments(activation)
        options = {name: bound[name] for name in names}
        node = self.graph.call_function(target, (result,), options)
        self.names[node] = _name(activation)
        return node

    def _row(self, node: fx.Node, detail: str, precision: str = "") -> None:
        dtype = dtype_of(node)
        if dtype is None:
            return
        word = short_name(node.target)
        precision = precision or str(dtype).removeprefix("torch.")
        self.rows.append(KernelRow(_layer_name(node), KINDS.get(word, word), precision, detail))


def _constants(program: Program) -> dict[fx.Node, torch.Tensor]:
    """The tensors that depend on no input, computed."""
    computed = computed_nodes(program)
    found: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                found[node] = program.tensor(str(node.target)).detach()
            elif node.op == "call_function" and node not in computed and _foldable(node, found):
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*args, **kwargs)
    return found


def _foldable(node: fx.Node, known: Mapping[fx.Node, torch.Tensor]) -> bool:
    return (
        is_pure(node)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and all(source in known for source in node.all_input_nodes)
    )


def _gelu(activation: fx.Node | None) -> str:
    """The form of a GELU; empty for other activations."""
    if activation is None or activation.target is not aten.gelu.default:
        return ""
    return str(bind_arguments(activation)["approximate"])


def _outputs(layer: Layer) -> int:
    """The outputs of a product."""
    return int(layer.node.meta["val"].shape[-1])


def _layer_name(node: fx.Node) -> str:
    return module_path(node) or str(node.meta.get(COMPUTES, node.name))


def _name(node: fx.Node) -> str:
    return f"{module_path(node)}/{node.meta.get(COMPUTES, node.name)}"


KINDS = {
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "convolution": "conv",
    "conv_act": "conv",
    "conv_transpose1d": "conv",
    "conv_transpose2d": "conv",
    "conv_transpose3d": "conv",
    "linear": "linear",
    "addmm": "linear",
    "mm": "matmul",
    "bmm": "matmul",
    "scaled_dot_product_attention": "attention",
}
"""The kind of layer that an operator is, for audits."""


def short_name(target: Any) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    parts = str(target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]

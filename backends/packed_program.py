"""A program as a graph of oneDNN calls on packed weights, compiled to one Python function.

    constants are computed once            layers run packed (see `packed_layers`)
    images stay channels-last between the operators that take them so, and are made contiguous
    for all others

Which layout of a convolution's weight is fast depends on the input's size and the number of
threads, so the first run on inputs of new shapes packs for them (a `Plan`). A result is a function
of the inputs, their shapes and the number of threads alone, never of what ran before: it is the
same to the last bit in every run and process.

Limits: a plan costs the memory of the convolutions' weights, and `PLANS` are kept; products are
packed once for all. The plain weights stay, for the next plan.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

import pruna_ir.kernels.conv_act
import pruna_ir.kernels.fake_quant
import pruna_ir.kernels.ffn
from pruna_ir.backends.packed_layers import ACTIVATIONS, Layer, find_layers
from pruna_ir.call import bind_arguments
from pruna_ir.decompose import decompose
from pruna_ir.kernels.onednn import (
    Geometry,
    convolution_call,
    linear_call,
    pack_convolution,
    pack_linear,
)
from pruna_ir.lowering import KernelRow
from pruna_ir.packed_convolutions import Layouts
from pruna_ir.program import Program, computed_nodes, dtype_of, module_path
from pruna_ir.registry import kernels
from pruna_ir.transform import COMPUTES, is_pure

aten = torch.ops.aten

PLANS = 4
"""How many input shapes are kept packed for, the latest ones."""

_SPELT_OUT = (pruna_ir.kernels.conv_act.KERNEL.op, pruna_ir.kernels.ffn.KERNEL.op)
"""The fused operators whose layers run faster packed one by one."""


class PackedProgram:
    """A program that runs on packed weights.

    Attributes:
        rows: every operator that runs, packed or plain.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    >>> packed = PackedProgram(program)
    >>> torch.allclose(packed(torch.ones(5, 3))[0], program(torch.ones(5, 3))[0])
    True
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        steps = _Steps(program)
        self.rows = steps.rows
        self._names = steps.names
        self._convolutions = steps.convolutions
        self._tensors = steps.tensors
        nothing = dict.fromkeys(steps.tensors, torch.empty(0))
        self._module = fx.GraphModule(nothing, steps.graph)
        # The generated function takes the weights from whatever it is given as self.
        self._function: Any = type(self._module).forward
        self._plans: OrderedDict[Any, SimpleNamespace] = OrderedDict()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor per output, laid out as in the program, for one tensor per input.

        Raises:
            UsageError: an input is missing, or of another dtype or shape.
        """
        values = self._program.bind(inputs, {})
        with torch.inference_mode():
            if not all(value.numel() for value in values):
                # oneDNN refuses what is empty.
                return self._program(*values)
            result: tuple[torch.Tensor, ...] = self._function(self._plan(values), *values)
            return result

    def step_times(self, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
        """The milliseconds of each step of one run, by ``module path/node``."""
        values = self._program.bind(inputs, {})
        with torch.inference_mode():
            timed = _Timed(self._module, self._plan(values), self._names)
            timed.run(*values)
        return timed.taken

    def _plan(self, inputs: Sequence[torch.Tensor]) -> SimpleNamespace:
        """The weights, packed for these shapes."""
        key = (torch.get_num_threads(), *(tuple(value.shape) for value in inputs))
        plan = self._plans.get(key)
        if plan is None:
            plan = SimpleNamespace(**self._tensors)
            _Packing(self._module, plan, self._convolutions).run(*inputs)
            while len(self._plans) >= PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = plan
        self._plans.move_to_end(key)
        return plan


class _Planned(fx.Interpreter):
    """Runs the steps one by one on the weights of a plan."""

    def __init__(self, module: fx.GraphModule, plan: SimpleNamespace) -> None:
        super().__init__(module)
        self._plan = plan

    def fetch_attr(self, target: str) -> Any:
        """A weight."""
        return getattr(self._plan, target)


class _Packing(_Planned):
    """Packs the weight of each convolution when its input, and so its size, is there."""

    def __init__(
        self,
        module: fx.GraphModule,
        plan: SimpleNamespace,
        convolutions: Mapping[fx.Node, Geometry],
    ) -> None:
        super().__init__(module, plan)
        self._convolutions = convolutions

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        geometry = self._convolutions.get(n)
        if geometry is not None:
            bound = bind_arguments(n)
            weight = bound["W"]
            packed = pack_convolution(self.env[weight], geometry, list(self.env[bound["X"]].shape))
            self.env[weight] = packed
            setattr(self._plan, str(weight.target), packed)
        return super().run_node(n)


class _Timed(_Planned):
    """Notes how many milliseconds each step took, by its name."""

    def __init__(
        self, module: fx.GraphModule, plan: SimpleNamespace, names: Mapping[fx.Node, str]
    ) -> None:
        super().__init__(module, plan)
        self._names = names
        self.taken: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        start = time.perf_counter()
        result = super().run_node(n)
        name = self._names.get(n)
        if name is not None:
            spent = (time.perf_counter() - start) * 1e3
            self.taken[name] = self.taken.get(name, 0.0) + spent
        return result


class _Steps:
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
        self._layers = find_layers(self._program, self._constants.keys())
        self._env: dict[fx.Node, fx.Node] = {}
        self._names_of: dict[Any, str] = {}
        self.graph = fx.Graph()
        self.tensors: dict[str, torch.Tensor] = {}
        self.convolutions: dict[fx.Node, Geometry] = {}
        self.rows: list[KernelRow] = []
        self.names: dict[fx.Node, str] = {}
        self._build()

    def _build(self) -> None:
        images = {last for last, layer in self._layers.packed.items() if layer.geometry}
        layouts = Layouts(images, (pruna_ir.kernels.fake_quant.KERNEL.op,))
        inner = self._layers.inner()
        for node in self._program.graph.nodes:
            if node in self._constants or node in inner:
                continue
            restored = layouts.restores(node)
            layer = self._layers.packed.get(node)
            if layer is not None:
                self._env[node] = self._packed(layer)
                self._row(layer.node, "packed by oneDNN: " + _chain(layer))
            else:
                self._env[node] = self._plain(node, restored)
        self.graph.lint()

    def _plain(self, node: fx.Node, restored: Collection[fx.Node]) -> fx.Node:
        """A node as it is, on operands of which some must be made contiguous."""
        operands = {source: self._read(source) for source in node.all_input_nodes}
        for source in restored:
            operands[source] = self._call(aten.contiguous.default, (operands[source],), source)
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

    def _packed(self, layer: Layer) -> fx.Node:
        """The calls that compute a layer."""
        source = self._read(layer.source)
        bias = None if layer.bias is None else self._read(layer.bias)
        residual = None if layer.residual is None else self._read(layer.residual)
        weight = self._constants[layer.weight]
        activation = layer.activation
        if layer.geometry is not None:
            # Two convolutions that share a weight may need it in two layouts.
            read = self._attribute(layer, lambda: weight)
            result = self._call(
                *convolution_call(source, read, bias, layer.geometry, residual), layer.node
            )
            self.convolutions[result] = layer.geometry
        else:
            key = (layer.weight, layer.transposed)
            read = self._attribute(
                key, lambda: pack_linear(weight.t() if layer.transposed else weight)
            )
            gelu = "" if residual is not None or activation is None else _gelu(activation)
            result = self._call(*linear_call(source, read, bias, residual, gelu), layer.node)
            activation = None if gelu else activation
        return result if activation is None else self._activated(result, activation)

    def _activated(self, result: fx.Node, activation: fx.Node) -> fx.Node:
        target, names = ACTIVATIONS[activation.target]
        bound = bind_arguments(activation)
        options = {name: bound[name] for name in names}
        node = self.graph.call_function(target, (result,), options)
        self.names[node] = _name(activation)
        return node

    def _row(self, node: fx.Node, detail: str) -> None:
        dtype = dtype_of(node)
        if dtype is None:
            return
        word = short_name(node.target)
        precision = str(dtype).removeprefix("torch.")
        layer = module_path(node) or str(node.meta.get(COMPUTES, node.name))
        self.rows.append(KernelRow(layer, KINDS.get(word, word), precision, detail))


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


def _gelu(activation: fx.Node) -> str:
    """The form of a GELU; empty for other activations."""
    if activation.target is not aten.gelu.default:
        return ""
    return str(bind_arguments(activation)["approximate"])


def _chain(layer: Layer) -> str:
    return ", ".join(short_name(part.target) for part in layer.parts)


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

"""Cost: FLOPs, parameters and bytes of a program, per node and in total.

FLOPs count the multiply-adds of convolutions, matrix products, attention and recurrent layers,
two for each (one multiplication, one addition). Everything else (norms, activations, softmax,
pooling) is left out, as is usual; a fused operator of ours costs what its reference does.

    convolution   2 * outputs * in_channels / groups * kernel elements
    linear        2 * outputs * in_features
    matmul        2 * outputs * inner size
    attention     2 * batch * heads * queries * keys * (head size + value head size)

Sizes: batch 1 and the example's sizes of other dynamic dimensions, unless given. Bytes are those
of the stored tensors, a tied one counted once; a weight that is read through a fake-quant counts
with the bits of its grid, since that is how backends store it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from pruna_ir.call import Call, bind_arguments
from pruna_ir.capture import BATCH
from pruna_ir.program import Program, module_path

aten = torch.ops.aten

Shape = tuple[int, ...]

Resize = Callable[[fx.Node, Any], Any]
"""The sizes of a node's value after a change yet to be made, from those that it has: a shape, or
a list of shapes where the node returns several tensors."""

_FAKE_QUANT = "pruna.fake_quant.default"


@dataclass(frozen=True)
class NodeCost:
    """What one call costs; a tensor is charged to its first reader."""

    node: str
    operator: str
    module: str
    flops: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What a program costs.

    Attributes:
        flops: two per multiply-add, at the sizes asked for.
        parameters: elements of the parameters that the graph reads, tied ones once.
        bytes: of all stored tensors; fake-quantised weights at their grid's width.
        nodes: one row per call, in graph order.
        uncounted: operators of third parties whose FLOPs are not known.
    """

    flops: int
    parameters: int
    bytes: int
    nodes: tuple[NodeCost, ...]
    uncounted: tuple[str, ...] = ()


def cost(
    program: Program, sizes: Mapping[str, int] | None = None, *, resize: Resize | None = None
) -> Cost:
    """The cost of a program.

    Args:
        program: the program.
        sizes: sizes of dynamic dimensions; batch 1 and the examples' sizes by default.
        resize: prices the program as if its values had other sizes, such as after pruning.

    >>> from pruna_ir import capture
    >>> total = cost(capture(torch.nn.Linear(3, 5), (torch.ones(2, 3),)))
    >>> total.flops, total.parameters, total.bytes
    (30, 20, 80)
    """
    count = _Counter(program, {BATCH: 1} | dict(sizes or {}), resize)
    rows = tuple(map(count.row, program.calls()))
    return Cost(
        flops=sum(row.flops for row in rows),
        parameters=sum(count.parameters.values()),
        bytes=sum(count.stored.values()),
        nodes=rows,
        uncounted=tuple(sorted(count.unknown)),
    )


class _Counter:
    """Counts node by node; remembers which tensors are already charged."""

    def __init__(
        self, program: Program, sizes: Mapping[str, int], resize: Resize | None
    ) -> None:
        self._program = program
        self._resize = resize
        self._symbols = _symbol_sizes(program, sizes)
        self._known: dict[Any, int] = {}
        self._charged: set[int] = set()
        self.unknown: set[str] = set()
        self.stored: dict[int, int] = {}
        self.parameters: dict[int, int] = {}
        self._store()

    def row(self, node: fx.Node) -> NodeCost:
        """The cost of one call."""
        parameters, size = 0, 0
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                continue
            tensor = self._program.tensor(str(source.target))
            if id(tensor) in self._charged:
                continue
            self._charged.add(id(tensor))
            size += self.stored[id(tensor)]
            parameters += self.parameters.get(id(tensor), 0)
        return NodeCost(
            node.name, str(node.target), module_path(node), self._flops(node), parameters, size
        )

    def _flops(self, node: fx.Node) -> int:
        if not isinstance(node.target, torch._ops.OpOverload):
            return 0
        known = node.target in _FLOPS
        if not known and (node.target.namespace in ("aten", "prims") or _is_primitive(node)):
            return 0
        if not known:
            return self._fused(node)
        shapes = {
            key: _mapped(value, self._sizes)
            for key, value in bind_arguments(node).items()
        }
        return _FLOPS[node.target](shapes, self._sizes(node))

    def _fused(self, node: fx.Node) -> int:
        """What the reference of a fused operator costs, run on tensors without data."""
        from pruna_ir.registry import kernels

        kernel = kernels().get(node.target)
        if kernel is None:
            self.unknown.add(str(node.target))
            return 0

        def empty(operand: fx.Node) -> torch.Tensor:
            value = operand.meta["val"]
            return torch.empty(self._sizes(operand), dtype=value.dtype, device="meta")

        arguments = {k: _mapped(v, empty) for k, v in bind_arguments(node).items()}
        with torch.no_grad(), _Watch() as watch:
            kernel.reference(**arguments)
        counted: int = watch.flops
        return counted

    def _store(self) -> None:
        """Elements and bytes of each tensor by its identity: narrowed where only fake-quants
        read it."""
        for node in self._program.graph.find_nodes(op="get_attr"):
            tensor = self._program.tensor(str(node.target))
            elements = _numel(self._sizes(node))
            if isinstance(tensor, torch.nn.Parameter):
                self.parameters[id(tensor)] = elements
            stored = tensor.element_size() * 8
            bits = max(
                (_width(self._program, node, user) or stored for user in node.users),
                default=stored,
            )
            size = math.ceil(elements * bits / 8)
            self.stored[id(tensor)] = max(size, self.stored.get(id(tensor), 0))

    def _sizes(self, node: fx.Node) -> Any:
        """The sizes at which a node's value is priced."""
        shape = self._shape(node.meta["val"])
        return shape if self._resize is None else self._resize(node, shape)

    def _shape(self, value: Any) -> Any:
        """The sizes of a value as integers; a list of shapes for a list of values."""
        if isinstance(value, torch.Tensor):
            return tuple(map(self._size, value.shape))
        if isinstance(value, (list, tuple)):
            return [self._shape(item) for item in value]
        return self._size(value)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self._known:
            value = expression.subs(self._symbols)
            # What the example alone decides (data-dependent sizes) keeps the example's value.
            number = value if value.is_number else cast("int", size.node.hint)
            self._known[expression] = int(number)
        return self._known[expression]


def _mapped(value: Any, function: Callable[[fx.Node], Any]) -> Any:
    if isinstance(value, fx.Node):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [_mapped(item, function) for item in value]
    return value


def _is_primitive(node: fx.Node) -> bool:
    return str(node.target) == _FAKE_QUANT


def _symbol_sizes(program: Program, sizes: Mapping[str, int]) -> dict[Any, Any]:
    """The integer that stands for each symbol of the program's shapes."""
    found: dict[Any, Any] = {}
    for node, spec, example in zip(
        program.placeholders(), program.inputs, program.examples, strict=True
    ):
        for size, name, actual in zip(
            node.meta["val"].shape, spec.shape, example.shape, strict=True
        ):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, sizes.get(str(name), actual))
    return found


def _width(program: Program, node: fx.Node, user: fx.Node) -> int | None:
    """The bits at which one reader takes a tensor; None for as they are."""
    if not _is_primitive(user):
        return None
    call = Call(program, user)
    if call.arg("x") is not node:
        return None
    return int(call.number("qmax") - call.number("qmin")).bit_length()


# -- formulas: from argument shapes (by schema name) and the output's shape ------------------


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _conv(a: Mapping[str, Any], out: Shape) -> int:
    weight = a["weight"]
    return 2 * _numel(out) * _numel(weight[1:])


def _conv_transpose(a: Mapping[str, Any], out: Shape) -> int:  # noqa: ARG001
    weight, x = a["weight"], a["input"]
    return 2 * _numel(x) * _numel(weight[1:])


def _convolution(a: Mapping[str, Any], out: Shape) -> int:
    return (_conv_transpose if a["transposed"] else _conv)(a, out)


def _linear(a: Mapping[str, Any], out: Shape) -> int:
    return 2 * _numel(out) * int(a["weight"][-1])


def _product(first: str) -> Callable[[Mapping[str, Any], Shape], int]:
    def flops(a: Mapping[str, Any], out: Shape) -> int:
        return 2 * _numel(out) * int(a[first][-1])

    return flops


def _attention(a: Mapping[str, Any], out: Shape) -> int:
    *batch, queries, width = a["query"]
    keys, out_width = a["key"][-2], out[-1]
    return 2 * _numel([*batch, queries, keys, int(width) + int(out_width)])


def _einsum(a: Mapping[str, Any], out: Shape) -> int:  # noqa: ARG001
    inputs = str(a["equation"]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for letters, shape in zip(inputs, a["tensors"], strict=True):
        dims = letters.replace("...", "")
        # The ellipsis stands in front; letters after it count from the end.
        sizes |= dict(zip(reversed(dims), reversed(shape), strict=False))
        sizes |= {f"...{i}": s for i, s in enumerate(shape[: len(shape) - len(dims)])}
    return 2 * _numel(tuple(sizes.values())) if len(inputs) > 1 else 0


def _recurrent(a: Mapping[str, Any], out: Any) -> int:
    weights = sum(_numel(shape) for shape in a["params"] if len(shape) == 2)
    return 2 * weights * _numel(out[0][:-1])


_FLOPS: dict[Any, Callable[[Mapping[str, Any], Any], int]] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.conv_transpose1d.default: _conv_transpose,
    aten.conv_transpose2d.input: _conv_transpose,
    aten.conv_transpose3d.input: _conv_transpose,
    aten.convolution.default: _convolution,
    aten.linear.default: _linear,
    aten.mm.default: _product("self"),
    aten.bmm.default: _product("self"),
    aten.mv.default: _product("self"),
    aten.matmul.default: _product("self"),
    aten.addmm.default: _product("mat1"),
    aten.baddbmm.default: _product("batch1"),
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: _einsum,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if func in _FLOPS:
            names = [argument.name for argument in func._schema.arguments]
            bound = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            self.flops += _FLOPS[func](_shapes(bound), _shapes(result))
        return result


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    return [_shapes(item) for item in value] if isinstance(value, (list, tuple)) else value

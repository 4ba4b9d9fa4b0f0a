"""Weights as sparse kernels see them: where outputs and inputs lie, and which 2:4 zeros they take.

A layer is a convolution or a matrix product with a constant weight. Sparse kernels skip zeros
along the *inputs* of the weight, the dimension that the product sums over:

    linear            [out, in]               inputs at 1
    addmm, mm, matmul [in, out]               inputs at 0
    convolution       [out, in / groups, ...] inputs at 1, for each kernel position
    transposed conv.  [in, out / groups, ...] inputs at 0, in `groups` equal parts

What two libraries take as 2:4 (at most 2 non-zeros in 4 consecutive inputs):

    tensorrt    weights of convolutions and of products, "for each output channel and for each
                spatial pixel in the kernel weights": the number of input channels is a multiple
                of 4 (TensorRT developer guide, section Structured Sparsity)
    cusparselt  matrices only: float16 or bfloat16 with both sizes multiples of 16, int8 and
                float8 of 32; in float32 its pattern is 1:2 (cuSPARSELt documentation,
                cusparseLtStructuredDescriptorInit and cusparseLtSparsity_t)

Limits: batched weights (three-dimensional products) and weights that the graph computes have no
layout here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.program import Program

aten = torch.ops.aten

Library = Literal["tensorrt", "cusparselt"]

GROUP, KEPT = 4, 2
"""2:4, the only N:M pattern that the hardware of 2026 has."""


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a weight are its outputs and its inputs.

    Attributes:
        kind: ``conv``, ``transposed`` or ``linear``.
        outputs: the dimension of the output channels.
        inputs: the dimension that the product sums over.
        groups: into how many parts of their own ``inputs`` falls (transposed convolutions).
    """

    kind: Literal["conv", "transposed", "linear"]
    outputs: int
    inputs: int
    groups: int = 1

    def inputs_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its inputs as last dimension, in parts: [..., groups, inputs].

        >>> Layout("conv", 0, 1).inputs_last(torch.zeros(8, 6, 3, 3)).shape
        torch.Size([8, 3, 3, 1, 6])
        """
        moved = tensor.movedim(self.inputs, -1)
        each = moved.shape[-1] // self.groups
        return moved.reshape(*moved.shape[:-1], self.groups, each)

    def restored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `inputs_last`."""
        return tensor.flatten(-2).movedim(-1, self.inputs).contiguous()


@dataclass(frozen=True)
class Operands:
    """How a layer's operator names its input and its weight, and how that lies."""

    input: str
    weight: str
    layout: Layout


_CONV = Operands("input", "weight", Layout("conv", 0, 1))
_TRANSPOSED = Operands("input", "weight", Layout("transposed", 1, 0))

LAYERS: dict[Any, Operands] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.linear.default: Operands("input", "weight", Layout("linear", 0, 1)),
    aten.addmm.default: Operands("mat1", "mat2", Layout("linear", 1, 0)),
    aten.mm.default: Operands("self", "mat2", Layout("linear", 1, 0)),
    aten.matmul.default: Operands("self", "other", Layout("linear", 1, 0)),
}
"""The operators whose weights can be sparse."""

_FUSED: dict[str, tuple[tuple[str, Layout], ...]] = {
    "pruna.attention_block.default": tuple(
        (name, Layout("linear", 0, 1)) for name in ("qkv_weight", "out_weight")
    ),
    "pruna.conv_act.default": (("weight", Layout("conv", 0, 1)),),
    "pruna.ffn.default": tuple(
        (name, Layout("linear", 0, 1)) for name in ("w1", "w2", "gate_weight")
    ),
    "pruna.pooled_linear.default": (("weight", Layout("linear", 0, 1)),),
}
_FAKE_QUANT = "pruna.fake_quant.default"


def layout_of(node: fx.Node) -> Layout:
    """The layout of a layer's weight, with the groups of a transposed convolution."""
    layout = LAYERS[node.target].layout
    if layout.kind != "transposed":
        return layout
    groups = int(bind_arguments(node)["groups"])
    return Layout("transposed", layout.outputs, layout.inputs, groups)


@dataclass(frozen=True)
class Mask:
    """A weight's mask in the graph: ``product = mul(weight, mask)``."""

    weight: fx.Node
    mask: fx.Node


def masked(program: Program, node: fx.Node) -> Mask | None:
    """The weight and mask that a node multiplies; None where it is no masked weight.

    A mask is a stored tensor of the weight's shape that holds nothing but zeros and ones and is
    no parameter.
    """
    if node.target is not aten.mul.Tensor:
        return None
    bound = bind_arguments(node)
    weight, mask = bound["self"], bound["other"]
    if not (_is_stored(weight) and _is_stored(mask)):
        return None
    values, stored = program.tensor(str(mask.target)), program.tensor(str(weight.target))
    if isinstance(values, torch.nn.Parameter) or values.shape != stored.shape:
        return None
    return Mask(weight, mask) if bool(((values == 0) | (values == 1)).all()) else None


def _is_stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


@dataclass(frozen=True)
class SparseWeight:
    """A layer's weight as it takes part in the product, masked where a mask is on it."""

    name: str
    value: torch.Tensor
    layout: Layout


def weights(program: Program) -> Iterator[SparseWeight]:
    """Every constant weight of a layer, each name once, through masks and fake-quants.

    >>> from pruna_ir import capture
    >>> [w.name for w in weights(capture(torch.nn.Linear(3, 5), (torch.ones(2, 3),)))]
    ['weight']
    """
    seen: set[str] = set()
    for node in program.calls():
        for argument, layout in _weight_arguments(node):
            found = _stored(program, bind_arguments(node)[argument])
            if found is None or found[0] in seen:
                continue
            name, value = found
            if value.dim() >= 2 and (layout.kind != "linear" or value.dim() == 2):
                seen.add(name)
                yield SparseWeight(name, value, layout)


def _weight_arguments(node: fx.Node) -> tuple[tuple[str, Layout], ...]:
    if node.target in LAYERS:
        return ((LAYERS[node.target].weight, layout_of(node)),)
    return _FUSED.get(str(node.target), ())


def _stored(program: Program, node: Any) -> tuple[str, torch.Tensor] | None:
    """The name and masked value of a stored weight behind a layer's argument."""
    if not isinstance(node, fx.Node):
        return None
    if str(node.target) == _FAKE_QUANT:
        return _stored(program, bind_arguments(node)["x"])
    if node.op == "get_attr":
        return str(node.target), program.tensor(str(node.target)).detach()
    found = masked(program, node)
    if found is None:
        return None
    name = str(found.weight.target)
    values = program.tensor(name).detach() * program.tensor(str(found.mask.target))
    return name, values


def holds(value: torch.Tensor, layout: Layout, kept: int = KEPT, group: int = GROUP) -> bool:
    """Whether every ``group`` consecutive inputs have at most ``kept`` non-zeros.

    False where the inputs are no multiple of ``group``.

    >>> holds(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), Layout("linear", 0, 1))
    True
    >>> holds(torch.tensor([[1.0, 3.0, 0.0, 2.0]]), Layout("linear", 0, 1))
    False
    """
    rows = layout.inputs_last(value)
    if not rows.numel() or rows.shape[-1] % group:
        return False
    groups = rows.reshape(*rows.shape[:-1], rows.shape[-1] // group, group)
    return int((groups != 0).sum(-1).max()) <= kept


_MULTIPLES = {
    torch.float16: 16, torch.bfloat16: 16, torch.int8: 32,
    torch.float8_e4m3fn: 32, torch.float8_e5m2: 32,
}  # fmt: skip


def refusals(
    value: torch.Tensor,
    layout: Layout,
    library: Library,
    dtype: torch.dtype = torch.float16,
) -> list[str]:
    """Why a library does not take a weight as 2:4 sparse; empty where it does.

    Args:
        value: the weight, its zeros in place.
        layout: how it lies.
        library: ``tensorrt`` or ``cusparselt``.
        dtype: the type that the weight is deployed in.

    Raises:
        UsageError: the library is not known.

    >>> refusals(torch.ones(4, 6), Layout("linear", 0, 1), "tensorrt")
    ['6 inputs are no multiple of 4']
    """
    if library not in ("tensorrt", "cusparselt"):
        raise UsageError(f"unknown library '{library}'; known: cusparselt, tensorrt")
    found = shape_refusals(tuple(value.shape), layout, library, dtype)
    if not found and not holds(value, layout):
        found.append("some 4 consecutive inputs have more than 2 non-zeros")
    return found


def shape_refusals(
    shape: tuple[int, ...],
    layout: Layout,
    library: Library,
    dtype: torch.dtype = torch.float16,
) -> list[str]:
    """Why a library takes no 2:4 weight of this shape, whatever its values."""
    inputs = shape[layout.inputs] // layout.groups
    found = [] if inputs and inputs % GROUP == 0 else [f"{inputs} inputs are no multiple of 4"]
    if library == "tensorrt":
        if layout.kind == "transposed":
            found.append("a transposed convolution")
        return found
    if layout.kind != "linear":
        return [*found, "a convolution; cuSPARSELt multiplies matrices only"]
    if dtype not in _MULTIPLES:
        name = str(dtype).removeprefix("torch.")
        return [*found, f"2:4 is not its pattern for {name}; deploy in float16 or bfloat16"]
    multiple = _MULTIPLES[dtype]
    for what, dim in (("outputs", layout.outputs), ("inputs", layout.inputs)):
        size = shape[dim]
        if size % multiple or not size:
            found.append(f"{size} {what} are no multiple of {multiple}")
    return found

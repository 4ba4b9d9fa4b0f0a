"""Layers that are linear in what they read: their rows, their weights, and what follows them.

A layer computes y = W x + b at every position: a convolution over patches x, a linear layer over
feature vectors. Here it is seen as a matrix: `patches` gives the x of chosen positions, `matrix`
the W, and `tail` the affine operators behind it (a bias added apart, a batch norm with running
statistics, a residual addition), at whose end it is to be right.

Limits: only layers whose weight is a tensor of the program, read directly, are seen as matrices,
and transposed convolutions are not. Einsum is no layer here. A quantised layer reads its weight
through a fake-quant; `Layer.stored` is the tensor behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.program import Program, Removed, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """Where an operator has its input, weight and bias, and which weight dim it contracts."""

    input: str
    weight: str
    bias: str | None
    reads: int = 1
    makes: int = 0


_CONVOLUTION = Form("input", "weight", "bias")
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    }
)  # fmt: skip
TRANSPOSED = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
FORMS: dict[Any, Form] = dict.fromkeys(CONVOLUTIONS, _CONVOLUTION) | dict.fromkeys(
    TRANSPOSED, Form("input", "weight", "bias", reads=0, makes=1)
) | {
    aten.linear.default: Form("input", "weight", "bias"),
    aten.addmm.default: Form("mat1", "mat2", "self", reads=0, makes=1),
    aten.mm.default: Form("self", "mat2", None, reads=0, makes=1),
    aten.matmul.default: Form("self", "other", None, reads=0, makes=1),
}


@dataclass(frozen=True)
class Layer:
    """One call of a layer that is linear in its input."""

    program: Program
    node: fx.Node

    @property
    def form(self) -> Form:
        """Where its operator has what."""
        return FORMS[self.node.target]

    @property
    def convolves(self) -> bool:
        """Whether it slides over space."""
        return self.node.target in CONVOLUTIONS | TRANSPOSED

    @property
    def input(self) -> fx.Node:
        """The node that it reads."""
        return self._operand(self.form.input)

    @property
    def weight(self) -> fx.Node:
        """The node of its weight."""
        return self._operand(self.form.weight)

    @property
    def stored(self) -> fx.Node | None:
        """The node of the tensor that its weight is, or that its weight's fake-quant reads."""
        return stored(self.weight)

    @property
    def quantised(self) -> bool:
        """Whether a fake-quant stands before its weight or its input."""
        return FAKE_QUANT.op in (self.weight.target, self.input.target)

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

    @property
    def channel_dim(self) -> int:
        """The dimension of the result that holds the output channels."""
        return 1 if self.convolves else -1

    def _operand(self, name: str) -> fx.Node:
        node = bind_arguments(self.node)[name]
        assert isinstance(node, fx.Node)
        return node

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as [groups, outputs, inputs]."""
        if self.form.reads == 0:
            return weight.mT[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_of(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`, for a weight of this shape."""
        return matrix[0].mT.contiguous() if self.form.reads == 0 else matrix.reshape(*shape)

    def rows(self, y: Tensor) -> Tensor:
        """A result as [positions, groups, outputs]."""
        flat = y.movedim(self.channel_dim, -1)
        return flat.reshape(-1, self.groups, flat.shape[-1] // self.groups)

    def patches(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the layer reads at the chosen positions of `rows`: [chosen, groups, inputs]."""
        if not self.convolves:
            return x.reshape(-1, 1, x.shape[-1])[chosen]
        windows = _windows(Call(self.program, self.node), x, chosen)  # [chosen, taps, channels]
        channels = windows.mT.reshape(len(chosen), self.groups, -1, windows.shape[1])
        return channels.flatten(2)


def layer_at(program: Program, node: fx.Node) -> Layer | None:
    """The layer at a node; None where another operator stands there."""
    form = FORMS.get(node.target)
    if form is None:
        return None
    bound = bind_arguments(node)
    source, weight = bound[form.input], bound[form.weight]
    if source.op == "get_attr" or (stored(weight) is None and _is_product(node)):
        return None
    return Layer(program, node)


def stored(weight: fx.Node) -> fx.Node | None:
    """The tensor that a node is or fake-quantises; None where it is computed in another way."""
    if weight.target is FAKE_QUANT.op:
        weight = bind_arguments(weight)["x"]
    return weight if weight.op == "get_attr" else None


def why_no_matrix(layer: Layer) -> str:
    """Why a layer cannot be seen as a matrix with an own weight; empty where it can."""
    if layer.node.target in TRANSPOSED:
        return "it is a transposed convolution"
    if layer.weight.op != "get_attr":
        return "its weight is computed in the graph"
    rank = _rank(layer.input) if layer.convolves else 2
    if _rank(layer.weight) != rank:
        return f"its weight has {_rank(layer.weight)} dimensions, its input {_rank(layer.input)}"
    readers = {
        user.name
        for node in layer.program.graph.find_nodes(op="get_attr", target=layer.weight.target)
        for user in node.users
    }
    if others := sorted(readers - {layer.node.name}):
        return f"its weight is also read by {', '.join(others)}"
    return ""


def why_no_shift(layer: Layer) -> str:
    """Why nothing can be added to a layer's output; empty where it can."""
    if layer.node.target is aten.addmm.default:
        bound = bind_arguments(layer.node)
        if not (bound["alpha"] == bound["beta"] == 1):
            return "it scales its operands"
    if layer.bias is not None and layer.bias.op != "get_attr":
        return "its bias is computed in the graph"
    return ""


def _is_product(node: fx.Node) -> bool:
    """A product of two computed tensors, such as attention."""
    return node.target in (aten.matmul.default, aten.mm.default)


def _rank(node: fx.Node) -> int:
    return len(shape_of(node) or ())


def _windows(call: Call, x: Tensor, chosen: Tensor) -> Tensor:
    """The inputs of every tap at the chosen output positions: [chosen, taps, channels]."""
    weight = call.arg("weight").meta["val"]
    kernel = [int(size) for size in weight.shape[2:]]
    rank = len(kernel)
    stride, dilation = call.ints("stride", rank), call.ints("dilation", rank)
    low, high = _padding(call, kernel, dilation)
    widths = [side for pair in zip(reversed(low), reversed(high), strict=True) for side in pair]
    padded = torch.nn.functional.pad(x, widths)
    sizes = padded.shape[2:]
    outputs = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    sample = chosen // math.prod(outputs)
    corner = _ravel(_unravel(chosen, outputs), stride, sizes)
    grid = torch.cartesian_prod(*(torch.arange(k, device=x.device) for k in kernel))
    taps = _ravel(list(grid.reshape(-1, rank).unbind(1)), dilation, sizes)
    flat = padded.flatten(2).transpose(1, 2).flatten(0, 1)  # [batch * space, channels]
    index = (sample * math.prod(sizes) + corner)[:, None] + taps
    return flat[index]


def _padding(
    call: Call, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = call.arg("padding")
    if given == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if given == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    padding = call.ints("padding", len(kernel))
    return padding, padding


def _unravel(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The coordinates of flat positions; what exceeds the first size is dropped."""
    found: list[Tensor] = []
    for size in reversed(sizes):
        found.insert(0, flat % size)
        flat = flat // size
    return found


def _ravel(index: Sequence[Tensor], step: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The flat position of coordinates that are multiplied by steps."""
    flat = torch.zeros_like(index[0])
    for position, factor, size in zip(index, step, sizes, strict=True):
        flat = flat * size + position * factor
    return flat


# -- what follows a layer ------------------------------------------------------------------------


@dataclass(frozen=True)
class Tail:
    """The affine operators behind a layer, each the only reader of the one before.

    Attributes:
        nodes: in order; maybe none.
        norm: the batch norm among them.
        addition: the addition of a stored bias among them, for layers without one.
    """

    nodes: tuple[fx.Node, ...]
    norm: fx.Node | None = None
    addition: fx.Node | None = None

    def scale(self, program: Program, channels: int) -> Tensor:
        """By how much a change of the layer's output is multiplied, [channels] float64."""
        ones = torch.ones(channels, dtype=torch.float64)
        if self.norm is None:
            return ones
        call = Call(program, self.norm)
        gamma, var = call.parameter("weight"), call.parameter("running_var")
        assert var is not None
        scale = torch.rsqrt(var.detach().double() + call.number("eps"))
        return scale if gamma is None else scale * gamma.detach().double()


def tail(program: Program, node: fx.Node, *, residual: bool) -> Tail:
    """The affine operators behind a layer; with ``residual``, up to a residual addition."""
    nodes: list[fx.Node] = []
    addition = norm = None
    reader = _only_reader(node)
    if reader is not None and _adds_bias(reader, node):
        nodes.append(reader)
        addition, reader = reader, _only_reader(reader)
    if reader is not None and _normalises(program, reader, nodes[-1] if nodes else node):
        nodes.append(reader)
        norm, reader = reader, _only_reader(reader)
    last = nodes[-1] if nodes else node
    if residual and reader is not None and _adds(reader, last, node):
        nodes.append(reader)
    return Tail(tuple(nodes), norm, addition)


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def _other(node: fx.Node, known: fx.Node) -> fx.Node | None:
    """The operand of a plain addition that is not the known one."""
    if node.target is not aten.add.Tensor:
        return None
    bound = bind_arguments(node)
    pair = [bound["self"], bound["other"]]
    if bound["alpha"] != 1 or known not in pair or pair[0] is pair[1]:
        return None
    other = pair[1] if pair[0] is known else pair[0]
    return other if isinstance(other, fx.Node) else None


def _adds_bias(node: fx.Node, known: fx.Node) -> bool:
    other = _other(node, known)
    if other is None or other.op != "get_attr" or known.target not in FORMS:
        return False
    return not _convolves(known) and _rank(other) == 1 and (
        _channels(known, -1) == _channels(other, -1)
    )


def _adds(node: fx.Node, known: fx.Node, layer: fx.Node) -> bool:
    """A residual addition: of something of the same shape, computed before the layer."""
    other = _other(node, known)
    if other is None or other.op == "get_attr" or not other < layer:
        return False
    return _rank(other) == _rank(known) and all(
        str(a) == str(b)
        for a, b in zip(shape_of(other) or (), shape_of(known) or (), strict=True)
    )


def _normalises(program: Program, node: fx.Node, known: fx.Node) -> bool:
    """A batch norm by stored statistics over the channels of a convolution or of [batch, c]."""
    if node.target is not aten.batch_norm.default:
        return False
    call = Call(program, node)
    if call.producer("input") is not known or call.flag("training"):
        return False
    names = ("running_mean", "running_var")
    stored = all(call.parameter(name) is not None for name in names)
    affine = all(
        call.producer(name) is None or call.parameter(name) is not None
        for name in ("weight", "bias")
    )
    return stored and affine and (_convolves(known) or _rank(known) == 2)


def _convolves(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS | TRANSPOSED


def _channels(node: fx.Node, dim: int) -> str:
    return str((shape_of(node) or (0,))[dim])


def kept(removed: Removed, tensor: str, dim: int, size: int) -> Tensor:
    """The indices of a dimension of ``size`` that survive, int64.

    >>> kept({"w": {0: (1, 2)}}, "w", 0, 4).tolist()
    [0, 3]
    """
    alive = torch.ones(size, dtype=torch.bool)
    alive[torch.as_tensor(removed.get(tensor, {}).get(dim, ()), dtype=torch.int64)] = False
    return alive.nonzero().flatten()

"""Where fake-quants go: which layers, which tensors, and which tensors share parameters.

Matching is by data flow over ATen overloads, never by module type. A *layer* is a convolution or a
matrix product with a constant weight. A tensor is quantised where a layer reads it (once, for all
of its quantised readers), and further, as the target's `QuantScheme` says, at residual adds,
average pools, and the results of convolutions (after their ReLU, so that conv and ReLU fuse).

A *mover* (max pool, reshape, concatenation...) gives out values that it was given. In
convolutional nets a wish to quantise a mover's result is handed to its operands, and result and
operands share their parameters, so that integers pass through unchanged.

Each node is on a *stream*: ``conv`` or ``linear``, by what last computed its values. Residual
adds count only on the conv stream: those of transformers carry outliers that 8 bits cannot hold.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.onnx_attention import is_plain_attention
from pruna_ir.program import Program, dtype_of, shape_of
from pruna_ir.propagate import same_value
from pruna_ir.quantization import (
    MOVERS,
    PARTS,
    S8_SYMMETRIC,
    Grid,
    QuantParameters,
    QuantScheme,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Kind:
    """How a layer operator names its operands, and the weight's output-channel axis.

    Transposed convolutions hold [in, out / groups, ...]: groups share the scales of axis 1.
    """

    input: str
    weight: str
    axis: int
    convolution: bool = False


_CONV = Kind("input", "weight", 0, convolution=True)
_TRANSPOSED = Kind("input", "weight", 1, convolution=True)
KINDS: dict[Any, Kind] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    CONV_ACT.op: Kind("x", "weight", 0, convolution=True),
    aten.linear.default: Kind("input", "weight", 0),
    aten.addmm.default: Kind("mat1", "mat2", -1),
    aten.mm.default: Kind("self", "mat2", -1),
    aten.matmul.default: Kind("self", "other", -1),
    aten.bmm.default: Kind("self", "mat2", -1),
    aten.baddbmm.default: Kind("batch1", "batch2", -1),
}
ATTENTION = frozenset({aten.scaled_dot_product_attention.default})
AVERAGES = frozenset(
    {
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default, aten.mean.dim,
    }
)  # fmt: skip
_CAT = aten.cat.default
_PAD = aten.constant_pad_nd.default
_NORMS = frozenset({aten.batch_norm.default})
_LINEAR_SOURCES = ATTENTION | {
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default,
    aten.bmm.default, aten.baddbmm.default, aten.layer_norm.default, aten.rms_norm.default,
    aten.embedding.default,
}  # fmt: skip


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is one floating-point tensor."""
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def is_quantised(node: fx.Node) -> bool:
    """Whether the node is a fake-quant."""
    return node.target is FAKE_QUANT.op


def streams(program: Program) -> dict[fx.Node, str]:
    """``conv``, ``linear`` or the empty string for every node: what last computed its values."""
    found: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.target in _LINEAR_SOURCES:
            found[node] = "linear"
        elif node.target in KINDS:
            found[node] = "conv"
        else:
            inner = {found[operand] for operand in node.all_input_nodes}
            order = ("linear", "conv") if node.target is aten.add.Tensor else ("conv", "linear")
            found[node] = next((stream for stream in order if stream in inner), "")
    return found


@dataclass
class Placement:
    """The tensors to quantise, found by `place`.

    Attributes:
        bits: of the input of each layer that has fewer bits than the scheme's grid.
        readers: for each tensor to fake-quantise, the nodes that are to read the result, and the
            bits that each of them reads it with.
        carried: tensors among them that a mover gives out, with the bits that were handed on;
            their range is their source's.
        parent: the union-find forest of tensors that share their parameters.
        signed: tensors on a symmetric grid, whatever the scheme's.
    """

    program: Program
    scheme: QuantScheme
    stream: dict[fx.Node, str]
    bits: Mapping[fx.Node, int] = field(default_factory=dict)
    readers: dict[fx.Node, dict[fx.Node, int]] = field(default_factory=dict)
    carried: dict[fx.Node, int] = field(default_factory=dict)
    parent: dict[fx.Node, fx.Node] = field(default_factory=dict)
    signed: set[fx.Node] = field(default_factory=set)

    def grid(self, value: fx.Node, bits: int) -> Grid:
        """The grid of a tensor that is read with so many bits."""
        root = self.root(value)
        signed = any(self.root(each) is root for each in self.signed)
        return (S8_SYMMETRIC if signed else self.scheme.activation).with_bits(bits)

    def wants_signed(self, values: Collection[fx.Node], found: QuantParameters) -> bool:
        """Whether the signed grid serves tensors that share these parameters nearly as well."""
        readers = {reader for value in values for reader in self.readers[value]}
        kinds = [KINDS.get(reader.target) for reader in readers]
        if not all(kind is not None and not kind.convolution for kind in kinds):
            return False
        if found.grid.symmetric or any(self.root(v) is not v for v in values):
            return False
        low = found.grid.qmin - int(found.zero_point)
        high = found.grid.qmax - int(found.zero_point)
        larger = 2 * max(-low, high) / (high - low) - 1.0
        return larger <= self.scheme.nearly_symmetric

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of the tensors that share parameters with this one."""
        while (above := self.parent.get(node, node)) is not node:
            self.parent[node] = self.parent.get(above, above)
            node = above
        return node

    def want(self, value: fx.Node, reader: fx.Node, bits: int | None = None) -> None:
        """Let ``reader`` read ``value`` quantised; movers hand the wish on to their operands.

        Of several wishes for one reader the finest counts.
        """
        pending = [(value, reader, self._bits_of(reader) if bits is None else bits)]
        while pending:
            value, reader, bits = pending.pop()
            if is_quantised(value) or not is_float(value):
                continue
            sources = self._sources(value)
            readers = self.readers.setdefault(value, {})
            readers[reader] = max(bits, readers.get(reader, 0))
            if sources and self.carried.get(value, 0) < bits:
                self.carried[value] = bits
                for source, through in sources:
                    self.parent[self.root(value)] = self.root(source)
                    pending.append((source, through, bits))

    def leave_to_movers(self) -> None:
        """Drop the readers behind movers for which what the mover is given is fine enough."""
        for value, carried in self.carried.items():
            wishes = self.readers.pop(value)
            narrower = {reader: bits for reader, bits in wishes.items() if bits < carried}
            if narrower:
                self.readers[value] = narrower

    def _bits_of(self, reader: fx.Node) -> int:
        """The bits that a node reads its input with: movers those of what reads their result."""
        behind = [reader]
        found, seen = 0, set(behind)
        while behind:
            node = behind.pop()
            if node in self.bits:
                found = max(found, self.bits[node])
            elif node.users and self._moves(node):
                behind += [user for user in node.users if user not in seen]
                seen.update(node.users)
            else:
                return self.scheme.activation.bits
        return found

    def _moves(self, node: fx.Node) -> bool:
        return node.target in PARTS or bool(self._sources(node))

    def want_everywhere(self, value: fx.Node) -> None:
        """Let every reader of ``value`` read it quantised."""
        if any(is_quantised(user) for user in value.users):
            return
        for reader in list(value.users):
            self.want(value, reader)

    def _sources(self, value: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The operands whose values a mover gives out, each with the node that reads it.

        Empty where the node is no mover, or its operands cannot all be quantised.
        """
        if self.stream[value] != "conv":
            return []
        reader = value
        if value.target is operator.getitem:
            parts = value.all_input_nodes[0]
            if parts.target not in PARTS:
                return []
            reader = parts
        elif value.target not in MOVERS or not self._pads_with_zero(value):
            return []
        bound = bind_arguments(reader)
        operands = bound["tensors"] if reader.target is _CAT else [_first(reader)]
        usable = all(is_float(operand) and operand.op != "get_attr" for operand in operands)
        return [(operand, reader) for operand in operands] if usable else []

    def _pads_with_zero(self, node: fx.Node) -> bool:
        return node.target is not _PAD or bind_arguments(node)["value"] in (0, 0.0, None)


def _first(node: fx.Node) -> fx.Node:
    """The tensor that a mover with one operand moves."""
    return node.all_input_nodes[0]


def place(
    program: Program,
    scheme: QuantScheme,
    nodes: list[fx.Node],
    bits: Mapping[fx.Node, int] | None = None,
) -> Placement:
    """Every tensor that the scheme wants quantised around these nodes.

    Args:
        program: the program.
        scheme: what the target wants.
        nodes: the layers to quantise, and the adds and average pools that may be.
        bits: of the inputs of layers; those of the scheme's grid where it does not name one.
            Adds, average pools and readers that stay float always read the scheme's grid.
    """
    plan = Placement(program, scheme, streams(program), bits or {})
    for node in nodes:
        if node.target in KINDS:
            _place_layer(plan, node)
        elif node.target is aten.add.Tensor and is_residual(plan, node):
            _place_add(plan, node)
        elif is_average(plan, node) and scheme.average_pool:
            plan.want(_first(node), node)
        elif node.target in ATTENTION and takes_queries(scheme, node):
            _place_attention(plan, node)
    if not scheme.repeat_behind_movers:
        plan.leave_to_movers()
    return plan


def _place_layer(plan: Placement, node: fx.Node) -> None:
    call, kind = Call(plan.program, node), KINDS[node.target]
    operands = [kind.input] + ([kind.weight] if call.parameter(kind.weight) is None else [])
    for name in operands:
        source = call.producer(name)
        if source is not None:
            plan.want(source, node)
    if node.target is CONV_ACT.op and plan.scheme.residual != "none":
        residual = call.producer("residual")
        if residual is not None:
            plan.want(residual, node, plan.scheme.activation.bits)
    if kind.convolution and plan.scheme.layer_outputs:
        plan.want_everywhere(terminal(node))


def _place_add(plan: Placement, node: fx.Node) -> None:
    bound = bind_arguments(node)
    operands = [bound["self"], bound["other"]]
    if plan.scheme.residual == "identity":
        operands = [_identity(operands)]
    if plan.scheme.residual != "none":
        for operand in operands:
            plan.want(operand, node)
        if plan.scheme.layer_outputs:
            plan.want_everywhere(terminal(node))


def takes_queries(scheme: QuantScheme, attention: fx.Node) -> bool:
    """Whether the scheme wants query and key of a fused attention quantised."""
    if scheme.fused_attention == "plain":
        return is_plain_attention(bind_arguments(attention))
    return scheme.fused_attention == "any"


def _place_attention(plan: Placement, node: fx.Node) -> None:
    call = Call(plan.program, node)
    for name in ("query", "key"):
        source = call.producer(name)
        if source is not None:
            plan.want(source, node, plan.scheme.activation.bits)
            if plan.scheme.signed_queries:
                plan.signed.add(source)


def _identity(operands: list[fx.Node]) -> fx.Node:
    """The operand that the convolution before the add does not compute, or the earlier one."""
    convolutions = [x for x in operands if x.target in KINDS and KINDS[x.target].convolution]
    computed = [operand for operand in convolutions if len(operand.users) == 1]
    if len(computed) == 1:
        return next(operand for operand in operands if operand is not computed[0])
    return min(operands)


def is_residual(plan: Placement, node: fx.Node) -> bool:
    """Whether an add joins two computed tensors of one shape on the conv stream."""
    bound = bind_arguments(node)
    operands = [bound["self"], bound["other"]]
    if any(not isinstance(x, fx.Node) or x.op == "get_attr" or not is_float(x) for x in operands):
        return False
    alike = same_value(operands[0].meta["val"], operands[1].meta["val"])
    return alike and bound["alpha"] == 1 and plan.stream[node] == "conv"


def is_average(plan: Placement, node: fx.Node) -> bool:
    """Whether a node averages over the spatial dimensions of a tensor on the conv stream."""
    if node.target not in AVERAGES or plan.stream[node] != "conv":
        return False
    if node.target is not aten.mean.dim:
        return True
    rank = len(shape_of(_first(node)) or ())
    axes = bind_arguments(node)["dim"] or []
    return rank >= 4 and sorted(axis % rank for axis in axes) == list(range(2, rank))


def terminal(node: fx.Node) -> fx.Node:
    """The last node that a convolution or add fuses with: batch norm, then ReLU or ReLU6."""
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.target not in _NORMS and not is_clip(reader):
            return node
        node = reader
    return node


def is_clip(node: fx.Node) -> bool:
    """Whether a node is a ReLU, or clips to an interval that starts at 0."""
    if node.target is aten.relu.default:
        return True
    if node.target is aten.hardtanh.default:
        return bool(bind_arguments(node)["min_val"] == 0)
    return False


def candidates(program: Program) -> Iterator[fx.Node]:
    """Every call that quantisation is about: layers, adds of tensors, averages and attention."""
    others = AVERAGES | ATTENTION | {aten.add.Tensor}
    for node in program.calls():
        if node.target in KINDS or node.target in others:
            yield node


def layers_of(program: Program) -> list[fx.Node]:
    """The layers among the candidates: convolutions and matrix products."""
    return [node for node in candidates(program) if node.target in KINDS]


def wanted_bits(plan: Placement) -> list[tuple[fx.Node, int]]:
    """Each tensor to quantise with each number of bits that a reader of it wants."""
    return [
        (value, bits)
        for value, readers in plan.readers.items()
        for bits in dict.fromkeys(readers.values())
    ]

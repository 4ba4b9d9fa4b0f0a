"""Scale up the input channels that matter before weights are rounded (AWQ).

For products W x that are to be rounded, with a positive scale s per input channel,

    W x = (W S) (S^-1 x)          S = diag(s),   s = a / sqrt(max a min a),   a = mean|x| ^ alpha

the function stays, but rounding W S spends the grid on the channels whose inputs are large. S^-1
goes into what makes x: the scale of a norm, or the rows of a layer. All products that read x share
s. For each group, alpha is the one of ``steps`` + 1 values between 0 and 1 at which the error of
the rounded products over the calibration data is least; alpha = 0 changes nothing. Source: Lin et
al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration,
MLSys 2024, section 3.2, equations (4) and (5); the error here is that of the products themselves,
not of the block around them, and clipping is what ``scales=mse`` of quantize-weights does.

Promise (checked): the same function over the real numbers.

Limits: x must come from a norm with a scale, from a layer (through ReLU and reshapes), or from a
product of elements with a layer as one factor (the gate of a SwiGLU), and must be read by matrix
products only; elsewhere (behind attention) a remark says why not. Memory: [inputs,
inputs] float64 for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from pruna_ir.calibration import layer_name
from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.passes.channel_scaling import (
    SCALABLE,
    Scalable,
    scale_inputs,
    scale_outputs,
    why_not_scalable,
)
from pruna_ir.passes.layer_inputs import calibration_inputs, observed
from pruna_ir.passes.linear_layers import layer_at
from pruna_ir.passes.optimal_rounding import errors
from pruna_ir.passes.weight_blocks import (
    PRODUCTS,
    Scales,
    block_parameters,
    check_block,
    excluded,
    fitting_block,
    weight_grid,
)
from pruna_ir.program import Program, shape_of
from pruna_ir.quantization import Grid
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_LEAST = 1e-4
"""Mean magnitudes below this count as this, so that no scale explodes."""


@dataclass(frozen=True)
class ScaleSalientChannels(Pass):
    """Move a scale per channel from activations into weights, where rounding then costs least.

    Options:
        bits, block, symmetric, scales, exclude: those of the quantize-weights that follows.
        steps: how many exponents above 0 are tried, up to 1.

    Requires: calibration data; float weights (run it before quantize-weights).

    Raises:
        UsageError: there is no calibration data, or an option is out of its range.
    """

    name: ClassVar[str] = "scale-salient-channels"
    effect: ClassVar[Effect] = Effect.ROUNDING

    bits: Literal[8, 4] = 4
    block: int = 0
    symmetric: bool = True
    scales: Scales = "mse"
    exclude: tuple[str, ...] = ()
    steps: int = 20

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UsageError(f"{self.name}: bits must be 8 or 4, not {self.bits}")
        if self.steps < 1:
            raise UsageError(f"{self.name}: steps must be at least 1, not {self.steps}")
        check_block(self.name, self.block)

    def rewrite(self, rw: Rewrite) -> None:
        """Observe what every group reads, then scale group after group."""
        groups = list(self._groups(rw))
        batches = calibration_inputs(rw, self.name)
        seen = {group.source.name: _Seen() for group in groups}
        sources = [node for node in rw.before.calls() if node.name in seen]
        for number, inputs in enumerate(batches):
            rw.context.progress("scaling channels", number, len(batches))
            for node, value in observed(rw.before, inputs, sources).items():
                seen[node.name].update(value)
        for group in groups:
            self._scale(rw, group, seen[group.source.name])
        rw.set_origin(rw.before.origin)

    def _groups(self, rw: Rewrite) -> Iterator[Group]:
        """The products that share an input into which a scale can go; remarks name others."""
        found: dict[fx.Node, None] = {}
        for node in rw.calls(*PRODUCTS):
            if layer_at(rw.program, node) is not None:
                found.setdefault(_source(rw.program, node))
        for source in found:
            readers = list(_readers(source))
            carrier = _carrier(rw.program, source)
            reason = carrier if isinstance(carrier, str) else self._reason(rw, source, readers)
            if reason or isinstance(carrier, str):
                rw.skip(source, f"its channels are not scaled: {reason}")
            else:
                yield Group(source, tuple(Scalable(rw.program, n) for n in readers), carrier)

    def _reason(self, rw: Rewrite, source: fx.Node, readers: list[fx.Node]) -> str:
        for node in readers:
            if node.target not in PRODUCTS or layer_at(rw.program, node) is None:
                return f"{node.name} reads it too"
            if not rw.in_scope(node):
                return f"{node.name} reads it too and is out of scope"
            if hit := excluded(layer_name(node), self.exclude):
                return f"{node.name} reads it and is excluded by '{hit}'"
            if _source(rw.program, node) is not source:
                return f"{node.name} reads it as its weight"
            if why := why_not_scalable(Scalable(rw.program, node)):
                return f"{node.name} reads it, and {why}"
        return ""

    def _scale(self, rw: Rewrite, group: Group, seen: _Seen) -> None:
        if not bool(torch.isfinite(seen.gram).all()):
            raise rw.error(group.source, "the calibration data drives it to inf or NaN")
        grid = weight_grid(self.bits, symmetric=self.symmetric)
        matrices = [layer.blocks(layer.tensor())[0, :, :, 0] for layer in group.layers]
        block = fitting_block(matrices[0].shape[1], self.block)
        weight = torch.cat(matrices)
        best, least, first = seen.scale(0.0), float("inf"), 0.0
        for step in range(self.steps + 1):
            scale = seen.scale(step / self.steps)
            rounded = _rounded(weight * scale, block, grid, self.scales) / scale
            error = float(errors(weight, rounded, seen.gram).sum())
            first = first if step else error
            if error < least:
                best, least, alpha = scale, error, step / self.steps
        if first <= 0 or least >= first:
            rw.note(group.source, "no scale lessens the error of the rounded products")
            return
        for layer in group.layers:
            old = _unrounded(rw, layer.weight)
            scaled = layer.unblocked(scale_inputs(layer.blocks(old), best), old)
            rw.redirect(layer.node, {layer.weight: rw.derive(layer.weight, scaled, layer.node)})
        group.carrier.divide(rw, best)
        names = ", ".join(layer_name(layer.node) for layer in group.layers)
        rw.applied(
            group.source,
            f"alpha {alpha:.2f} for {names}: {1 - least / first:.0%} less error of the products",
        )


def _rounded(weight: Tensor, block: int, grid: Grid, scales: Scales) -> Tensor:
    inputs = weight.shape[1]
    rows = torch.nn.functional.pad(weight, (0, -inputs % block)).reshape(-1, block)
    parameters = block_parameters(rows, grid, scales, "")
    whole = parameters.reals(parameters.integers(rows)).reshape(len(weight), -1)
    return whole[:, :inputs]


class _Seen:
    """The second moments and mean magnitudes of a tensor's channels."""

    def __init__(self) -> None:
        self.gram = torch.zeros(0)
        self._magnitude = torch.zeros(0)
        self._count = 0

    def update(self, value: Tensor) -> None:
        """Take in a batch [..., channels]."""
        rows = value.flatten(0, -2).double()
        gram, magnitude = rows.mT @ rows, rows.abs().sum(0)
        fresh = not self._count
        self.gram = gram if fresh else self.gram + gram
        self._magnitude = magnitude if fresh else self._magnitude + magnitude
        self._count += len(rows)

    def scale(self, alpha: float) -> Tensor:
        """The scale of each channel for an exponent, float64."""
        mean = (self._magnitude / self._count).clamp(min=_LEAST)
        scale = mean**alpha
        return scale / (scale.max() * scale.min()).sqrt()


# -- what carries a scale ------------------------------------------------------------------------


@dataclass(frozen=True)
class Carrier:
    """A node whose stored tensors can take a factor per output channel.

    Attributes:
        node: the node; a norm, a product with a vector, or a layer.
        names: its arguments that are vectors over the channels; empty for a layer.
    """

    program: Program
    node: fx.Node
    names: tuple[str, ...] = ()

    def divide(self, rw: Rewrite, scale: Tensor) -> None:
        """Divide what the node yields by a scale per channel."""
        vectors = [bind_arguments(self.node)[name] for name in self.names]
        if not self.names:
            layer = Scalable(self.program, self.node)
            old = _unrounded(rw, layer.weight)
            new = layer.unblocked(scale_outputs(layer.blocks(old), 1 / scale), old)
            rw.redirect(self.node, {layer.weight: rw.derive(layer.weight, new, self.node)})
            vectors = [] if layer.bias is None else [layer.bias]
        for source in vectors:
            divided = _unrounded(rw, source) / scale
            rw.redirect(self.node, {source: rw.derive(source, divided, self.node)})


def _unrounded(rw: Rewrite, source: fx.Node) -> Tensor:
    """A stored tensor in float64: unrounded where another group has scaled it before."""
    name = str(source.target)
    return rw.exact.get(name, rw.program.tensor(name).detach()).double()


@dataclass(frozen=True)
class Group:
    """Products that read one tensor, and what can carry the inverse of their scale.

    Attributes:
        source: the tensor.
        layers: the products.
        carrier: where 1 / s goes.
    """

    source: fx.Node
    layers: tuple[Scalable, ...]
    carrier: Carrier


def _source(program: Program, node: fx.Node) -> fx.Node:
    """What a product reads, before reshapes that keep the channels last."""
    source = Scalable(program, node).input
    while _keeps_channels(source):
        (source,) = source.all_input_nodes[:1]
    return source


def _readers(source: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor, behind reshapes that keep the channels last."""
    for user in source.users:
        if _keeps_channels(user) and user.all_input_nodes[0] is source:
            yield from _readers(user)
        else:
            yield user


def _keeps_channels(node: fx.Node) -> bool:
    if node.target is not aten.reshape.default:
        return False
    old, new = (shape_of(n) or (None,) for n in (node.all_input_nodes[0], node))
    return isinstance(old[-1], int) and old[-1] == new[-1]


def _carrier(program: Program, node: fx.Node) -> Carrier | str:
    """What can carry a factor per channel of a node's value; why nothing can, in words."""
    if node.target is aten.relu.default or _keeps_channels(node):
        inner = node.all_input_nodes[0]
        alone = len(inner.users) == 1
        return _carrier(program, inner) if alone else f"{inner.name} has other readers"
    if node.target in SCALABLE:
        why = _why_no_rows(Scalable(program, node))
        return Carrier(program, node) if not why else f"{node.name} cannot carry it: {why}"
    if node.target in _NORMS:
        return _norm(program, node)
    if node.target is aten.mul.Tensor:
        return _factor(program, node)
    return f"{node.name} cannot carry a scale"


def _why_no_rows(layer: Scalable) -> str:
    if layer.convolves:
        return "it is a convolution"
    bias = layer.bias
    shape = () if bias is None else shape_of(bias) or ()
    if bias is not None and (bias.op != "get_attr" or len(shape) != 1 or shape[0] == 1):
        return "its bias is no vector over its channels"
    return why_not_scalable(layer)


def _norm(program: Program, node: fx.Node) -> Carrier | str:
    bound = bind_arguments(node)
    names = tuple(name for name in ("weight", "bias") if isinstance(bound.get(name), fx.Node))
    if "weight" not in names:
        return f"{node.name} has no scale of its own"
    if len(bound["normalized_shape"]) != 1 or any(bound[n].op != "get_attr" for n in names):
        return f"{node.name} has no stored vector over the channels"
    return Carrier(program, node, names)


def _factor(program: Program, node: fx.Node) -> Carrier | str:
    """A product of elements: a stored vector or a layer as one factor."""
    bound = bind_arguments(node)
    channels = (shape_of(node) or (None,))[-1]
    for name in ("self", "other"):
        factor = bound[name]
        stored = isinstance(factor, fx.Node) and factor.op == "get_attr"
        if stored and shape_of(factor) == (channels,):
            return Carrier(program, node, (name,))
    for name in ("other", "self"):
        factor = bound[name]
        if isinstance(factor, fx.Node) and factor.target in SCALABLE and len(factor.users) == 1:
            found = _carrier(program, factor)
            if isinstance(found, Carrier) and (shape_of(factor) or (None,))[-1] == channels:
                return found
    return f"no factor of {node.name} is a stored vector or a layer that only it reads"

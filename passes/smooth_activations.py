"""smooth-activations: outliers of activations move into the weights that read them.

A few channels of a transformer's activations are far larger than the others, and one scale per
tensor then wastes its grid on them. With a factor s_j > 0 per input channel of Y = X W,

    Y = (X diag(s)^-1) (diag(s) W)                              equation (3)
    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)                 equation (4)

the difficulty is shared between X and W: by half at alpha = 0.5. max|X_j| is taken over the
calibration data, max|W_j| over the weights of all layers that read X. Source: Xiao et al.,
SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, ICML
2023, section 4.

1 / s goes, without a new operator, into what yields X: the scale and shift of a layer norm or RMS
norm (also where it is spelled out), or the rows of a linear layer (values to output projection,
through attention and shared key-value heads; up to down projection, through the gate's product).
All layers that read one norm share s. Where there is no such source, ``insert`` multiplies by
1 / s in front of the layers.

Limits: where anything but linear layers reads the norm (a residual stream behind a post-norm),
only ``insert`` helps. Weights that an embedding shares are left alone. Activations behind GELU and
the like have no source. Run it on the float program, before insert-fake-quant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.calibration import observe
from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.passes.channel_scaling import (
    Scalable,
    of_inputs,
    scale_inputs,
    scale_outputs,
    why_not_scalable,
)
from pruna_ir.passes.scale_paths import LINEAR, Path, Source, columns, other_readers, trace
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Divide the input channels of linear layers by a factor that their weights take up.

    Rewrite:
        x = layer_norm(h, gamma, beta); y = W x
          -->
        x = layer_norm(h, gamma / s, beta / s); y = (W diag(s)) x

    Attributes:
        alpha: how much of the difficulty moves from activations to weights, 0 to 1.
        insert: where nothing before a layer can take 1 / s, multiply its input by it.
        samples: how many samples of the data to look at.

    Requires: a float program; calibration data.

    Raises:
        UsageError: there is no calibration data, the program is quantised already, or an option
            is out of its range.

    >>> from pruna_ir import Context, TensorData, apply, capture
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([16.0, 1.0]))
    ...     _ = model[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
    >>> x = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    >>> context = Context(data=TensorData((x,)))
    >>> program = apply(SmoothActivations(), capture(model, (x,)), context).program
    >>> [[round(v, 3) for v in program.tensor(n).flatten().tolist()] for n in program.tensors()]
    [[4.0, 1.0], [0.0, 0.0], [4.0, 1.0]]
    """

    name: ClassVar[str] = "smooth-activations"
    effect: ClassVar[Effect] = Effect.ROUNDING

    alpha: float = 0.5
    insert: bool = False
    samples: int = 512

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UsageError(f"{self.name}: alpha must lie between 0 and 1, not {self.alpha}")
        if self.samples < 1:
            raise UsageError(f"{self.name}: samples must be at least 1, not {self.samples}")

    def rewrite(self, rw: Rewrite) -> None:
        """Find who reads what, look at the data once, move the factors."""
        if "quantized-for" in rw.program.attributes:
            raise UsageError(
                f"the program is quantised for '{rw.program.attributes['quantized-for']}'; run "
                f"{self.name} on the float program, before insert-fake-quant"
            )
        groups = list(self._groups(rw))
        if not groups:
            return
        if rw.context.data is None:
            raise UsageError(
                f"{self.name} needs calibration data: give --data FILE.npz, or Context(data=...)"
            )
        seen = {layer.input: LargestByChannel() for group in groups for layer in group.layers}
        observe(
            rw.program, seen, rw.context.data,
            samples=self.samples, progress=rw.context.progress,
        )  # fmt: skip
        for group in groups:
            factor = group.factor(seen, self.alpha)
            if float(factor.log().abs().max()) > 1e-6:
                _smooth(rw, group, factor)

    def _groups(self, rw: Rewrite) -> Iterator[Group]:
        """The layers that share their factors; remarks on those that cannot be smoothed."""
        traced, without = _traced(rw)
        paths = [path for members in traced.values() for _, path in members]
        numbers = dict(zip(paths, columns(rw.program, paths), strict=True)) if paths else {}
        for members in traced.values():
            group = _shared(rw, members, numbers)
            if isinstance(group, Group):
                yield group
                continue
            for layer, _ in members:
                without.setdefault(layer.input, []).append((layer, group))
        for blocked in without.values():
            if self.insert:
                yield Group(tuple(layer for layer, _ in blocked), (), None)
                continue
            for layer, why in blocked:
                rw.skip(layer.node, f"{why}; insert=true would multiply its input")


def _traced(
    rw: Rewrite,
) -> tuple[
    dict[fx.Node, list[tuple[Scalable, Path]]], dict[fx.Node, list[tuple[Scalable, str]]]
]:
    """The layers with a source, by source, and those without, by input, with the reason."""
    traced: dict[fx.Node, list[tuple[Scalable, Path]]] = {}
    without: dict[fx.Node, list[tuple[Scalable, str]]] = {}
    for node in rw.calls(*LINEAR):
        layer = Scalable(rw.program, node)
        if layer.weight.op != "get_attr" or layer.input.op == "get_attr":
            continue
        if why := why_not_scalable(layer):
            rw.skip(node, why)
            continue
        found = trace(layer.input)
        if isinstance(found, Path):
            traced.setdefault(found.source.node, []).append((layer, found))
        else:
            without.setdefault(layer.input, []).append((layer, found))
    return traced, without


class LargestByChannel:
    """The largest magnitude so far of each index of the last dimension.

    >>> seen = LargestByChannel()
    >>> seen.update(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
    >>> seen.largest.tolist()
    [3.0, 2.0]
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.largest = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        new = x.detach().reshape(-1, x.shape[-1]).abs().amax(0).double().cpu()
        self.largest = new if not len(self.largest) else torch.maximum(self.largest, new)
        self.low, self.high = -float(self.largest.max()), float(self.largest.max())


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share their factors.

    Attributes:
        layers: those that read the smoothed value.
        columns: for each of them, the source's channel of each input.
        source: what takes 1 / s; None for a product that is inserted.
    """

    layers: tuple[Scalable, ...]
    columns: tuple[Tensor, ...]
    source: Source | None

    def factor(self, seen: Mapping[fx.Node, LargestByChannel], alpha: float) -> Tensor:
        """s, equation (4), for each channel of the source, float64; 1 for unused channels."""
        width = len(seen[self.layers[0].input].largest)
        if self.source is not None:
            width = int(self.source.node.meta["val"].shape[-1])
        x, w = torch.zeros(2, width, dtype=torch.float64)
        for number, layer in enumerate(self.layers):
            index = self.columns[number] if self.columns else torch.arange(width)
            weights = of_inputs(layer.blocks(layer.tensor())).cpu()
            x = x.scatter_reduce(0, index, seen[layer.input].largest, "amax")
            w = w.scatter_reduce(0, index, weights, "amax")
        used = (x > 0) & (w > 0)
        x, w = torch.where(used, x, 1.0), torch.where(used, w, 1.0)
        return x.pow(alpha) / w.pow(1.0 - alpha)


def _shared(
    rw: Rewrite,
    members: Sequence[tuple[Scalable, Path]],
    numbers: Mapping[Path, Tensor | None],
) -> Group | str:
    """The group of all layers behind one source, or why its factors cannot move."""
    layers = tuple(layer for layer, _ in members)
    paths = [path for _, path in members]
    source = paths[0].source
    nodes = [layer.node for layer in layers]
    if others := other_readers(paths, nodes):
        return f"{source.node.name} is also read by {', '.join(others)}"
    if source.layer and (why := why_not_scalable(Scalable(rw.program, source.node))):
        return f"{source.node.name}: {why}"
    bias = Scalable(rw.program, source.node).bias if source.layer else None
    if bias is not None and (bias.op != "get_attr" or bias.meta["val"].dim() != 1):
        return f"the bias of {source.node.name} is no stored vector"
    found = [numbers[path] for path in paths]
    if any(index is None for index in found):
        return f"the channels of {source.node.name} are mixed on the way"
    return Group(layers, tuple(index for index in found if index is not None), source)


def _smooth(rw: Rewrite, group: Group, factor: Tensor) -> None:
    """Divide the source by the factors, and multiply the layers' columns by them."""
    if group.source is None:
        where = _insert(rw, group, factor)
    elif group.source.layer:
        where = _divide_layer(rw, Scalable(rw.program, group.source.node), factor)
    else:
        for name in group.source.vectors:
            _divide_vector(rw, group.source.node, name, factor)
        where = group.source.node.name
    for number, layer in enumerate(group.layers):
        own = factor[group.columns[number]] if group.columns else factor
        weight = _unrounded(rw, layer)
        blocks = scale_inputs(layer.blocks(weight), own.to(weight.device))
        rw.derive(layer.weight, layer.unblocked(blocks, weight), layer.node)
        least, most = float(own.min()), float(own.max())
        rw.applied(
            layer.node, f"inputs divided by {least:.3g} to {most:.3g}, taken from {where}"
        )


def _unrounded(rw: Rewrite, layer: Scalable) -> Tensor:
    """The weight, float64, as this pass computed it where it was another group's source."""
    return rw.exact.get(str(layer.weight.target), layer.tensor())


def _divide_vector(rw: Rewrite, node: fx.Node, name: str, factor: Tensor) -> None:
    source: fx.Node = bind_arguments(node)[name]
    old = rw.program.tensor(str(source.target)).detach().double()
    derived = rw.derive(source, old / factor.to(old.device), node)
    if derived is not source:
        rw.update(node, **{name: derived})


def _divide_layer(rw: Rewrite, layer: Scalable, factor: Tensor) -> str:
    weight = _unrounded(rw, layer)
    blocks = scale_outputs(layer.blocks(weight), 1.0 / factor.to(weight.device))
    rw.derive(layer.weight, layer.unblocked(blocks, weight), layer.node)
    if layer.bias is not None:
        _divide_vector(rw, layer.node, str(layer.form.bias), factor)
    return layer.node.name


def _insert(rw: Rewrite, group: Group, factor: Tensor) -> str:
    value, nodes = group.layers[0].input, [layer.node for layer in group.layers]
    first = min(nodes)
    dtype = value.meta["val"].dtype
    inverse = (1.0 / factor).to(rw.program.tensor(str(group.layers[0].weight.target)).device)
    name = f"{value.name}_smoothing"
    constant = rw.constant(inverse, name, before=first, rounded_to=dtype)
    product = rw.insert(aten.mul.Tensor, before=first, like=first, self=value, other=constant)
    for node in nodes:
        rw.redirect(node, {value: product})
    return f"{product.name}, inserted"

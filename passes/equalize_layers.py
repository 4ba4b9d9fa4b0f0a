"""equalize-layers: channels of neighbouring layers share their weights' range.

For y = W2 f(W1 x + b1) with f(s z) = s f(z) for s > 0 (no activation, ReLU, leaky ReLU, pools),
any positive s per channel can move from one layer to the next without a change of the function:

    W1' = S^-1 W1        b1' = S^-1 b1        W2' = W2 S          equations (8) and (9)
    s_i = sqrt(r1_i r2_i) / r2_i                                  equation (11)

with r1_i the largest |weight| of output channel i of W1 and r2_i that of input channel i of W2:
afterwards both are sqrt(r1_i r2_i), which maximises the precision that the channels have together
(equation 10). In chains the pairs are visited in turn until nothing moves. Source: Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1.

A nearly dead channel, of tiny weights and a large bias, would get a huge activation. Where the
paper absorbs such biases into the next layer (section 4.1.3, which is not exact), here a channel
whose bias is 16 times as large in units of its weights as the layer's median is scaled up no
further than to the largest bias of the others.

Where weights have one scale per output channel, r1 does not matter for W1 itself: what is gained
there is in W2, whose inputs get alike, and in the activation between. Quantise afterwards.

Limits: ReLU6 and other activations that saturate stop it (with a remark), as does a batch norm
that is not folded. The tensors between must have one reader each, so that residual streams stay as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.passes.channel_scaling import (
    SCALABLE,
    Place,
    Scalable,
    homogeneous,
    of_inputs,
    of_outputs,
    scale_inputs,
    scale_outputs,
    why_not_scalable,
)
from pruna_ir.program import shape_of
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten

_NEARLY_DEAD = 16.0
"""From how many times the median ratio of bias to weights a channel counts as nearly dead."""
_SETTLED = 1e-6
"""Factors nearer to 1 than this are rounding: they are not worth a change."""
_SATURATING: dict[Any, str] = {
    aten.hardtanh.default: "clips its input, so that no scale passes; ReLU would let it",
    aten.batch_norm.default: "stands between; run fold-batch-norm first",
    aten.silu.default: "is not homogeneous: no scale passes",
    aten.gelu.default: "is not homogeneous: no scale passes",
    aten.hardswish.default: "is not homogeneous: no scale passes",
    aten.elu.default: "is not homogeneous: no scale passes",
    aten.sigmoid.default: "is not homogeneous: no scale passes",
    aten.tanh.default: "is not homogeneous: no scale passes",
}


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Move a factor per channel between neighbouring layers so that their weights' ranges agree.

    Rewrite:
        y = W2 relu(W1 x + b1) + b2
          -->
        y = (W2 S) relu((W1 / S) x + b1 / S) + b2      with s = sqrt(max|W1| / max|W2|)

    Attributes:
        sweeps: how often the pairs of a program are visited at most; pairs that share no layer
            need one visit.

    Requires: a float program with folded batch norms.

    Raises:
        UsageError: the program is quantised already, or ``sweeps`` is below 1.

    >>> from pruna_ir import apply, capture
    >>> layers = [torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1)]
    >>> model = torch.nn.Sequential(*layers)
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[8.0, 0.0], [0.5, 0.1]]))
    ...     _ = model[2].weight.copy_(torch.tensor([[0.5, 2.0]]))
    >>> program = apply(EqualizeLayers(), capture(model, (torch.ones(2, 2),))).program
    >>> program.tensor("0.weight").abs().amax(1).tolist(), program.tensor("2.weight").tolist()
    ([2.0, 1.0], [[2.0, 1.0]])
    """

    name: ClassVar[str] = "equalize-layers"
    effect: ClassVar[Effect] = Effect.ROUNDING

    sweeps: int = 50

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise UsageError(f"{self.name}: sweeps must be at least 1, not {self.sweeps}")

    def rewrite(self, rw: Rewrite) -> None:
        """Find the pairs, settle the factors, store the weights."""
        if "quantized-for" in rw.program.attributes:
            raise UsageError(
                f"the program is quantised for '{rw.program.attributes['quantized-for']}'; run "
                f"{self.name} on the float program, before insert-fake-quant"
            )
        pairs = list(_pairs(rw))
        factors = _settled(pairs, self.sweeps)
        incoming: dict[fx.Node, Tensor] = {}
        outgoing: dict[fx.Node, Tensor] = {}
        touched: dict[fx.Node, Scalable] = {}
        for pair, factor in zip(pairs, factors, strict=True):
            if float(factor.log().abs().max()) <= _SETTLED:
                continue
            outgoing[pair.first.node] = 1.0 / factor
            incoming[pair.second.node] = factor.repeat_interleave(pair.repeat)
            touched |= {pair.first.node: pair.first, pair.second.node: pair.second}
            _scale_bias(rw, pair, factor)
            least, most = float(factor.min()), float(factor.max())
            rw.applied(
                pair.first.node,
                f"equalised with {pair.second.node.name}: factors {least:.3g} to {most:.3g}",
            )
        for node, layer in touched.items():
            weight = layer.tensor()
            blocks = _scaled(layer.blocks(weight), incoming.get(node), outgoing.get(node))
            rw.derive(layer.weight, layer.unblocked(blocks, weight), node)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers, the second the only reader of the first, through what a factor passes.

    Attributes:
        first: the layer before.
        second: the layer behind.
        repeat: how many neighbouring inputs of ``second`` stem from one channel.
        addition: the addition of a stored bias to the first layer's output.
    """

    first: Scalable
    second: Scalable
    repeat: int = 1
    addition: fx.Node | None = None

    def bias(self) -> tuple[fx.Node, fx.Node, str] | None:
        """The stored bias of the first layer, its reader and the reader's argument."""
        if self.addition is not None:
            bound = bind_arguments(self.addition)
            name = "other" if bound["self"] is self.first.node else "self"
            return bound[name], self.addition, name
        if self.first.bias is None:
            return None
        return self.first.bias, self.first.node, str(self.first.form.bias)


def _pairs(rw: Rewrite) -> Iterator[Pair]:
    """All pairs of the program in order; remarks on near misses."""
    for node in rw.calls(*SCALABLE):
        if not _is_layer(rw, node):
            continue
        first = Scalable(rw.program, node)
        found = _pair(rw, first)
        if isinstance(found, Pair):
            yield found
        elif found:
            rw.skip(node, found)


def _is_layer(rw: Rewrite, node: fx.Node) -> bool:
    form = SCALABLE[node.target]
    weight = rw.call(node).producer(form.weight)
    return weight is not None and weight.op == "get_attr"


def _pair(rw: Rewrite, first: Scalable) -> Pair | str:
    """The pair that a layer begins; a reason for a near miss, empty where nothing is near."""
    node = first.node
    place = Place(node, first.axis(node))
    addition: fx.Node | None = None
    while True:
        readers = [user for user in place.node.users if user.op == "call_function"]
        if len(readers) != 1 or len(place.node.users) != 1:
            return _shared(place.node)
        (reader,) = readers
        if _reads(reader, place.node) != 1:
            return f"{reader.name} reads {place.node.name} twice"
        if reader.target in SCALABLE and _is_layer(rw, reader):
            break
        if place.node is node and _adds_bias(reader, node, place.axis):
            addition, place = reader, Place(reader, place.axis)
            continue
        behind = homogeneous(reader, place)
        if behind is None:
            why = _SATURATING.get(reader.target)
            return f"{reader.name} ({reader.target}) {why}" if why else ""
        place = behind
    return _checked(Pair(first, Scalable(rw.program, reader), place.repeat, addition), place)


def _shared(node: fx.Node) -> str:
    """A remark where several layers read a value; residual streams are no near miss."""
    readers = [user for user in node.users if user.target in SCALABLE]
    if len(readers) < 2:
        return ""
    return f"{node.name} is read by {', '.join(sorted(user.name for user in readers))}"


def _reads(reader: fx.Node, node: fx.Node) -> int:
    """In how many places a node reads another."""
    places: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), places.append)
    return places.count(node)


def _adds_bias(reader: fx.Node, node: fx.Node, axis: int) -> bool:
    """Whether a node adds a stored vector to a layer's output, one number a channel."""
    if reader.target is not aten.add.Tensor or axis != len(shape_of(node) or ()) - 1:
        return False
    bound = bind_arguments(reader)
    other = bound["other"] if bound["self"] is node else bound["self"]
    if bound["alpha"] != 1 or not isinstance(other, fx.Node) or other.op != "get_attr":
        return False
    return shape_of(other) == (shape_of(node) or ())[-1:]


def _checked(pair: Pair, place: Place) -> Pair | str:
    """The pair, or why it is none."""
    first, second = pair.first, pair.second
    if second.input is not place.node or second.axis(place.node) != place.axis:
        return ""
    if first.node.target is CONV_ACT.op:
        bound = bind_arguments(first.node)
        if bound["activation"] not in ("none", "relu"):
            return f"its activation {bound['activation']} lets no scale pass"
        if bound["residual"] is not None:
            return ""
    for layer in (first, second):
        if why := why_not_scalable(layer):
            return why if layer is first else f"{layer.node.name}: {why}"
    bias = pair.bias()
    if bias is not None and bias[0].op != "get_attr":
        return "its bias is computed in the graph"
    if bias is not None and len(shape_of(bias[0]) or ()) != 1:
        return "its bias is no vector"
    return pair


def _settled(pairs: list[Pair], sweeps: int) -> list[Tensor]:
    """The factor s of each pair after as many sweeps as it takes, float64."""
    layers = {layer.node: layer for pair in pairs for layer in (pair.first, pair.second)}
    blocks = {node: layer.blocks(layer.tensor()) for node, layer in layers.items()}
    total = [torch.ones_like(of_outputs(blocks[pair.first.node])) for pair in pairs]
    biases = [_bias_sizes(pair, factor) for pair, factor in zip(pairs, total, strict=True)]
    for _ in range(sweeps):
        largest = 0.0
        for number, pair in enumerate(pairs):
            first, second = blocks[pair.first.node], blocks[pair.second.node]
            wanted = total[number] * _factor(first, second, pair.repeat)
            ratio = biases[number] / total[number] / of_outputs(first).clamp_min(1e-300)
            wanted = torch.maximum(wanted, _floor(biases[number], ratio, wanted))
            step = wanted / total[number]
            largest = max(largest, float(step.log().abs().max()))
            total[number] = wanted
            blocks[pair.first.node] = scale_outputs(first, 1.0 / step)
            second = blocks[pair.second.node]
            blocks[pair.second.node] = scale_inputs(second, step.repeat_interleave(pair.repeat))
        if largest <= _SETTLED:
            break
    return total


def _factor(first: Tensor, second: Tensor, repeat: int) -> Tensor:
    """s = sqrt(r1 / r2), equation (11); 1 for a channel that one of the layers does not use."""
    r1 = of_outputs(first)
    r2 = of_inputs(second).reshape(-1, repeat).amax(1)
    used = (r1 > 0) & (r2 > 0)
    one = torch.ones_like(r1)
    return torch.where(used, (torch.where(used, r1, one) / torch.where(used, r2, one)).sqrt(), one)


def _bias_sizes(pair: Pair, like: Tensor) -> Tensor:
    """The magnitude of the first layer's bias by channel, 0 where it has none."""
    bias = pair.bias()
    if bias is None:
        return torch.zeros_like(like)
    stored = pair.first.program.tensor(str(bias[0].target)).detach()
    return stored.double().abs().expand_as(like)


def _floor(biases: Tensor, ratio: Tensor, factor: Tensor) -> Tensor:
    """The least factor of nearly dead channels, 0 for the others.

    Args:
        biases: the magnitude of each bias, before any factor.
        ratio: that of each bias to its channel's weights, at present.
        factor: the factors that are wanted.
    """
    dead = ratio > _NEARLY_DEAD * ratio.median()
    if not bool(dead.any()) or not float(ratio.median()) > 0:
        return torch.zeros_like(factor)
    reach = (biases / factor)[~dead].max()
    return torch.where(dead, (biases / reach).clamp(max=1.0), 0.0)


def _scale_bias(rw: Rewrite, pair: Pair, factor: Tensor) -> None:
    found = pair.bias()
    if found is None:
        return
    source, reader, argument = found
    old = rw.program.tensor(str(source.target)).detach().double()
    derived = rw.derive(source, old / factor, reader)
    if derived is not source:
        rw.update(reader, **{argument: derived})


def _scaled(blocks: Tensor, incoming: Tensor | None, outgoing: Tensor | None) -> Tensor:
    if incoming is not None:
        blocks = scale_inputs(blocks, incoming)
    return blocks if outgoing is None else scale_outputs(blocks, outgoing)

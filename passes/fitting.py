"""What a fitted layer is held to: its part of the unpruned program's values.

A layer of a pruned program is compared with its counterpart, the node of the same name in the
unpruned program, at the end of the affine operators behind both (`linear_layers.tail`): there it
should yield the channels that survive of what the counterpart yields. What its output lacks for
that, divided by the scale of a batch norm on the way, is what a compensation pass fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from pruna_ir.passes.layer_inputs import Frontier
from pruna_ir.passes.linear_layers import (
    TRANSPOSED,
    Layer,
    Tail,
    kept,
    layer_at,
    tail,
    why_no_shift,
)
from pruna_ir.program import Origin, Program, shape_of
from pruna_ir.transform import Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Aim:
    """A layer, its counterpart in the unpruned program, and where the two are compared.

    Attributes:
        layer: in the pruned program.
        now: what follows it.
        counterpart: in the unpruned program.
        was: what follows the counterpart.
        kept: the output channels that survive, int64.
        lost: how many of its inputs (of one group) were removed.
    """

    layer: Layer
    now: Tail
    counterpart: Layer
    was: Tail
    kept: Tensor = field(compare=False)
    lost: int

    @property
    def scale(self) -> Tensor:
        """By how much the layer's output is multiplied on the way, [channels] float64."""
        return self.now.scale(self.layer.program, len(self.kept))

    def survivors(self, value: Tensor) -> Tensor:
        """The part of an unpruned value that survives."""
        if len(self.kept) == value.shape[self.layer.channel_dim]:
            return value
        return value.index_select(self.layer.channel_dim, self.kept.to(value.device))

    def lacking(self, now: Tensor, was: Tensor) -> Tensor:
        """What the layer's output lacks, given both values at the end of the tails.

        Channels that a batch norm multiplies by (nearly) 0 lack nothing: no weight would help.
        """
        scale = self.scale
        dead = scale.abs() <= 1e-6 * scale.abs().max()
        factor = torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, scale))
        shape = [1] * now.dim()
        shape[self.layer.channel_dim] = len(factor)
        return (self.survivors(was) - now).double() * factor.reshape(shape).to(now.device)


def aims(
    program: Program, origin: Origin, *, residual: bool, every: bool = False
) -> Iterator[Aim | tuple[fx.Node, str]]:
    """The layers to be fitted, in order, and those that cannot be, with the reason.

    Args:
        program: the pruned program.
        origin: what it was pruned from.
        residual: compare after a residual addition where there is one.
        every: all layers, not only those that lost inputs.
    """
    counterparts = {node.name: node for node in origin.program.calls()}
    for node in program.calls():
        layer = layer_at(program, node)
        match = counterparts.get(node.name)
        if layer is None or match is None or match.target is not node.target:
            continue
        counterpart = Layer(origin.program, match)
        lost = _lost(layer, counterpart)
        if lost or every:
            found = _aim(layer, counterpart, lost, origin, residual)
            yield (node, found) if isinstance(found, str) else found


def _aim(
    layer: Layer, counterpart: Layer, lost: int, origin: Origin, residual: bool
) -> Aim | str:
    if lost and layer.node.target in TRANSPOSED and layer.groups > 1:
        return "it is a grouped transposed convolution"
    if why := why_no_shift(layer):
        return why
    survivors = _kept(layer, counterpart, origin)
    if survivors is None:
        return "which of its output channels survive is not known"
    now = tail(layer.program, layer.node, residual=residual)
    was = tail(counterpart.program, counterpart.node, residual=residual)
    if _end(now) != _end(was):
        now = tail(layer.program, layer.node, residual=False)
        was = tail(counterpart.program, counterpart.node, residual=False)
    if (now.norm is None) != (was.norm is None):
        return "what follows it differs from what followed it before pruning"
    return Aim(layer, now, counterpart, was, survivors, lost)


def _end(found: Tail) -> str:
    """The name of the last operator; empty where it is the layer, or only adds its bias."""
    if not found.nodes or found.nodes[-1] is found.addition:
        return ""
    return found.nodes[-1].name


def _lost(layer: Layer, counterpart: Layer) -> int:
    now, was = shape_of(layer.weight), shape_of(counterpart.weight)
    if now is None or was is None or len(now) != len(was):
        return 0
    return int(was[layer.form.reads]) - int(now[layer.form.reads])


def _kept(layer: Layer, counterpart: Layer, origin: Origin) -> Tensor | None:
    now, was = shape_of(layer.node), shape_of(counterpart.node)
    if now is None or was is None or len(now) != len(was):
        return None
    size, wanted = int(was[layer.channel_dim]), int(now[layer.channel_dim])
    candidates = [torch.arange(size)]
    if counterpart.weight.op == "get_attr":
        dim = layer.form.makes
        candidates.append(kept(origin.removed, str(counterpart.weight.target), dim, size))
    if counterpart.bias is not None and (shape_of(counterpart.bias) or ())[-1:] == (size,):
        dim = len(shape_of(counterpart.bias) or ()) - 1
        candidates.append(kept(origin.removed, str(counterpart.bias.target), dim, size))
    return next((c for c in candidates if len(c) == wanted), None)


def both_ends(
    aim: Aim, now: Frontier, was: Frontier, batch: int
) -> tuple[Tensor, Tensor]:
    """The values at the ends of both tails for one batch.

    ``now`` must stand at the layer, ``was`` behind its counterpart at most.
    """
    return (
        _end_value(aim.layer.node, aim.now, now, batch, None),
        _end_value(aim.counterpart.node, aim.was, was, batch, was.values(aim.counterpart.node)),
    )


def _end_value(
    node: fx.Node, after: Tail, frontier: Frontier, batch: int, known: list[Tensor] | None
) -> Tensor:
    value: Tensor = frontier.evaluate(node, batch) if known is None else known[batch]
    previous = node
    for following in after.nodes:
        value = frontier.evaluate(following, batch, {previous: value})
        previous = following
    return value


def shift(rw: Rewrite, aim: Aim, amount: Tensor) -> str:
    """Add to a layer's output, channel by channel; returns where the amount went.

    It goes to the layer's bias, else into the running mean of the batch norm behind it, else into
    a bias that is added behind it, else into a new bias.
    """
    layer, node = aim.layer, aim.layer.node
    sign = 1.0
    if layer.bias is not None:
        reader, argument = node, str(layer.form.bias)
    elif aim.now.norm is not None:
        reader, argument, sign = aim.now.norm, "running_mean", -1.0
    elif aim.now.addition is not None:
        reader = aim.now.addition
        argument = "other" if rw.call(reader).producer("self") is node else "self"
    else:
        return _new_bias(rw, layer, amount)
    source = rw.call(reader).producer(argument)
    assert source is not None
    old = rw.program.tensor(str(source.target)).detach()
    derived = rw.derive(source, old.double() + sign * amount.to(old.device), reader)
    if derived is not source:
        rw.update(reader, **{argument: derived})
    return str(derived.target)


def _new_bias(rw: Rewrite, layer: Layer, amount: Tensor) -> str:
    node = layer.node
    value = node.meta["val"]
    path = "" if layer.stored is None else str(layer.stored.target).rpartition(".")[0]
    own_bias = layer.form.bias is not None
    bias = rw.constant(
        torch.nn.Parameter(amount.to(value.device)),
        f"{path}.bias" if path else f"{node.name}_bias",
        before=node if own_bias else node.next,
        rounded_to=value.dtype,
    )
    if own_bias:
        rw.update(node, **{str(layer.form.bias): bias})
        return str(bias.target)
    readers = list(node.users)
    total = rw.insert(aten.add.Tensor, before=bias.next, like=node, self=node, other=bias)
    for reader in readers:
        rw.redirect(reader, {node: total})
    return str(bias.target)

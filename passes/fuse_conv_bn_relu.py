"""Fuse convolution, batch norm, residual addition and activation into one operator.

    y = act(batch_norm(conv(x)) + r)   -->   y = pruna::conv_act(x, W', b', r, ..., act)
    y = act(batch_norm(conv(x))) + r   -->   the same with residual_last, once all of the first are

``act`` is relu, relu6, hardtanh, leaky_relu, hardswish, silu, sigmoid or
gelu; batch norm, residual and activation are each
optional, but a convolution followed by neither of the last two stays as it is. The batch norm is
folded as ``fold-batch-norm`` folds it. Convolutions in one to three dimensions, grouped ones
included; transposed ones have no fused form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import pruna_ir.kernels.conv_act
from pruna_ir.call import Call, bind_arguments
from pruna_ir.passes.batch_norm_folding import CONVOLUTIONS, Folded, apply_fold, try_fold
from pruna_ir.passes.layer_activations import ACTIVATIONS, applied
from pruna_ir.printer import print_node
from pruna_ir.propagate import same_value
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten
CONV_ACT = pruna_ir.kernels.conv_act.KERNEL.op

_NAMED_PADDING = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
_UNKNOWN = (
    aten.elu.default, aten.mish.default, aten.prelu.default, aten.softplus.default,
    aten.tanh.default, aten.hardsigmoid.default, aten.clamp.default, aten.celu.default,
    aten.selu.default, aten.log_sigmoid.default,
)  # fmt: skip
"""Activations that the operator lacks; a convolution before one is remarked on."""


@dataclass(frozen=True)
class FuseConvBnRelu(Pass):
    """Replace a convolution with its epilogue by ``pruna::conv_act``.

    Rewrite:
        c = conv2d(x, W, b); n = batch_norm(c, ...); s = add(n, r); y = relu(s)
          -->
        y = conv_act(x, W', b', r, ..., activation=relu)

    Requires: nobody else reads c, n or s; r has exactly the shape and dtype of n.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    >>> program = apply(FuseConvBnRelu(), capture(model, (torch.zeros(2, 3, 8, 8),))).program
    >>> [str(node.target) for node in program.calls()]
    ['pruna.conv_act.default']
    """

    name: ClassVar[str] = "fuse-conv-bn-relu"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Fuse each convolution with what follows it, then say what stood in the others' way."""
        _fuse_all(rw)
        reasons = _fuse_all(rw)
        for node in rw.calls(CONV_ACT):
            _take_addition(rw, node)
        for node, reason in reasons.items():
            rw.skip(node, reason)


def _fuse_all(rw: Rewrite) -> dict[fx.Node, str]:
    """Fuse what can be fused now; the reasons against the rest.

    The reasons of a first sweep may be moot after it: another convolution took the addition.
    """
    reasons: dict[fx.Node, str] = {}
    for node in rw.calls(*CONVOLUTIONS, *_NAMED_PADDING):
        found = _match(rw, node)
        if isinstance(found, _Match):
            _fuse(rw, node, found)
        elif found:
            reasons[node] = found
    return reasons


def _take_addition(rw: Rewrite, node: fx.Node) -> None:
    """Let a fused convolution add what is added to its result, where it adds nothing yet."""
    bound = bind_arguments(node)
    addition = _reader(node, _is_addition)
    if bound["residual"] is not None or addition is None or len(node.users) > 1:
        return
    residual = _residual(Call(rw.program, addition), node)
    if isinstance(residual, str):
        rw.skip(node, residual)
        return
    arguments = bound | {"residual": residual, "residual_last": True}
    fused = rw.insert(CONV_ACT, before=addition, like=node, **arguments)
    what = f"the residual after the activation of {node.name}"
    rw.applied(addition, f"fused {what} into {fused.name}")
    rw.replace(addition, fused)
    rw.erase(node)


@dataclass(frozen=True)
class _Match:
    """What follows a convolution: the last node of the chain, and its parts."""

    last: fx.Node
    norm: fx.Node | None = None
    addition: fx.Node | None = None
    folded: Folded | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    activation_args: tuple[float, ...] = ()


def _match(rw: Rewrite, conv: fx.Node) -> _Match | str:
    """The fusable chain after a convolution; a reason; or "" where nothing resembles one."""
    norm = _reader(conv, _is_norm)
    start = norm if norm is not None else conv
    addition = _reader(start, _is_addition)
    end = addition if addition is not None else start
    activation = _reader(end, _is_activation)
    if addition is None and activation is None:
        unknown = _reader(end, _is_unknown)
        name = "" if unknown is None else str(unknown.target).split(".")[1]
        return f"{unknown.name}: conv_act has no {name}" if unknown is not None else ""
    if reason := _reason_against_convolution(rw, conv):
        return reason
    inner = [n for n in (conv, norm, addition if activation is not None else None) if n]
    for node in inner:
        if others := _other_readers(node, (norm, addition, activation)):
            return f"{node.name} is also read by {', '.join(others)}"
    return _complete(rw, norm, start, addition, activation)


def _complete(
    rw: Rewrite,
    norm: fx.Node | None,
    start: fx.Node,
    addition: fx.Node | None,
    activation: fx.Node | None,
) -> _Match | str:
    folded = residual = None
    if norm is not None:
        tried = try_fold(Call(rw.program, norm))
        if isinstance(tried, str):
            return tried
        folded = tried
    if addition is not None:
        found = _residual(Call(rw.program, addition), start)
        if isinstance(found, str):
            return found
        residual = found
    if activation is None:
        assert addition is not None
        return _Match(addition, norm, addition, folded, residual)
    last = applied(activation)
    name, args = last.name, last.arguments
    return _Match(activation, norm, addition, folded, residual, name, args)


def _reader(node: fx.Node, wanted: Any) -> fx.Node | None:
    return next((user for user in node.users if wanted(user, node)), None)


def _is_norm(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.batch_norm.default and bind_arguments(user)["input"] is node


def _is_addition(user: fx.Node, _node: fx.Node) -> bool:
    """An addition of two tensors."""
    if user.target is not aten.add.Tensor:
        return False
    bound = bind_arguments(user)
    return all(
        isinstance(bound[name], fx.Node) and isinstance(bound[name].meta["val"], torch.Tensor)
        for name in ("self", "other")
    )


def _is_activation(user: fx.Node, _node: fx.Node) -> bool:
    return user.target in ACTIVATIONS


def _is_unknown(user: fx.Node, _node: fx.Node) -> bool:
    return user.target in _UNKNOWN


def _other_readers(node: fx.Node, chain: tuple[fx.Node | None, ...]) -> list[str]:
    return sorted(user.name for user in node.users if user not in chain)


def _reason_against_convolution(rw: Rewrite, conv: fx.Node) -> str:
    if conv.target in _NAMED_PADDING:
        return "its padding is given by name; run canonicalize first"
    call = Call(rw.program, conv)
    weight = call.arg("weight").meta["val"]
    if len(conv.meta["val"].shape) != weight.dim():
        return "it is called without a batch dimension"
    lists = [call.arg(name) for name in ("stride", "padding", "dilation")]
    if any(not isinstance(item, int) for values in lists for item in values):
        return "its stride, padding or dilation is computed in the graph"
    return ""


def _residual(addition: Call, start: fx.Node) -> fx.Node | str:
    """The other operand of an addition, or why it cannot be a residual."""
    if addition.arg("alpha") != 1:
        return f"{addition.node.name} adds with alpha={addition.arg('alpha')}"
    operands = [addition.arg("self"), addition.arg("other")]
    if operands[0] is operands[1]:
        return f"{addition.node.name} adds {start.name} to itself"
    other: fx.Node = operands[1] if operands[0] is start else operands[0]
    ours, theirs = start.meta["val"], other.meta["val"]
    if ours.dtype != theirs.dtype:
        return f"the residual {other.name} is {theirs.dtype}, not {ours.dtype}"
    if not same_value(ours, theirs):
        return (
            f"the residual {print_node(other)} broadcasts against "
            f"{start.name}{list(ours.shape)}"
        )
    return other


def _fuse(rw: Rewrite, conv: fx.Node, match: _Match) -> None:
    if match.norm is not None and match.folded is not None:
        apply_fold(rw, Call(rw.program, match.norm), match.folded)
    call = Call(rw.program, conv)
    spatial = len(call.arg("weight").meta["val"].shape) - 2
    fused = rw.insert(
        CONV_ACT,
        before=match.last,
        like=conv,
        x=call.arg("input"),
        weight=call.arg("weight"),
        bias=call.arg("bias"),
        residual=match.residual,
        stride=list(call.ints("stride", spatial)),
        padding=list(call.ints("padding", spatial)),
        dilation=list(call.ints("dilation", spatial)),
        groups=call.arg("groups"),
        activation=match.activation,
        activation_args=list(match.activation_args),
    )
    parts = ["convolution", *(["batch norm"] if match.norm is not None else [])]
    parts += ["residual"] if match.residual is not None else []
    parts += [match.activation] if match.activation != "none" else []
    rw.applied(match.last, f"fused {', '.join(parts)} into {fused.name}")
    rw.replace(match.last, fused)
    for node in (match.addition, match.norm, conv):
        if node is not None and node is not match.last:
            rw.erase(node)

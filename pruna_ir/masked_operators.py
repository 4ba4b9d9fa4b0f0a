"""What operators compute where some elements are dead: the table of the masked reference.

A handler maps `Masked` operands to `Masked` results; the rules that it follows stand in
`pruna_ir.masked_reference`. An operator reaches the table only where it reads dead elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.errors import UnsupportedError
from pruna_ir.program import source_line
from pruna_ir.registry import COUPLING_RULES, entries, find, load

aten = torch.ops.aten


@dataclass(frozen=True)
class Masked:
    """A tensor and which of its elements are alive (None: all). Dead elements hold 0."""

    value: Tensor
    alive: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """``alive`` as a tensor of the value's shape."""
        if self.alive is not None:
            return self.alive
        return torch.ones((), dtype=torch.bool).expand(self.value.shape)


def masked(value: Tensor, alive: Tensor | None) -> Masked:
    """A pair whose dead elements are 0 (also where they were NaN or infinite)."""
    if alive is None or bool(alive.all()):
        return Masked(value)
    alive = alive.expand(value.shape)
    return Masked(torch.where(alive, value, torch.zeros((), dtype=value.dtype)), alive)


def refusal(node: fx.Node, why: str) -> UnsupportedError:
    """The error that a node does something with dead elements that is not defined."""
    where = f" ({source_line(node)})" if source_line(node) else ""
    return UnsupportedError(f"masked reference: {node.name} = {node.target}{where} {why}")


def plain(value: Any) -> Any:
    """The values alone."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    return value.value if isinstance(value, Masked) else value


def lift(value: Tensor) -> Tensor:
    """A floating-point tensor in float64."""
    return value.to(torch.float64) if value.is_floating_point() else value


def lifted(value: Any) -> Any:
    """Arguments with every floating-point dtype replaced by float64."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(lifted, value))
    if isinstance(value, dict):
        return {key: lifted(item) for key, item in value.items()}
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def wrap(result: Any) -> Any:
    """Results as `Masked` with everything alive."""
    if isinstance(result, (tuple, list)):
        return tuple(map(wrap, result))
    return Masked(lift(result)) if isinstance(result, Tensor) else result


@dataclass(frozen=True)
class Operands:
    """The arguments of one call by schema name; tensors are `Masked`."""

    node: fx.Node
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """An argument, or None where the operator has none of that name."""
        return self.arguments.get(name)

    def call(
        self,
        pick: Callable[[Masked], Tensor] = lambda m: m.value,
        changed: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operator on the values (or on what ``pick`` takes of each tensor)."""
        target = self.node.target
        assert isinstance(target, torch._ops.OpOverload)
        given = self.arguments | {k: v for k, v in (changed or {}).items() if k in self.arguments}
        bound = {name: _picked(value, pick) for name, value in given.items()}
        names = [a.name for a in target._schema.arguments if not a.kwarg_only]
        positional = [bound.pop(name) for name in names]
        return target(*positional, **bound)

    def refuse(self, why: str) -> UnsupportedError:
        """The error that this call reads dead elements in a way that is not defined."""
        return refusal(self.node, why)


def _picked(value: Any, pick: Callable[[Masked], Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return [_picked(item, pick) for item in value]
    return pick(value) if isinstance(value, Masked) else value


Handler = Callable[[Operands], Any]


def handler_of(node: fx.Node) -> Handler:
    """The handler of a call.

    Raises:
        UnsupportedError: nobody has said what it makes of dead elements.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name
    if name in HANDLERS:
        return HANDLERS[name]
    if name in {entry.name for entry in entries(COUPLING_RULES)}:
        stated = getattr(load(find(COUPLING_RULES, name)), "masked", None)
        if stated == "elementwise":
            return _elementwise
        if callable(stated):
            return lambda operands: stated(**operands.arguments)
    if torch.Tag.pointwise in target.tags:
        return _elementwise
    raise refusal(node, "reads removed channels, and what it makes of them is not defined")


# -- elementwise and layout ----------------------------------------------------------------


def _tensors(operands: Operands) -> list[Masked]:
    found: list[Masked] = []
    for argument in operands.arguments.values():
        items = argument if isinstance(argument, (tuple, list)) else [argument]
        found += [item for item in items if isinstance(item, Masked)]
    return found


def _elementwise(operands: Operands) -> Masked:
    result = lift(operands.call())
    alive = torch.ones((), dtype=torch.bool)
    for operand in _tensors(operands):
        alive = alive & operand.mask
    return masked(result, alive)


def _layout(operands: Operands) -> Any:
    """The operator moves elements: it moves their masks alike."""
    values, alive = operands.call(), operands.call(lambda m: m.mask)
    if isinstance(values, (tuple, list)):
        return tuple(masked(lift(v), a) for v, a in zip(values, alive, strict=True))
    return masked(lift(values), alive)


def _first(operands: Operands) -> Masked:
    """Only the first tensor's elements count (``to``, ``type_as``)."""
    return masked(lift(operands.call()), _tensors(operands)[0].mask)


def _created(operands: Operands) -> Any:
    """A new tensor that takes no more than the dtype of its operand."""
    return wrap(operands.call())


def _pad(operands: Operands) -> Masked:
    value = lift(operands.call())
    if operands.get("mode") not in (None, "constant"):
        moved = operands.call(lambda m: m.mask.to(torch.float64))
        return masked(value, moved > 0.5)
    alive = aten.constant_pad_nd.default(operands["self"].mask, operands["pad"], True)  # noqa: FBT003
    return masked(value, alive)


def _embedding(operands: Operands) -> Masked:
    indices = operands["indices"]
    if indices.alive is not None:
        raise operands.refuse("is given dead indices")
    return masked(lift(operands.call()), operands["weight"].mask[indices.value])


def _index(operands: Operands) -> Masked:
    if any(isinstance(i, Masked) and i.alive is not None for i in operands["indices"]):
        raise operands.refuse("is given dead indices")
    value = operands.call()
    indices = [i.value if isinstance(i, Masked) else i for i in operands["indices"]]
    return masked(lift(value), aten.index.Tensor(operands["self"].mask, indices))


def _windowed(spatial: int) -> Handler:
    """A window over the last dimensions, along which all or nothing is alive."""

    def handler(operands: Operands) -> Any:
        x = _tensors(operands)[0]
        alive = _uniform(operands, x.mask, range(-spatial, 0))
        results = operands.call()
        if isinstance(results, (tuple, list)):
            return tuple(masked(lift(r), alive) for r in results)
        return masked(lift(results), alive)

    return handler


def _uniform(operands: Operands, alive: Tensor, dims: Sequence[int]) -> Tensor:
    """The mask with these dimensions made 1, along which it must not vary."""
    line = alive
    for dim in dims:
        line = line.narrow(dim, 0, 1)
    if not bool((alive == line).all()):
        raise operands.refuse("mixes dead elements with alive ones")
    return line


def _along(operands: Operands) -> Any:
    """An operator along ``dim`` that cannot tell dead elements: there may be none beside alive."""
    x = _tensors(operands)[0]
    dim = operands.get("dim")
    dims = range(x.value.dim()) if dim is None else [dim]
    line = _uniform(operands, x.mask, dims)
    results = operands.call()
    single = not isinstance(results, (tuple, list))
    wrapped = []
    for result in [results] if single else results:
        fits = result.dim() == line.dim()
        wrapped.append(masked(lift(result), line if fits else line.squeeze(tuple(dims))))
    return wrapped[0] if single else tuple(wrapped)


# -- contractions --------------------------------------------------------------------------


def _matmul(operands: Operands) -> Masked:
    """[..., m, k] @ [..., k, n], alive at (m, n) where row m and column n are."""
    a, b = (m.mask for m in _tensors(operands)[-2:])
    result = lift(operands.call())
    a = a.unsqueeze(0) if (vector_a := a.dim() == 1) else a
    b = b.unsqueeze(-1) if (vector_b := b.dim() == 1) else b
    alive = a.any(-1, keepdim=True) & b.any(-2, keepdim=True)
    alive = alive.squeeze(-2) if vector_a else alive
    alive = alive.squeeze(-1) if vector_b else alive
    if (bias := operands.get("self")) is not None and len(_tensors(operands)) == 3:
        alive = alive & bias.mask
    return masked(result, alive)


def _linear(operands: Operands) -> Masked:
    alive = operands["input"].mask.any(-1, keepdim=True) & operands["weight"].mask.any(-1)
    if (bias := operands["bias"]) is not None:
        alive = alive & bias.mask
    return masked(lift(operands.call()), alive)


def _conv(operands: Operands) -> Masked:
    x, weight, bias = operands["input"], operands["weight"], operands["bias"]
    spatial = weight.value.dim() - 2
    transposed = operands.get("transposed") or "transpose" in str(operands.node.target)
    rows = weight.mask.flatten(2).any(-1)  # [out, in / groups], or [in, out / groups]
    if transposed:
        groups = operands["groups"]
        rows = rows.view(groups, -1, rows.shape[1]).any(1).reshape(-1)
    else:
        rows = rows.any(1)
    rows = rows & bias.mask if bias is not None else rows
    channel = x.value.dim() - spatial - 1
    _uniform(operands, x.mask, [d for d in range(x.value.dim()) if d != channel])
    return masked(lift(operands.call()), rows.view(-1, *[1] * spatial))


def _attention(operands: Operands) -> Masked:
    """Heads live where query, key and value do; a dead head size adds 0 to the scores.

    The default scale is that of the full head size.
    """
    q, k, v = (operands[name].mask for name in ("query", "key", "value"))
    keys = _uniform(operands, k.any(-1, keepdim=True), [-2])
    values = _uniform(operands, v, [-2])
    if operands.get("enable_gqa"):
        times = q.shape[-3] // k.shape[-3]
        keys, values = (m.repeat_interleave(times, -3) for m in (keys, values))
    alive = q.any(-1, keepdim=True) & keys & values
    if (mask := operands["attn_mask"]) is not None and mask.alive is not None:
        alive = alive & _uniform(operands, mask.mask, [-1])
    return masked(lift(operands.call()), alive)


# -- statistics ----------------------------------------------------------------------------


def _dims(operands: Operands, rank: int) -> list[int]:
    given = operands.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [d % rank for d in (given if isinstance(given, (list, tuple)) else [given])]


def _moments(x: Masked, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of the alive elements; dimensions kept."""
    count = x.mask.sum(dims, keepdim=True).to(torch.float64)
    mean = x.value.sum(dims, keepdim=True) / count.clamp(min=1)
    deviation = torch.where(x.mask, x.value - mean, torch.zeros((), dtype=torch.float64))
    return count, mean, deviation.square().sum(dims, keepdim=True)


def _statistic(operands: Operands) -> Masked:
    x = _tensors(operands)[0]
    dims = _dims(operands, x.value.dim())
    count, mean, squares = _moments(x, dims)
    name = operands.node.target._schema.name  # type: ignore[union-attr]
    if name == "aten::mean":
        result = mean
    elif name in ("aten::var", "aten::std"):
        correction = operands.get("correction")
        if correction is None:
            correction = 1 if operands.get("unbiased") in (None, True) else 0
        result = squares / (count - correction).clamp(min=0)
        result = result.sqrt() if name == "aten::std" else result
    elif name in ("aten::amax", "aten::amin"):
        worst = float("-inf") if name == "aten::amax" else float("inf")
        filled = torch.where(x.mask, x.value, torch.full((), worst, dtype=torch.float64))
        result = filled.amax(dims, keepdim=True) if worst < 0 else filled.amin(dims, keepdim=True)
    else:
        result = _plain_reduction(operands, x, name)
    alive = count > 0
    if not operands.get("keepdim"):
        result, alive = (t.squeeze(tuple(dims)) for t in (result, alive))
    return masked(result, alive)


def _plain_reduction(operands: Operands, x: Masked, name: str) -> Tensor:
    """Reductions in which a 0 counts for nothing."""
    dims = _dims(operands, x.value.dim())
    if name == "aten::sum":
        return x.value.sum(dims, keepdim=True)
    if name == "aten::linalg_vector_norm" and float(operands["ord"]) > 0:
        norm: Tensor = torch.linalg.vector_norm(x.value, operands["ord"], dims, keepdim=True)
        return norm
    raise operands.refuse("reduces over removed channels, and its value there is not defined")


def _softmax(operands: Operands) -> Masked:
    x = operands["self"]
    filled = torch.where(x.mask, x.value, torch.full((), float("-inf"), dtype=torch.float64))
    return masked(lift(operands.call(changed={"self": Masked(filled), "dtype": None})), x.mask)


def _layer_norm(operands: Operands) -> Any:
    x, shape = operands["input"], operands["normalized_shape"]
    dims = list(range(x.value.dim() - len(shape), x.value.dim()))
    count, mean, squares = _moments(x, dims)
    eps = operands["eps"]
    if "rms_norm" in str(operands.node.target):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        mean, squares = torch.zeros_like(mean), x.value.square().sum(dims, keepdim=True)
    return _affine(operands, x, (x.value - mean) * (squares / count.clamp(min=1) + eps).rsqrt())


def _affine(operands: Operands, x: Masked, value: Tensor, view: Sequence[int] = ()) -> Masked:
    """A normalised value scaled and shifted; ``view`` gives the parameters' shape."""
    alive = x.mask
    weight, bias = operands.get("weight"), operands.get("bias")
    if weight is not None:
        shape = view or weight.value.shape
        value, alive = value * weight.value.view(shape), alive & weight.mask.view(shape)
    if bias is not None:
        shape = view or bias.value.shape
        value, alive = value + bias.value.view(shape), alive & bias.mask.view(shape)
    return masked(value, alive)


def _group_norm(operands: Operands) -> Masked:
    x, groups = operands["input"], operands["num_groups"]
    n, channels, *rest = x.value.shape
    split = (n, groups, -1)
    flat = Masked(x.value.reshape(split), x.mask.reshape(split))
    count, mean, squares = _moments(flat, [2])
    value = (flat.value - mean) * (squares / count.clamp(min=1) + operands["eps"]).rsqrt()
    view = (channels, *[1] * len(rest))
    return _affine(operands, x, value.reshape(x.value.shape), view)


def _channelwise(axis: str | int, *names: str) -> Handler:
    """An operator with parameters for the channels of one axis."""

    def handler(operands: Operands) -> Any:
        x = _tensors(operands)[0]
        place = operands[axis] if isinstance(axis, str) else axis
        alive = x.mask
        for name in names:
            parameter = operands.get(name)
            if place is not None and isinstance(parameter, Masked) and parameter.value.numel() > 1:
                shape = [1] * x.value.dim()
                shape[place] = -1
                alive = alive & parameter.mask.view(shape)
        results = operands.call()
        if isinstance(results, (tuple, list)):
            return (masked(lift(results[0]), alive), *map(wrap, results[1:]))
        return masked(lift(results), alive)

    return handler


def _batch_norm(operands: Operands) -> Any:
    if operands.get("training") or operands.get("use_input_stats"):
        x = operands["input"]
        _uniform(operands, x.mask, [d for d in range(x.value.dim()) if d != 1])
    handler = _channelwise(1, "weight", "bias", "running_mean", "running_var")
    return handler(operands)


def _glu(operands: Operands) -> Masked:
    a, b = operands["self"].mask.chunk(2, operands["dim"])
    return masked(lift(operands.call()), a & b)


_LAYOUT = (
    "reshape view _unsafe_view unflatten flatten permute transpose swapaxes t numpy_T movedim "
    "slice narrow select index_select split split_with_sizes chunk tensor_split unbind cat concat "
    "stack squeeze unsqueeze expand expand_as repeat tile repeat_interleave flip roll ravel "
    "channel_shuffle native_channel_shuffle pixel_shuffle"
)
_ELEMENTWISE = (
    "hardswish dropout alpha_dropout feature_dropout clone contiguous alias detach "
    "lift_fresh_copy __and__ __or__ __xor__ bitwise_not where masked_fill zeros_like ones_like "
    "full_like nan_to_num hardsigmoid log_sigmoid"
)
_WINDOWS = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d",
    2: "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
       "_adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d upsample_bicubic2d "
       "reflection_pad2d replication_pad2d lp_pool2d",
    3: "max_pool3d avg_pool3d adaptive_avg_pool3d upsample_trilinear3d upsample_nearest3d",
}  # fmt: skip
_SOFTMAX = "softmax _softmax log_softmax _log_softmax"
_CONVS = "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
_STATISTICS = "mean sum var std amax amin linalg_vector_norm"
_ALONG = "cumsum cumprod sort topk argsort argmax argmin max min median prod logsumexp any all"

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": _layout for name in _LAYOUT.split()},
    **{f"aten::{name}": _elementwise for name in _ELEMENTWISE.split()},
    **{f"aten::{name}": _first for name in ("to", "_to_copy", "type_as")},
    **{f"aten::{name}": _created for name in ("new_zeros", "new_ones", "new_full")},
    **{f"aten::{name}": _windowed(n) for n, names in _WINDOWS.items() for name in names.split()},
    **{f"aten::{name}": _conv for name in _CONVS.split()},
    **{f"aten::{name}": _statistic for name in _STATISTICS.split()},
    **{f"aten::{name}": _along for name in _ALONG.split()},
    **{f"aten::{name}": _matmul for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")},
    **{f"aten::{name}": _softmax for name in _SOFTMAX.split()},
    "aten::linear": _linear,
    "aten::embedding": _embedding,
    "aten::index": _index,
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
    "aten::scaled_dot_product_attention": _attention,
    "aten::layer_norm": _layer_norm,
    "aten::rms_norm": _layer_norm,
    "aten::group_norm": _group_norm,
    "aten::batch_norm": _batch_norm,
    "aten::instance_norm": _batch_norm,
    "aten::prelu": _channelwise(1, "weight"),
    "aten::glu": _glu,
    "pruna::fake_quant": _channelwise("axis", "scale", "zero_point"),
}
"""Operator name without overload to what it computes where elements are dead."""

"""Dead elements under contractions: convolutions, products, einsum, attention, recurrent layers.

A contraction reads dead elements as 0; an element of its result is alive where the row, column or
slice that each operand gives it has anything alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruna_ir.masked_operators import (
    Handler,
    Masked,
    Operands,
    all_alive,
    lift,
    masked,
    tensors,
    uniform,
)

# -- products --------------------------------------------------------------------------------


def _matmul(operands: Operands) -> Masked:
    """[..., m, k] @ [..., k, n], alive at (m, n) where row m and column n are."""
    given = tensors(operands)
    a, b = (m.mask for m in given[-2:])
    result = lift(operands.call())
    a = a.unsqueeze(0) if (vector_a := a.dim() == 1) else a
    b = b.unsqueeze(-1) if (vector_b := b.dim() == 1) else b
    alive = a.any(-1, keepdim=True) & b.any(-2, keepdim=True)
    alive = alive.squeeze(-2) if vector_a else alive
    alive = alive.squeeze(-1) if vector_b else alive
    # addmm, baddbmm and addmv add their first operand.
    return masked(result, alive & given[0].mask if len(given) == 3 else alive)


def _product_of_groups(operands: Operands) -> Masked:
    """[rows, k] @ [groups, k, n]: all groups have the same columns."""
    columns = uniform(operands, operands["weight"].mask.any(1), [0])
    alive = operands["input"].mask.any(1, keepdim=True) & columns
    return masked(lift(operands.call()), alive)


def _linear(operands: Operands) -> Masked:
    alive = operands["input"].mask.any(-1, keepdim=True) & operands["weight"].mask.any(-1)
    if (bias := operands["bias"]) is not None:
        alive = alive & bias.mask
    return masked(lift(operands.call()), alive)


def _outer(operands: Operands) -> Masked:
    a, b = operands["self"].mask, operands["vec2"].mask
    return masked(lift(operands.call()), a[:, None] & b)


def _einsum(operands: Operands) -> Masked:
    """Alive where each operand has anything alive over the labels that are summed."""
    inputs, output = _labels(operands["equation"])
    reduced, kept = [], []
    for labels, operand in zip(inputs, operands["tensors"], strict=True):
        # Each label once: a repeated one takes the diagonal.
        rest = "".join(dict.fromkeys(c for c in labels.replace("...", "") if c in output))
        dots = "..." if "..." in labels and "..." in output else ""
        summed = torch.einsum(f"{labels}->{dots}{rest}", operand.mask.to(torch.float64))
        reduced.append((summed > 0).to(torch.float64))
        kept.append(dots + rest)
    alive = torch.einsum(f"{','.join(kept)}->{output}", *reduced)
    return masked(lift(operands.call()), alive > 0)


def _labels(equation: str) -> tuple[list[str], str]:
    """The labels of every operand and of the result; torch's default result is sorted."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        every = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(every) if every.count(c) == 1)
        )
    return inputs, right


def _bilinear(operands: Operands) -> Masked:
    """Alive at (..., o) where both rows are and the matrix o is, dead elements being 0."""
    a, b = (operands[name].mask.any(-1, keepdim=True) for name in ("input1", "input2"))
    alive = a & b & operands["weight"].mask.flatten(1).any(-1)
    if (bias := operands["bias"]) is not None:
        alive = alive & bias.mask
    return masked(lift(operands.call()), alive)


def _cdist(operands: Operands) -> Masked:
    """Distances of rows: coordinates that are dead in both count for nothing."""
    a, b = operands["x1"], operands["x2"]
    lines = [
        uniform(operands, m.mask | ~m.mask.any(-1, keepdim=True), range(m.value.dim() - 1))
        for m in (a, b)
    ]
    if not torch.equal(lines[0].flatten(), lines[1].flatten()) or float(operands["p"]) <= 0:
        raise operands.refuse("compares removed channels with others")
    alive = a.mask.any(-1).unsqueeze(-1) & b.mask.any(-1).unsqueeze(-2)
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
    passed = [] if transposed else _passed(operands, spatial)
    passed += [] if transposed or passed else _filtered(operands, spatial)
    free = {channel, *(channel + 1 + k for k in passed)}
    mixed = [d for d in range(x.value.dim()) if d not in free]
    alive = rows.view(-1, *[1] * spatial)
    places = uniform(operands, x.mask, mixed).any(channel, keepdim=True)
    if passed and bool(places.any()):
        alive = alive & places
    return masked(lift(operands.call()), alive)


def _passed(operands: Operands, spatial: int) -> list[int]:
    """The spatial dimensions along which a kernel of one element moves nothing."""

    def each(name: str) -> list[int]:
        given = operands[name]
        if isinstance(given, str):
            return [0] * spatial
        return list(given) * (spatial if len(given) == 1 else 1)

    sizes = operands["weight"].value.shape[2:]
    settings = zip(sizes, each("stride"), each("padding"), strict=True)
    return [k for k, setting in enumerate(settings) if tuple(setting) == (1, 1, 0)]


def _filtered(operands: Operands, spatial: int) -> list[int]:
    """The dimension along which one filter keeps each element in its place: those that are dead
    count as 0 for their neighbours, and stay dead."""
    alone = spatial == 1 and tuple(operands["weight"].value.shape[:2]) == (1, 1)
    alone = alone and list(operands["stride"]) == [1]
    result = operands.node.meta["val"].shape
    return [0] if alone and result[-1] == operands["input"].value.shape[-1] else []


def _attention(operands: Operands) -> Masked:
    """Heads live where query, key and value do; a dead head size adds 0 to the scores.

    The default scale is that of the full head size.
    """
    q, k, v = (operands[name].mask for name in ("query", "key", "value"))
    keys = uniform(operands, k.any(-1, keepdim=True), [-2])
    values = uniform(operands, v, [-2])
    if operands.get("enable_gqa"):
        times = q.shape[-3] // k.shape[-3]
        keys, values = (m.repeat_interleave(times, -3) for m in (keys, values))
    alive = q.any(-1, keepdim=True) & keys & values
    if (mask := operands["attn_mask"]) is not None and mask.alive is not None:
        alive = alive & uniform(operands, mask.mask, [-1])
    return masked(lift(operands.call()), alive)


# -- recurrent layers ------------------------------------------------------------------------


def _recurrent(gates: int) -> Handler:
    """LSTM (4 gates), GRU (3) or a plain recurrence (1): a dead hidden unit is 0 at every step.

    With the weights, biases and initial state of a unit at 0, an LSTM's unit has
    c = sigmoid(0) c + sigmoid(0) tanh(0) = 0 and h = 0, a GRU's h = 0.5 tanh(0) + 0.5 h = 0, and
    their columns of the recurrent weights read 0: the operator runs on zeros as it is.
    """

    def handler(operands: Operands) -> tuple[Masked, ...]:
        if operands.get("batch_sizes") is not None:
            raise operands.refuse("reads removed channels of a packed sequence")
        x, hx = operands["input"], operands["hx"]
        uniform(operands, x.mask, range(x.value.dim() - 1))
        units = _units(operands, gates)
        states = [_state(s, units) for s in (hx if isinstance(hx, (list, tuple)) else [hx])]
        changed = {
            "hx": states if isinstance(hx, (list, tuple)) else states[0],
            "params": _with_dead_units(operands, units, gates),
        }
        output, *last = operands.call(changed=changed)
        directions = 2 if operands["bidirectional"] else 1
        alive = torch.cat(list(units[-directions:]))
        return masked(lift(output), alive), *(_state(Masked(lift(s)), units) for s in last)

    return handler


def _step(gates: int) -> Handler:
    """One step of the same: `_recurrent` tells why a dead unit stays 0."""

    def handler(operands: Operands) -> Any:
        x, hx = operands["input"], operands["hx"]
        uniform(operands, x.mask, range(x.value.dim() - 1))
        given = {n: operands[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh") if operands[n]}
        units = _units_of(operands, list(given.values()), gates)
        states = [_state(s, units) for s in (hx if isinstance(hx, (list, tuple)) else [hx])]
        changed = {name: _rows(p, units.repeat(gates)) for name, p in given.items()}
        hx = states if isinstance(hx, (list, tuple)) else states[0]
        return all_alive(operands.call(changed={**changed, "hx": hx}), units)

    return handler


def _per_direction(operands: Operands) -> int:
    """The number of tensors of one direction of one layer."""
    number = 4 if operands["has_biases"] else 2
    directions = (2 if operands["bidirectional"] else 1) * operands["num_layers"]
    if len(operands["params"]) != number * directions:
        raise operands.refuse("reads removed channels and projects its hidden state")
    return number


def _units(operands: Operands, gates: int) -> Tensor:
    """Which hidden units are alive: [layers * directions, hidden]."""
    number, params = _per_direction(operands), operands["params"]
    units = []
    for start in range(0, len(params), number):
        units.append(_units_of(operands, params[start : start + number], gates))
    return torch.stack(units)


def _units_of(operands: Operands, parameters: Sequence[Masked], gates: int) -> Tensor:
    """Which hidden units of one direction of one layer are alive: [hidden]."""
    rows = torch.ones((), dtype=torch.bool)
    for parameter in parameters:
        mask = parameter.mask
        rows = rows & (mask.any(-1) if mask.dim() == 2 else mask)
    return uniform(operands, rows.view(gates, -1), [0])[0]


def _with_dead_units(operands: Operands, units: Tensor, gates: int) -> list[Masked]:
    """The parameters, everything of a dead unit at 0."""
    number, result = _per_direction(operands), []
    for index, parameter in enumerate(operands["params"]):
        result.append(_rows(parameter, units[index // number].repeat(gates)))
    return result


def _rows(parameter: Masked, alive: Tensor) -> Masked:
    """A matrix or a bias with other rows at 0."""
    alive = alive.unsqueeze(-1) if parameter.value.dim() == 2 else alive
    return masked(parameter.value, parameter.mask & alive)


def _state(state: Masked, units: Tensor) -> Masked:
    """A state, [layers * directions, (batch,) hidden], of the units that are alive."""
    alive = units.unsqueeze(1) if state.value.dim() == 3 else units
    return masked(state.value, state.mask & alive)


_CONVS: Sequence[str] = (
    "conv1d", "conv2d", "conv3d", "convolution",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
_PRODUCTS: Sequence[str] = (
    "matmul", "mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv",
)  # fmt: skip
_RECURRENT: dict[str, int] = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": _conv for name in _CONVS},
    **{f"aten::{name}": _matmul for name in _PRODUCTS},
    **{f"aten::{name}": _recurrent(gates) for name, gates in _RECURRENT.items()},
    **{f"aten::{name}_cell": _step(gates) for name, gates in _RECURRENT.items()},
    "transformers::grouped_mm_fallback": _product_of_groups,
    "aten::linear": _linear,
    "aten::einsum": _einsum,
    "aten::outer": _outer,
    "aten::ger": _outer,
    "aten::bilinear": _bilinear,
    "aten::cdist": _cdist,
    "aten::scaled_dot_product_attention": _attention,
}
"""Operator name without overload to what it computes where elements are dead."""

"""The activations that fused operators end in: ATen operators by name.

    none, relu, relu6, hardtanh (arguments [min, max]), leaky_relu ([slope]), hardswish, silu,
    sigmoid, gelu (exact), gelu_tanh, quick_gelu (x * sigmoid(1.702 x), CLIP's)

``REFERENCE`` is what each means; ``IN_PLACE`` computes the same in its operand's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pruna_ir.errors import UsageError

_aten = torch.ops.aten

QUICK_GELU_SLOPE = 1.702


def _quick_gelu(y: Any) -> Any:
    slope = _aten.sigmoid.default(_aten.mul.Tensor(y, QUICK_GELU_SLOPE))
    return _aten.mul.Tensor(y, slope)


def _quick_gelu_in_place(y: torch.Tensor) -> torch.Tensor:
    return y.mul_(torch.sigmoid_(y * QUICK_GELU_SLOPE))


REFERENCE: dict[str, Callable[..., Any]] = {
    "none": lambda y: y,
    "relu": _aten.relu.default,
    "relu6": lambda y: _aten.hardtanh.default(y, 0.0, 6.0),
    "hardtanh": lambda y, low, high: _aten.hardtanh.default(y, low, high),
    "leaky_relu": lambda y, slope: _aten.leaky_relu.default(y, slope),
    "hardswish": _aten.hardswish.default,
    "silu": _aten.silu.default,
    "sigmoid": _aten.sigmoid.default,
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda y: _aten.gelu.default(y, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}

IN_PLACE: dict[str, Callable[..., Any]] = {
    "none": lambda y: y,
    "relu": _aten.relu_.default,
    "relu6": lambda y: _aten.hardtanh_.default(y, 0.0, 6.0),
    "hardtanh": lambda y, low, high: _aten.hardtanh_.default(y, low, high),
    "leaky_relu": lambda y, slope: _aten.leaky_relu_.default(y, slope),
    "hardswish": _aten.hardswish_.default,
    "silu": _aten.silu_.default,
    "sigmoid": _aten.sigmoid_.default,
    "gelu": _aten.gelu_.default,
    "gelu_tanh": lambda y: _aten.gelu_.default(y, approximate="tanh"),
    "quick_gelu": _quick_gelu_in_place,
}

_ARGUMENTS = {"hardtanh": 2, "leaky_relu": 1}

ACTIVATIONS = tuple(REFERENCE)
"""Every name."""


def check_activation(
    operator: str, name: str, arguments: Sequence[float], names: Sequence[str] = ACTIVATIONS
) -> None:
    """Check an operator's activation.

    Raises:
        UsageError: it is none of ``names``, or has the wrong number of arguments.

    >>> check_activation("conv_act", "hardtanh", [0.0, 1.0])
    """
    if name not in names:
        raise UsageError(f"{operator} has no activation '{name}'; it has {', '.join(names)}")
    wanted = _ARGUMENTS.get(name, 0)
    if len(arguments) != wanted:
        raise UsageError(
            f"{operator}: {name} takes {wanted} numbers, but {len(arguments)} were given"
        )

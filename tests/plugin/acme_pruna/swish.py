"""The operator ``acme::swish``: a gate with a learned slope.

    y = x * sigmoid(beta * x)

``beta`` broadcasts against ``x``: [C, 1, 1] gives every channel of an image a slope of its own.
Source: Ramachandran et al., Searching for Activation Functions, 2017, section 3.

The kernel's reference says what the operator means in ATen operators: pruna-ir checks passes
against it in float64, and spells the operator out for backends that do not know it.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels.kernel import Kernel

_aten = torch.ops.aten


@torch.library.custom_op("acme::swish", mutates_args=())
def swish(x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(beta * x)``, broadcast.

    >>> swish(torch.tensor([0.0, 2.0]), torch.tensor(0.0))
    tensor([0., 1.])
    """
    return x * torch.sigmoid(beta * x)


@swish.register_fake
def _(x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x).add(torch.empty_like(beta))


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, beta = ctx.saved_tensors
    gate = torch.sigmoid(beta * x)
    slope = gate * (1 - gate)
    to_x, to_beta = grad * (gate + beta * x * slope), grad * x * x * slope
    return to_x.sum_to_size(x.shape), to_beta.sum_to_size(beta.shape)


torch.library.register_autograd("acme::swish", _gradients, setup_context=_save)


def swish_reference(x: Any, beta: Any) -> Any:
    """The operator's meaning in ATen operators."""
    return _aten.mul.Tensor(x, _aten.sigmoid.default(_aten.mul.Tensor(beta, x)))


KERNEL = Kernel(torch.ops.acme.swish.default, swish_reference)

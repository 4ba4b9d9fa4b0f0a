"""What every kernel module provides: an operator and its plain-PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kernel:
    """One operator of ours.

    Attributes:
        op: the registered operator, such as ``torch.ops.pruna.conv_act.default``.
        reference: the only ground truth: a function with the operator's argument names that calls
            ``torch.ops.aten`` operators alone and never branches on a tensor's value. It serves
            as float64 reference, as decomposition into a graph (it is traced with fx proxies),
            and as documentation.
        primitive: True where backends translate the operator itself (``fake_quant``) and it is
            therefore never decomposed.
        decomposition: what the operator becomes for a backend that does not know it, where that
            is another form than the reference: one ATen operator that backends have for it.
    """

    op: torch._ops.OpOverload
    reference: Callable[..., Any]
    primitive: bool = False
    decomposition: Callable[..., Any] | None = None


def differentiate_reference(name: str, reference: Callable[..., torch.Tensor]) -> None:
    """Give an operator the gradients of its reference, which is run again from the saved inputs.

    Args:
        name: the operator, such as ``pruna::conv_act``.
        reference: a function with the operator's arguments, differentiable as often as wanted.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(*[v if isinstance(v, torch.Tensor) else None for v in inputs])
        ctx.options = [None if isinstance(v, torch.Tensor) else v for v in inputs]

    def gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        values = [o if s is None else s for s, o in zip(saved, ctx.options, strict=True)]
        # Defaults that were not given have no entry.
        given = (*ctx.needs_input_grad, *[False] * len(values))
        needs = given[: len(values)]
        wanted = [value for value, needed in zip(values, needs, strict=True) if needed]
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            y = reference(*values)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=twice))
        return tuple(next(found) if needed else None for needed in needs)

    torch.library.register_autograd(name, gradients, setup_context=save)

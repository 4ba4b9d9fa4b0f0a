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

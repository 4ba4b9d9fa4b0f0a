"""What a pass states of its result: the effect it promises, oracles and assurances, remarks."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pruna_ir.context import Context
from pruna_ir.program import Program


class Effect(enum.Enum):
    """What a pass promises, and so which check the pipeline runs after it."""

    EXACT = "exact"
    """The same function, bit for bit."""
    ROUNDING = "rounding"
    """The same function over the real numbers; only rounding differs."""
    BOUNDED = "bounded"
    """An approximation within the pass's budget (`Pass.min_sqnr_db`)."""
    ORACLE = "oracle"
    """Another function, which the pass states exactly (`Rewrite.promise`)."""
    FITTED = "fitted"
    """Another function, fitted to the calibration data; what must hold of it on that data, the
    pass states as tests (`Rewrite.assure`)."""


@dataclass(frozen=True)
class Remark:
    """What a pass did, or did not do, to one node, and why."""

    pass_name: str
    kind: str
    """``"applied"``, ``"missed"`` (a near miss) or ``"note"``."""
    node: str
    message: str
    source: str
    """The user's source line, such as ``net.py:41``; empty where unknown."""

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.pass_name}: {self.kind}: {self.node}{where}: {self.message}"


Oracle = Callable[[Program, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
"""Maps the program before the pass, and inputs, to the float64 outputs that it must now have."""


@dataclass(frozen=True)
class Finding:
    """What a test of a FITTED pass found: ``measured`` must not be above ``limit`` (nor NaN)."""

    what: str
    measured: float
    limit: float


Assurance = Callable[[Program, Program, Context], Sequence[Finding]]
"""Tests a FITTED pass on the program before it, the one after it, and the context's data."""

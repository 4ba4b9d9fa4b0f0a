"""Passes: what they are, and how one is run.

A pass is a frozen dataclass whose fields are its options. It edits a fork of the program through
a `Rewrite`; `apply` runs it and returns the new program with its remarks. The pipeline checks
the promise that the pass's `Effect` states.

All that a pass needs can be imported from here; see `statements`, `context`, `rewrite` and
`dead_nodes` for what is only passed on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from pruna_ir.context import Context, Progress, no_progress
from pruna_ir.dead_nodes import is_pure, remove_dead_nodes
from pruna_ir.errors import PassError
from pruna_ir.program import Applied, Program
from pruna_ir.rewrite import COMPUTES, Rewrite
from pruna_ir.spec import print_pass
from pruna_ir.statements import Assurance, Effect, Finding, Oracle, Remark

__all__ = [
    "API_VERSION", "COMPUTES", "Assurance", "Context", "Effect", "Finding", "Oracle", "Pass",
    "PassResult", "Progress", "Remark", "Rewrite", "apply", "is_pure", "no_progress",
    "remove_dead_nodes",
]  # fmt: skip

API_VERSION = 1
"""The version of the pass and backend interfaces; a plugin states the one it was written for."""


@dataclass(frozen=True)
class Pass:
    """The base of every pass: subclass as a frozen dataclass whose fields are the options.

    Class attributes:
        name: the pass's name in pipeline text, a verb phrase such as ``fold-batch-norm``.
        effect: what the pass promises.
        min_sqnr_db: for BOUNDED passes, the lowest signal-to-quantisation-noise ratio (dB) of
            any output against the program before the pass.
        api_version: the version of this interface that the pass was written for.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    min_sqnr_db: ClassVar[float] = 20.0
    api_version: ClassVar[int] = API_VERSION

    @property
    def depends_on_target(self) -> bool:
        """Whether the result differs between targets: an option ``target`` was left empty."""
        return getattr(self, "target", None) == ""

    def rewrite(self, rw: Rewrite) -> None:
        """Edit the program under ``rw``. Guards first: match, check, rewrite, or ``rw.skip``."""
        raise TypeError(f"{type(self).__name__} must define rewrite(); it was given {rw}")


@dataclass(frozen=True)
class PassResult:
    """What one run of one pass did.

    ``modified`` compares structural hashes: it never relies on the pass's word. ``exact`` holds
    the float64 values, by name, of the tensors that the pass computed and rounded.
    """

    program: Program
    remarks: tuple[Remark, ...]
    modified: bool
    seconds: float
    oracle: Oracle | None = field(default=None, repr=False)
    exact: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    assurances: tuple[Assurance, ...] = field(default=(), repr=False)


def apply(
    pass_: Pass, program: Program, context: Context | None = None, *, scope: Sequence[str] = ()
) -> PassResult:
    """Run one pass; the program given stays as it is.

    Raises:
        PassError: the pass refuses the program, or an ORACLE or FITTED pass changed it without
            stating what holds of the result.
    """
    start = time.perf_counter()
    rw = Rewrite(program, pass_.name, context or Context(), scope)
    pass_.rewrite(rw)
    after = rw.finish()
    before_hash, after_hash = program.hash(), after.hash()
    modified = before_hash != after_hash
    if modified and pass_.effect is Effect.ORACLE and rw.oracle is None:
        raise PassError(f"{pass_.name} changed the function without stating what it now computes")
    if modified and pass_.effect is Effect.FITTED and not rw.assurances:
        raise PassError(f"{pass_.name} changed the function without stating what holds of it")
    if modified:
        after = after.with_history(Applied(print_pass(pass_), before_hash, after_hash))
    seconds = time.perf_counter() - start
    return PassResult(
        after if modified else program, tuple(rw.remarks), modified, seconds, rw.oracle, rw.exact,
        tuple(rw.assurances),
    )  # fmt: skip

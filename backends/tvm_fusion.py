"""From TVM's operators to functions of loops, neighbours in one, weight preparation apart.

    operators -> simple operators -> (rewrites of ours) -> loops -> main, transform -> fused loops

Processors and GPUs share these steps; schedules of each follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruna_ir.backends.tvm_runtime import ENTRY, TRANSFORM


def fused_loops(*rewrites: Any, legal: Mapping[str, Any] | None = None) -> list[Any]:
    """The passes over a module, in order.

    Args:
        rewrites: passes that replace operators before they become loops.
        legal: by operator, what gives its loops; TVM's own for all others.
    """
    from tvm import relax

    t = relax.transform
    entries = [ENTRY, TRANSFORM]
    return [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        t.DecomposeOpsForInference(),
        t.CanonicalizeBindings(),
        *rewrites,
        t.LegalizeOps(dict(legal or {})),
        t.LiftTransformParams(),
        t.DeadCodeElimination(entries),
        t.AnnotateTIROpPattern(),
        t.FoldConstant(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(entries),
    ]

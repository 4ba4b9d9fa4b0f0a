"""Decomposition: fused operators of ours replaced by their references, for backends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program
from pruna_ir.registry import kernels
from pruna_ir.transform import Context, Rewrite


def decompose(program: Program, *, keep: Collection[Any] = ()) -> Program:
    """The program with every fused operator spelt out in ATen operators.

    Primitive kernels (``fake_quant``) and the operators in ``keep`` stay as they are.
    """
    rw = Rewrite(program, "decompose", Context())
    known = kernels()
    fused = [op for op, kernel in known.items() if not kernel.primitive and op not in keep]
    for node in list(rw.program.calls(*fused)) if fused else []:
        kernel = known[node.target]
        rw.inline(node, kernel.decomposition or kernel.reference, bind_arguments(node))
    return rw.finish()

"""Which nodes of a program ``torch.onnx`` can translate, found out before anything is exported.

``torch.onnx`` publishes no list of what it supports. Its registry of translations and the
decompositions that it applies are read from the modules that ``torch.onnx.export`` itself uses;
they are private, so a torch that moves them shows in this file's tests and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pruna_ir.lowering import Offender
from pruna_ir.onnx_translations import translations
from pruna_ir.program import Program
from pruna_ir.reexport import origins, reexport
from pruna_ir.registry import kernels


def onnx_unsupported(program: Program) -> list[Offender]:
    """Every node for which ``torch.onnx`` has no translation, also after its decompositions.

    The program is only decomposed where some operator has no translation of its own.
    """
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry = ONNXRegistry.from_torchlib()
    for target, translation in translations().items():
        registry.register_op(target, translation)
    if all(_is_translated(node, registry) for node in program.calls()):
        return []
    implemented = set(_decomp.get_onnx_implemented_overloads(registry))
    table = _decomp.create_onnx_friendly_decomposition_table(implemented)
    graph = reexport(program).run_decompositions(table).graph
    behind = origins(program, graph)
    found: dict[tuple[str, str], Offender] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _is_translated(node, registry):
            origin = behind.get(node.name, node)
            same = origin.target is node.target
            through = "" if same else f" ({origin.target} decomposes into {node.target})"
            offender = Offender.of(origin, f"torch.onnx has no translation for it{through}")
            found.setdefault((offender.node, offender.reason), offender)
    return list(found.values())


def _is_translated(node: fx.Node, registry: Any) -> bool:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target is torch.ops.aten._assert_tensor_metadata.default:
            # States what the exported graph knows anyway; torch.onnx drops it.
            return True
        kernel = kernels().get(target)
        return registry.is_registered(target) or (kernel is not None and kernel.primitive)
    return getattr(target, "__module__", "") in ("_operator", "math")

"""The verifier: the rules that every Program obeys, checked after capture and after each pass.

1. ``graph.lint`` holds: definitions before uses, unique names.
2. Nodes are placeholders, get_attr of existing tensors, operator calls, and one output.
3. Called functions are operators with a schema, ``getitem``, or arithmetic on symbolic sizes.
4. Placeholders and results match the input and output specs.
5. Every node's shape and dtype equal a fresh propagation.
6. Parameters and buffers hold no NaN.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from pruna_ir.errors import InvalidIRError
from pruna_ir.printer import print_node
from pruna_ir.program import Program, TensorSpec
from pruna_ir.propagate import fake_mode, propagated, same_value
from pruna_ir.tensor_cache import TensorCache

SIZE_ARITHMETIC = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv,
        operator.mod, operator.neg, operator.pow, operator.getitem,
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not,
        torch.sym_ite, torch.sym_sum, math.ceil, math.floor,
    }
)  # fmt: skip


def verify(program: Program) -> None:
    """Check every rule of the IR.

    Raises:
        InvalidIRError: a rule is broken; the message names the rule's node and the fact.
    """
    try:
        program.graph.lint()
    except Exception as error:
        raise InvalidIRError(f"the graph is not well formed: {error}") from error
    for node in program.graph.nodes:
        _check_node(program, node)
    _check_specs(program)
    _check_values(program)


def _check_node(program: Program, node: fx.Node) -> None:
    if node.op == "call_function":
        known = isinstance(node.target, torch._ops.OpOverload) or node.target in SIZE_ARITHMETIC
        if not known:
            raise InvalidIRError(f"{node.name}: {node.target} is not an operator of the IR")
    elif node.op == "get_attr":
        tensor = program.tensor(str(node.target))
        if has_nan(tensor):
            raise InvalidIRError(f"{node.target} holds NaN, which no pass can preserve")
    elif node.op not in ("placeholder", "output"):
        raise InvalidIRError(f"{node.name}: a {node.op} node is not part of the IR")


has_nan = TensorCache(lambda tensor: bool(torch.isnan(tensor).any()))
"""Whether a tensor holds NaN (infinities are legal: masks hold them)."""


def _check_specs(program: Program) -> None:
    placeholders = program.placeholders()
    if len(placeholders) != len(program.inputs):
        raise InvalidIRError(
            f"{len(placeholders)} placeholders, but {len(program.inputs)} input specs"
        )
    if len(program.results()) != len(program.outputs):
        raise InvalidIRError(
            f"{len(program.results())} results, but {len(program.outputs)} output specs"
        )
    for node, spec in zip(program.results(), program.outputs, strict=True):
        _check_spec(node, spec)


def _check_spec(node: fx.Node, spec: TensorSpec) -> None:
    value = node.meta["val"]
    static = [s if isinstance(s, int) else None for s in value.shape]
    declared = [s if isinstance(s, int) else None for s in spec.shape]
    if value.dtype != spec.dtype or static != declared:
        raise InvalidIRError(
            f"output {spec} is computed as {value.dtype}{list(value.shape)} by "
            f"\n  {print_node(node)}"
        )


def _check_values(program: Program) -> None:
    mode = fake_mode(program)
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise InvalidIRError(f"{node.name} has no meta['val']")
        fresh = propagated(program, node, mode)
        if not same_value(node.meta["val"], fresh):
            raise InvalidIRError(
                f"{node.name} claims to be {_describe(node.meta['val'])}, but computes "
                f"{_describe(fresh)}\n  {print_node(node)}"
            )


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_describe, value))})"
    return str(value)

"""Symbolic sizes: a graph's shapes propagated afresh from what a file says of its inputs.

Dimensions are symbols of a new shape environment, with the hints and ranges that the file states;
sizes such as ``2*batch + 1`` are parsed as arithmetic and never executed.
"""

from __future__ import annotations

import ast
import hashlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from pruna_ir.errors import CaptureError
from pruna_ir.program import Program
from pruna_ir.propagate import propagated


def propagate_from_specs(program: Program, symbols: Mapping[str, Mapping[str, Any]]) -> None:
    """Give every node of a fresh graph its ``meta["val"]``."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = {name: _symbol(mode, name, facts) for name, facts in symbols.items()}
    if len(program.inputs) != len(program.placeholders()):
        raise CaptureError("the inputs and the placeholders of the graph differ in number")
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        shape = [s if isinstance(s, int) else evaluate_size(s, sizes) for s in spec.shape]
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=spec.dtype)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta["val"] = propagated(program, node, mode)


def _symbol(mode: FakeTensorMode, name: str, facts: Mapping[str, Any]) -> torch.SymInt:
    env = mode.shape_env
    assert env is not None
    hint = max(2, int(facts["hint"] or 2))
    source = ConstantSource(_source_name(name, str(facts["symbol"])))
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    torch._check(size >= int(facts["lower"]))
    if facts["upper"] is not None:
        torch._check(size <= int(facts["upper"]))
    return size


def _source_name(name: str, symbol: str) -> str:
    """A name for a dimension from which torch makes the given symbol again.

    torch numbers symbols by a hash of their source modulo 100; equal symbols keep sums and
    products in the order in which they were printed before. Where torch numbers them otherwise,
    only that order may differ.
    """
    number = symbol.removeprefix("s")
    candidates = (f"{name}_{i}" for i in range(5000))
    if not number.isdigit():
        return next(candidates)
    return next(
        candidate
        for candidate in candidates
        if int(hashlib.sha256(candidate.encode()).hexdigest(), 16) % 100 == int(number) % 100
    )


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate_size(text: str, sizes: Mapping[str, Any]) -> Any:
    """The value of a size expression such as ``2*batch + 1``; parsed, never executed.

    Raises:
        CaptureError: the expression has parts other than dimensions, integers and arithmetic.

    >>> evaluate_size("2*batch + 1", {"batch": 4})
    9
    """
    return _evaluate(ast.parse(text, mode="eval").body, text, sizes)


def _evaluate(node: ast.expr, text: str, sizes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, text, sizes)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_evaluate(side, text, sizes) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    raise CaptureError(f"size {text!r} is not made of dimensions, integers and arithmetic")

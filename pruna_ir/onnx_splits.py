"""Splits along dynamic dimensions as slices, with bounds that are computed from the sizes at hand.

    chunk(x, c, d)  -->  x[0:s], x[s:2s], ..., x[(c-1)s:]       s = ceil(size(x, d) / c)

and likewise for ``split``, where s is given. ``torch.onnx`` writes a ``SplitToSequence`` for
both, which ONNX Script's optimiser fails on where s is computed. Splits along a static dimension,
and into parts whose sizes are listed one by one, become ``Split`` and are left as they are.

Limit: the number of parts is the captured one, as it is in the program.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program, shape_of
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten

_SPLITS = (aten.chunk.default, aten.split.Tensor)
_TO_THE_END = torch.iinfo(torch.int64).max


def with_plain_splits(program: Program) -> Program:
    """The program with slices for chunks along dynamic dimensions; unchanged without any.

    A split whose list of parts is read otherwise than part by part is left as it is.
    """
    found = [node for node in program.calls(*_SPLITS) if _is_dynamic(node) and _is_unpacked(node)]
    if not found:
        return program
    rw = Rewrite(program, "onnx", Context())
    names = {node.name for node in found}
    for node in [node for node in rw.calls(*_SPLITS) if node.name in names]:
        _slice(rw, node)
    return rw.finish()


def _is_dynamic(node: fx.Node) -> bool:
    arguments = bind_arguments(node)
    shape = shape_of(arguments["self"]) or ()
    return bool(shape) and not isinstance(shape[arguments["dim"]], int)


def _is_unpacked(node: fx.Node) -> bool:
    return all(reader.target is operator.getitem for reader in node.users)


def _slice(rw: Rewrite, node: fx.Node) -> None:
    arguments = bind_arguments(node)
    bounds = _bounds(rw, node, arguments)
    for reader in list(node.users):
        part = range(len(bounds) - 1)[reader.args[1]]  # type: ignore[index]
        start, end = bounds[part : part + 2]
        piece = rw.insert(
            aten.slice.Tensor, before=reader, like=node,
            self=arguments["self"], dim=arguments["dim"], start=start, end=end,
        )  # fmt: skip
        rw.replace(reader, piece)
    rw.erase(node)


def _bounds(rw: Rewrite, node: fx.Node, arguments: dict[str, Any]) -> list[Any]:
    """Where the parts begin, and the end: integers, or nodes that compute them."""
    part = arguments["split_size"] if "split_size" in arguments else _part(rw, node, arguments)
    bounds: list[Any] = [0]
    for _ in node.meta["val"][1:]:
        bounds.append(_sum(rw, node, bounds[-1], part))
    return [*bounds, _TO_THE_END]


def _part(rw: Rewrite, node: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    """The size of a chunk: ``(size + chunks - 1) // chunks``."""
    x, chunks = arguments["self"], arguments["chunks"]
    size = rw.insert(aten.sym_size.int, before=node, like=node, self=x, dim=arguments["dim"])
    padded = _sum(rw, node, size, chunks - 1)
    return rw.insert_function(operator.floordiv, padded, chunks, before=node, like=node)


def _sum(rw: Rewrite, node: fx.Node, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return a or b
    return rw.insert_function(operator.add, a, b, before=node, like=node)

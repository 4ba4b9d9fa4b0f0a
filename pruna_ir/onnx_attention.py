"""Attention spelt out so that ONNX Runtime recognises it.

    attention(q, k, v, mask)  -->  softmax(q @ transpose(k, -2, -1) * scale + mask) @ v

``torch.onnx`` spells it out too, but finds the order of the key's dimensions at run time, by
shape arithmetic and two reshapes, and scales query and key apart: ONNX Runtime neither fuses that
transpose into its product nor leaves it out. As there, rows that a mask hides wholly give zeros.

Causal attention, dropout, queries that share keys and sizes unknown at export are left to
``torch.onnx``, in the form that it takes: four dimensions, and a result of no special layout.

    q, k, v [batch, *heads, tokens, size]
      -->
    unflatten(attention(flatten(q), flatten(k), flatten(v)))      with the heads in one dimension

Attention over [batch, tokens, size] gets a head dimension of one. A mask is merged alike; where
its head dimensions are others than the query's, ``torch.onnx`` refuses the node by its name.

A fused attention kernel returns its result in another memory layout than the operators that
``torch.onnx`` decomposes it into. Views behind it that were chosen for the one layout fail on the
other, so its result is made contiguous (an Identity in ONNX, which is optimised away).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program, shape_of
from pruna_ir.registry import kernels
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_FUSED = "pruna.attention.default"


def with_plain_attention(program: Program) -> Program:
    """The program with every attention in that form; the same program where there is none."""
    if not any(program.calls(_ATTENTION)):
        return program
    rw = Rewrite(program, "onnx", Context())
    for node in rw.calls(_ATTENTION):
        arguments = bind_arguments(node)
        _make_contiguous(rw, node)
        if is_plain_attention(arguments):
            rw.inline(node, *_spelt_out(arguments))
        elif not _fits(arguments):
            _merge_heads(rw, node, arguments)
    return rw.finish()


def is_plain_attention(arguments: dict[str, Any]) -> bool:
    """Whether it is one softmax over all keys of every query's own head."""
    shape = shape_of(arguments["query"]) or ()
    special = arguments["is_causal"] or arguments["dropout_p"] or arguments["enable_gqa"]
    return not special and len(shape) > 1 and isinstance(shape[-1], int)


def _spelt_out(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The function that spells attention out, the reference of the kernel, and its arguments."""
    size = (shape_of(arguments["query"]) or ())[-1]
    scale = arguments["scale"]
    operands = {name: arguments[name] for name in ("query", "key", "value")}
    (reference,) = (k.reference for op, k in kernels().items() if str(op) == _FUSED)
    factor = 1.0 / math.sqrt(int(size)) if scale is None else float(scale)
    mask = arguments["attn_mask"]
    return reference, {**operands, "mask": mask, "causal": False, "scale": factor}


def _make_contiguous(rw: Rewrite, node: fx.Node) -> None:
    readers = list(node.users)
    copy = rw.insert(
        aten.clone.default, before=node.next, like=node, self=node,
        memory_format=torch.contiguous_format,
    )  # fmt: skip
    for reader in readers:
        rw.redirect(reader, {node: copy})


def _fits(arguments: dict[str, Any]) -> bool:
    """Whether ``torch.onnx`` takes it, or it cannot be brought into that form."""
    query, key, value = (shape_of(arguments[name]) or () for name in ("query", "key", "value"))
    mask = arguments["attn_mask"]
    return (
        len(query) == 4
        or not query[1:-2] == key[1:-2] == value[1:-2]
        or any(not isinstance(size, int) for size in query[1:-2])
        or (mask is not None and not _mergeable(shape_of(mask) or (), query))
    )


def _mergeable(mask: Sequence[Any], query: Sequence[Any]) -> bool:
    """Whether a mask's head dimensions can be merged like the query's."""
    if len(mask) <= 2:
        return True
    heads = tuple(mask[1:-2])
    return len(mask) == len(query) and (heads == query[1:-2] or all(s == 1 for s in heads))


def _merge_heads(rw: Rewrite, node: fx.Node, arguments: dict[str, Any]) -> None:
    heads = (shape_of(arguments["query"]) or ())[1:-2]

    mask = arguments["attn_mask"]
    names = ["query", "key", "value"]
    names += ["attn_mask"] if mask is not None and len(shape_of(mask) or ()) > 2 else []

    def attention(**given: Any) -> Any:
        for name in names:
            given[name] = (
                aten.unsqueeze.default(given[name], 1)
                if not heads
                else aten.flatten.using_ints(given[name], 1, -3)
            )
        result = _ATTENTION(**given)
        if not heads:
            return aten.squeeze.dim(result, 1)
        return aten.unflatten.int(result, 1, list(heads))

    rw.inline(node, attention, arguments)

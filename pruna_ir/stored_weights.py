"""Fake-quants as backends want them: constants to round, and constant grids.

    fake_quant(reshape(@W, [-1, 32]), @s, @z, 0, ...)   -->   fake_quant(@W', @s, @z, 0, ...)

Weights quantised by blocks are seen as rows of blocks through views of the parameter. Backends
want the rows themselves, in order to store them as integers: `with_stored_weights` evaluates what
depends on constants alone. Readers behind the fake-quant stay as they are.

    fake_quant(x, s, z)   -->   (clamp(round(x / s) + z) - z) * s       where s or z is computed

Of all backends only ONNX has a quantiser that computes its grid (dynamic quantisation);
`with_plain_ranges` spells such a fake-quant out for the others.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.program import Program, computed_nodes
from pruna_ir.quantization import fake_quant_op
from pruna_ir.registry import kernels
from pruna_ir.transform import Context, Rewrite


def with_stored_weights(program: Program) -> Program:
    """The program with a constant as ``x`` of every fake-quant that depends on constants only."""
    op = fake_quant_op()
    computed = computed_nodes(program)
    rw = Rewrite(program, "stored-weights", Context())
    known = {node.name for node in computed}
    for node in rw.calls(op):
        source = Call(rw.program, node).producer("x")
        if source is None or source.op == "get_attr" or source.name in known:
            continue
        value = evaluated(rw.program, source)
        rw.update(node, x=rw.constant(value, stored_name(source), before=node))
    return rw.finish()


def with_plain_ranges(program: Program, keep: Collection[Any] = ()) -> Program:
    """The program with plain arithmetic for every fake-quant whose grid depends on an input.

    One whose scale an operator in ``keep`` computes stays.
    """
    kernel = kernels()[fake_quant_op()]
    rw = Rewrite(program, "plain-ranges", Context())
    computed = computed_nodes(rw.program)
    for node in rw.calls(kernel.op):
        bound = bind_arguments(node)
        depends = any(bound[key] in computed for key in ("scale", "zero_point"))
        if depends and bound["scale"].target not in keep:
            rw.inline(node, kernel.reference, bound)
    return rw.finish()


def stored_name(node: fx.Node) -> str:
    """The name of the first tensor that a constant expression reads."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def evaluated(program: Program, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on the program's tensors only, contiguous."""

    def value(current: fx.Node) -> Any:
        if current.op == "get_attr":
            return program.tensor(str(current.target)).detach()
        args, kwargs = fx.map_arg((current.args, current.kwargs), value)
        target: Any = current.target
        return target(*args, **kwargs)

    with torch.no_grad():
        result: torch.Tensor = value(node)
        return result.detach().contiguous()

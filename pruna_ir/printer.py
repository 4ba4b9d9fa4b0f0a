"""Stable, diffable text of a Program; the form that goldens, diffs and error messages use.

One line a node: ``%name = aten.conv2d(%x, @conv1.weight, stride=[2, 2]) : float32[batch, 64]``.
Parameters appear as ``@dotted.name`` and are listed at the end with shape and dtype; arguments
at their default are left out; the first argument and tensor arguments are positional.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments, unbind_arguments
from pruna_ir.program import Program, source_line


def print_program(program: Program, *, sources: bool = False) -> str:
    """The program as text, ending with a newline; ``sources`` appends the user's source lines."""
    names = dim_names(program)
    lines = [f"program({', '.join(map(str, program.inputs))}) {{"]
    for node in program.graph.nodes:
        if node.op == "call_function":
            where = f"  # {source_line(node)}" if sources and source_line(node) else ""
            lines.append(f"  {_rename(print_node(node), names)}{where}")
    results = ", ".join(
        f"{spec.name}={_argument(node)}"
        for spec, node in zip(program.outputs, program.results(), strict=True)
    )
    lines += [f"  return {results}", "}"]
    lines += [
        f"@{name}: {_type(tensor)}" for name, tensor in sorted(program.tensors().items())
    ]
    return "\n".join(lines) + "\n"


def dim_names(program: Program) -> dict[str, str]:
    """The symbol behind each named dynamic dimension, such as ``{"s77": "batch"}``."""
    return {
        str(size): name
        for node, spec in zip(program.placeholders(), program.inputs, strict=True)
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True)
        if isinstance(name, str)
    }


def _rename(text: str, names: dict[str, str]) -> str:
    head, separator, kind = text.rpartition(" : ")
    for symbol, name in names.items():
        kind = re.sub(rf"\b{symbol}\b", name, kind)
    return f"{head}{separator}{kind}"


def print_node(node: fx.Node) -> str:
    """One node as text, with its result type where it is known."""
    value = node.meta.get("val")
    kind = f" : {_type(value)}" if isinstance(value, torch.Tensor) else ""
    return f"%{node.name} = {_call(node)}{kind}"


def _call(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        name = getattr(node.target, "__name__", str(node.target))
        return f"{name}({', '.join(_argument(a) for a in node.args)})"
    args, kwargs = unbind_arguments(node.target, bind_arguments(node))
    names = [a.name for a in node.target._schema.arguments]
    shown = [
        _argument(arg) if position == 0 or isinstance(arg, fx.Node) else f"{name}={_argument(arg)}"
        for position, (name, arg) in enumerate(zip(names, args, strict=False))
        if arg is not None
    ]
    shown += [f"{name}={_argument(value)}" for name, value in kwargs.items()]
    overload = str(node.target).removesuffix(".default")
    return f"{overload}({', '.join(shown)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "placeholder":
            # fx renames inputs that shadow a Python builtin; their targets keep the given name.
            return f"%{value.target}"
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value)


def _type(value: torch.Tensor) -> str:
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"

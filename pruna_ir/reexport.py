"""Re-export: from a Program back to a ``torch.export.ExportedProgram``, for backends.

Backends import ``ExportedProgram``s. A Program's graph may hold fused operators of ours and was
rewritten since its capture, so it is decomposed and exported again: one call, one form for all
backends. ``torch.export`` assumes that a dimension of size 1 is constant, therefore examples are
repeated to size 2 wherever the program leaves a dimension open.

The placeholders keep the names of ``program.inputs``; outputs come in the order of
``program.outputs`` (an ExportedProgram has no names of its own for them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from pruna_ir.decompose import decompose
from pruna_ir.errors import LoweringError, UsageError
from pruna_ir.program import DimRange, Program, TensorSpec, module_path
from pruna_ir.stored_weights import with_plain_ranges, with_stored_weights

BATCH = "batch"


def reexport(
    program: Program,
    *,
    fixed_batch: int | None = None,
    fixed: Mapping[str, int] | None = None,
    keep: Collection[Any] = (),
) -> torch.export.ExportedProgram:
    """The program as an ExportedProgram of ATen operators and primitive kernels.

    Args:
        program: what to export.
        fixed_batch: give dimension ``batch`` this size; short for ``fixed={"batch": n}``.
        fixed: sizes for dynamic dimensions that are to become static.
        keep: fused operators that the backend translates itself.

    Dimensions that stay dynamic keep their ranges.

    Raises:
        UsageError: a name in ``fixed`` is no dynamic dimension, or its size is out of range.
        LoweringError: ``torch.export`` refuses the graph, or fixes a dimension that the program
            leaves open.

    >>> from pruna_ir.capture import capture
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    >>> [list(t.shape) for t in reexport(program, fixed_batch=4).example_inputs[0]]
    [[4, 3]]
    """
    sizes = _fixed_sizes(program, fixed_batch, fixed or {})
    flat = with_stored_weights(decompose(with_plain_ranges(program, keep), keep=keep))
    examples = example_inputs(program, sizes)
    shapes = tuple(
        {axis: torch.export.Dim.AUTO for axis, _ in _open_axes(spec, sizes)}
        for spec in program.inputs
    )
    try:
        with torch.no_grad():
            exported = torch.export.export(flat.module, examples, dynamic_shapes=shapes)
    except Exception as error:
        first = "\n  ".join(str(error).strip().splitlines()[:6])
        raise LoweringError(f"the program cannot be exported again: {first}") from error
    _restore_ranges(program, exported, sizes)
    return exported


def example_inputs(
    program: Program, fixed: Mapping[str, int] | None = None
) -> tuple[torch.Tensor, ...]:
    """The program's examples at the sizes of ``fixed``, and at 2 or more in every open dimension.

    Values are the examples' own, repeated or cut.
    """
    sizes = dict(fixed or {})
    for spec, example in zip(program.inputs, program.examples, strict=True):
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size.isidentifier():
                lower = program.dims.get(size, DimRange(1)).lower
                sizes.setdefault(size, max(example.shape[axis], lower, 2))
    return tuple(
        resized(example, spec, sizes)
        for spec, example in zip(program.inputs, program.examples, strict=True)
    )


def resized(
    example: torch.Tensor, spec: TensorSpec, sizes: Mapping[str, int]
) -> torch.Tensor:
    """An input at other sizes of its dynamic dimensions, its values repeated or cut.

    Raises:
        UsageError: there is no value to repeat.
    """
    for axis, size in enumerate(spec.shape):
        wanted = sizes.get(size) if isinstance(size, str) else None
        if wanted is None or wanted == example.shape[axis]:
            continue
        if example.shape[axis] == 0:
            raise UsageError(f"the example of input {spec.name} is empty in dimension {axis}")
        index = torch.arange(wanted, device=example.device) % example.shape[axis]
        example = example.index_select(axis, index)
    return example


def _fixed_sizes(
    program: Program, fixed_batch: int | None, fixed: Mapping[str, int]
) -> dict[str, int]:
    sizes = dict(fixed)
    if fixed_batch is not None and BATCH in program.dims:
        sizes[BATCH] = fixed_batch
    for name, size in sizes.items():
        if name not in program.dims:
            known = ", ".join(program.dims) or "none"
            raise UsageError(f"no dynamic dimension is named {name!r}; the program has {known}")
        bounds = program.dims[name]
        if size < bounds.lower or (bounds.upper is not None and size > bounds.upper):
            raise UsageError(
                f"dimension {name} cannot be {size}: its range is [{bounds.lower}, {bounds.upper}]"
            )
    return sizes


def _open_axes(spec: TensorSpec, fixed: Mapping[str, int]) -> list[tuple[int, str]]:
    return [
        (axis, size)
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str) and size not in fixed
    ]


def _restore_ranges(
    program: Program, exported: torch.export.ExportedProgram, fixed: Mapping[str, int]
) -> None:
    """Check that what the program leaves open is open, and state its ranges.

    ``torch.export`` states a lower bound of 2 wherever its example had at least 2.
    """
    names = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.find_nodes(op="placeholder") if n.name in names]
    for node, spec in zip(nodes, program.inputs, strict=True):
        for axis, name in _open_axes(spec, fixed):
            size = node.meta["val"].shape[axis]
            if isinstance(size, int):
                raise LoweringError(
                    f"torch.export fixes dimension {name} of input {spec.name} to {size}; lower "
                    "with that dimension fixed"
                )
            symbol = size.node.expr
            if name in program.dims and symbol in exported.range_constraints:
                bounds, known = program.dims[name], exported.range_constraints[symbol]
                upper = known.upper if bounds.upper is None else bounds.upper
                exported.range_constraints[symbol] = type(known)(bounds.lower, upper)


def origins(program: Program, graph: fx.Graph) -> dict[str, fx.Node]:
    """The program's call behind each node of a graph that was exported or decomposed from it.

    Nodes that no call of the program stands behind are left out. Names are given anew at every
    export, so a name counts only where the user's module is the same.
    """
    ours = {node.name: node for node in program.calls()}
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for name in _ancestry(node):
            if name in ours and module_path(ours[name]) in (module_path(node), ""):
                found[node.name] = ours[name]
    return found


def _ancestry(node: fx.Node) -> Iterator[str]:
    """A node's name and those of the nodes that it was made from, newest first."""
    yield node.name
    sources = list(node.meta.get("from_node") or [])
    while sources:
        source = sources.pop()
        yield source.name
        sources += source.from_node

"""Capture: from an ``nn.Module`` and example inputs to a Program, through ``torch.export``."""

from __future__ import annotations

import inspect
import io
import linecache
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pruna_ir.errors import CaptureError
from pruna_ir.program import DimRange, Program, TensorSpec
from pruna_ir.regions import inline_regions
from pruna_ir.verify import verify

BATCH = "batch"


def capture(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_dims: Mapping[str, Mapping[int, str]] | None = None,
    train: bool = False,
) -> Program:
    """Capture a module as a Program.

    Args:
        module: the model; it is captured in eval mode unless ``train``, and left as it was.
        args: example inputs: tensors, or containers of tensors; other values are baked in.
        kwargs: example keyword inputs.
        dynamic_batch: let dimension 0 of every tensor input vary, where the model allows it. An
            example batch of 1 is doubled, since ``torch.export`` would specialise it.
        dynamic_dims: further dynamic dimensions: input name -> {dimension: name}.
        train: capture in training mode.

    Raises:
        CaptureError: the model cannot be captured; the message names the user's source line.

    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
    >>> print(program.inputs[0], "->", program.outputs[0])
    input: float32[batch, 3] -> output: float32[batch, 2]
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    named = _named_leaves(module, args, kwargs)
    if not any(isinstance(value, torch.Tensor) for value in named.values()):
        raise CaptureError("capture needs at least one example input that is a tensor")
    _check_requests(named, dynamic_dims or {})
    with _mode(module, train=train):
        program = _export(module, args, kwargs, named, dynamic_batch, dynamic_dims or {})
    verify(program)
    return program


def _named_leaves(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The leaves of the example inputs, in order, by the names of ``forward``'s parameters."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    variadic = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    roots = [
        names[i] if i < len(names) and not variadic else f"input_{i}" for i in range(len(args))
    ]
    leaves: dict[str, Any] = {}
    for root, value in [*zip(roots, args, strict=True), *kwargs.items()]:
        for path, leaf in pytree.tree_leaves_with_path(value):
            leaves[root + "".join(f"_{_key(k)}" for k in path)] = leaf
    return leaves


def _key(entry: Any) -> str:
    """One step of a pytree path as part of a name."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _check_requests(
    named: Mapping[str, Any], dynamic_dims: Mapping[str, Mapping[int, str]]
) -> None:
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    for name, dims in dynamic_dims.items():
        if name not in tensors:
            raise CaptureError(
                f"dynamic dimensions were asked for input {name!r}; the tensor inputs are "
                f"{', '.join(tensors)}"
            )
        for axis in dims:
            if not 0 <= axis < tensors[name].dim():
                raise CaptureError(f"input {name} has no dimension {axis} to make dynamic")
            if tensors[name].shape[axis] < 2 and axis != 0:
                raise CaptureError(
                    f"dimension {axis} of input {name} is {tensors[name].shape[axis]} in the "
                    "example; give an example with at least 2 there, so that it can be dynamic"
                )


@contextmanager
def _mode(module: torch.nn.Module, *, train: bool) -> Iterator[None]:
    """The module in train or eval mode, every submodule's own flag restored afterwards."""
    flags = [(child, child.training) for child in module.modules()]
    module.train(train)
    try:
        yield
    finally:
        for child, flag in flags:
            child.training = flag


def _export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    named: dict[str, Any],
    dynamic_batch: bool,
    dynamic_dims: Mapping[str, Mapping[int, str]],
) -> Program:
    asked = {name: dict(dynamic_dims.get(name, {})) for name in named}
    if not dynamic_batch:
        return _capture_with(module, args, kwargs, named, asked)
    wanted = {
        name: {0: BATCH} | asked[name] if _has_batch(value) else asked[name]
        for name, value in named.items()
    }
    try:
        program = _capture_with(module, _twice(args), _twice(kwargs), named, wanted)
    except CaptureError:
        # Either the model takes the given batch alone, or this raises the error that it causes.
        return _static_batch(_capture_with(module, args, kwargs, named, asked))
    static = [
        (spec.name, axis)
        for spec in program.inputs
        for axis in wanted.get(spec.name, {})
        if isinstance(spec.shape[axis], int)
    ]
    for name, axis in static:
        if axis in asked[name]:
            raise CaptureError(
                f"dimension {axis} of input {name} cannot be dynamic: the model fixes it to the "
                "example's size; look for shapes read as Python numbers, or do not ask for it"
            )
    if not static:
        return program
    return _static_batch(_capture_with(module, args, kwargs, named, asked))


def _static_batch(program: Program) -> Program:
    """The program with a note that its batch is what the example's was."""
    note = {"batch": "static: the model fixes its batch size"}
    return replace(program, attributes={**program.attributes, **note})


def _has_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _capture_with(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    named: Mapping[str, Any],
    dynamic: Mapping[str, Mapping[int, str]],
) -> Program:
    """Export with exactly these dynamic dimensions: input name -> {dimension: name}."""
    per_leaf = iter(dynamic.values())
    shapes = pytree.tree_map(lambda leaf: _dynamic(leaf, next(per_leaf)), (args, kwargs))
    exported = _run_export(module, args, kwargs, shapes)
    return from_exported(exported, dynamic, list(named))


def _dynamic(leaf: Any, dims: Mapping[int, str]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    return {axis: torch.export.Dim.AUTO for axis in dims if axis < leaf.dim()}


def _twice(tree: Any) -> Any:
    """The tree with every tensor of batch 1 repeated along the batch dimension."""

    def widen(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if _has_batch(leaf) and leaf.shape[0] == 1 else leaf

    return pytree.tree_map(widen, tree)


def _run_export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    arg_shapes, kwarg_shapes = shapes
    by_name = _by_parameter(module, arg_shapes, kwarg_shapes)
    printed, graph = io.StringIO(), ""
    try:
        with redirect_stderr(printed):
            return torch.export.export(module, args, kwargs, dynamic_shapes=by_name, strict=False)
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise CaptureError(_explain(error)) from error
    finally:
        # torch prints the graph up to where it failed, screens of it; all else is passed on.
        sys.stderr.write(printed.getvalue().replace(f"{graph}\n", "") if graph else
                         printed.getvalue())  # fmt: skip


def _by_parameter(
    module: torch.nn.Module, arg_shapes: tuple[Any, ...], kwarg_shapes: dict[str, Any]
) -> Any:
    """Dynamic shapes keyed as ``torch.export`` wants them: by parameter name.

    What ``*args`` and ``**kwargs`` take stands under their names as a tuple and a dict.
    """
    parameters = inspect.signature(module.forward).parameters
    bound = inspect.signature(module.forward).bind(*arg_shapes, **kwarg_shapes)
    return {name: bound.arguments[name] for name in parameters if name in bound.arguments}


_NO_BRANCHES = (
    "replace branches and shapes that depend on tensor values, for example with torch.where, or "
    "move that part out of the captured module"
)
_REMEDIES = (
    ("data-dependent", _NO_BRANCHES),
    ("GuardOnDataDependentSymNode", _NO_BRANCHES),
    ("size mismatch", "check the shapes of the example inputs"),
    ("shapes cannot be multiplied", "check the shapes of the example inputs"),
    ("same reduction dim", "check the shapes of the example inputs"),
    ("Expected", "check the dtypes and shapes of the example inputs"),
)  # fmt: skip


def _explain(error: Exception) -> str:
    """A one-screen message: the user's own line, the first lines of the cause, a remedy."""
    text = str(error).strip() or type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename and "/pruna_ir/" not in frame.filename
        and Path(frame.filename).exists()
    ]
    inner = re.findall(r'File "([^"]+)", line (\d+)', text)
    own = [(f, n) for f, n in inner if "/torch/" not in f]
    if own:
        where = f"{own[-1][0]}:{own[-1][1]}"
        line = linecache.getline(own[-1][0], int(own[-1][1])).strip()
    elif frames:
        where, line = f"{frames[-1].filename}:{frames[-1].lineno}", frames[-1].line or ""
    else:
        where, line = "", ""
    cause = "\n  ".join(text.splitlines()[:4])
    place = f"\n  model source: {where}\n      {line}" if where else ""
    remedy = next((r for key, r in _REMEDIES if key in text), "make this line traceable by "
                  "torch.export, or capture the submodule that can be")
    return f"the model cannot be captured: {cause}{place}\n  remedy: {remedy}"


def from_exported(
    exported: torch.export.ExportedProgram,
    dynamic_names: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
) -> Program:
    """A Program from an ExportedProgram of one's own.

    Args:
        exported: the result of ``torch.export.export``.
        dynamic_names: names for dynamic dimensions: input name -> {dimension: name}.
        input_names: names for the flattened inputs; those of the graph by default.
    """
    module = exported.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise CaptureError("the exported program does not hold a graph module")
    inline_regions(module)
    examples = pytree.tree_leaves(exported.example_inputs)
    kept = _flatten_inputs(module, examples, input_names)
    names = _output_names(module)
    graph = module.graph
    _name_tensors_once(module)
    graph.set_codegen(fx.graph.CodeGen())
    flat = fx.GraphModule(module, graph, class_name="Program")
    flat.meta.clear()
    symbols = _name_symbols(flat.graph.find_nodes(op="placeholder"), dynamic_names or {})
    inputs = tuple(
        _spec(node.name, node.meta["val"], symbols)
        for node in flat.graph.find_nodes(op="placeholder")
    )
    returned = cast("tuple[fx.Node, ...]", flat.graph.output_node().args[0])
    outputs = tuple(
        _spec(name, node.meta["val"], symbols) for name, node in zip(names, returned, strict=True)
    )
    program = Program(flat, inputs, outputs, tuple(kept), _ranges(exported, symbols))
    # A copied graph renames nodes called like a builtin (`input`); what it calls them then stays.
    return program.fork()


def _name_tensors_once(module: fx.GraphModule) -> None:
    """One node for each tensor that is read, under the first of its names (tied weights)."""
    seen: dict[int, fx.Node] = {}
    nodes = module.graph.find_nodes(op="get_attr")
    for node in sorted(nodes, key=lambda n: str(n.target)):
        first = seen.setdefault(id(reduce(getattr, str(node.target).split("."), module)), node)
        if first is not node:
            if first is not nodes[0]:
                nodes[0].prepend(first)
            node.replace_all_uses_with(first)
    for node in nodes:
        if not node.users:
            module.graph.erase_node(node)


def _flatten_inputs(
    module: fx.GraphModule, examples: list[Any], names: Sequence[str] | None
) -> list[torch.Tensor]:
    """Placeholders first, tensors only, under the given names; returns their examples."""
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    kept: list[torch.Tensor] = []
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for position, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
        if not isinstance(example, torch.Tensor):
            if node.users:
                raise CaptureError(
                    f"input {node.name} is a {type(example).__name__} that the graph computes "
                    "with; pass it as a tensor, or bind it in the module"
                )
            graph.erase_node(node)
            continue
        if names is not None and names[position].isidentifier():
            node.target = node.name = names[position]
        kept.append(example.detach())
        anchor.prepend(node)
    return kept


def _output_names(module: fx.GraphModule) -> list[str]:
    """Names of the returned tensors, from the structure that the user's module returns.

    Constants among the results (None, numbers) are dropped.
    """
    output = module.graph.output_node()
    flat = list(pytree.tree_leaves(output.args[0]))
    codegen = module.graph._codegen
    spec = getattr(getattr(codegen, "pytree_info", None), "out_spec", None)
    structure = pytree.tree_unflatten(range(len(flat)), spec) if spec is not None else flat
    paths = {leaf: path for path, leaf in pytree.tree_leaves_with_path(structure)}
    names: dict[str, fx.Node] = {}
    for position, value in enumerate(flat):
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            parts = [_key(entry) for entry in paths[position]]
            name = "_".join(parts)
            names[name if name[:1].isalpha() else f"output_{name}" if name else "output"] = value
    if not names:
        raise CaptureError("the model returns no tensor")
    output.args = (tuple(names.values()),)
    return list(names)


def _name_symbols(
    placeholders: Iterable[fx.Node], dynamic: Mapping[str, Mapping[int, str]]
) -> dict[str, str]:
    symbols: dict[str, str] = {}
    for node in placeholders:
        for axis, size in enumerate(node.meta["val"].shape):
            wanted = dynamic.get(node.name, {}).get(axis, BATCH if axis == 0 else str(size))
            if isinstance(size, torch.SymInt) and str(size) not in symbols:
                taken = wanted in symbols.values()
                symbols[str(size)] = f"{node.name}_{wanted}" if taken else wanted
    return symbols


def _spec(name: str, value: torch.Tensor, symbols: Mapping[str, str]) -> TensorSpec:
    def size(s: int | torch.SymInt) -> int | str:
        if (fixed := s if isinstance(s, int) else s.node.maybe_as_int()) is not None:
            return fixed
        return re.sub(r"\w+", lambda m: symbols.get(m.group(), m.group()), str(s))

    return TensorSpec(name, value.dtype, tuple(size(s) for s in value.shape))


def _ranges(
    exported: torch.export.ExportedProgram, symbols: Mapping[str, str]
) -> dict[str, DimRange]:
    ranges: dict[str, DimRange] = {}
    for symbol, bounds in exported.range_constraints.items():
        if str(symbol) in symbols:
            upper = int(bounds.upper) if str(bounds.upper).isdigit() else None
            # torch.export assumes at least 2 where the example was at least 2; size 1 works too
            # unless the model itself demands more.
            lower = 1 if int(bounds.lower) == 2 else int(bounds.lower)
            ranges[symbols[str(symbol)]] = DimRange(lower, upper)
    return ranges

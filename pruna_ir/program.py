"""Program: the immutable value that passes transform and backends lower.

A Program is an ATen-level ``torch.fx`` graph with flat tensor inputs and outputs. Every node
carries ``meta["val"]`` (a fake tensor: shape, dtype, symbolic sizes); nodes that stem from the
user's model carry ``nn_module_stack`` and ``stack_trace`` too. Parameters, buffers and constants
are ``get_attr`` nodes under their dotted names.

A Program is a value: nobody writes into its graph or tensors. A pass works on ``fork()``, which
copies the nodes and shares the tensors, and returns a new Program; the old one still runs.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from pruna_ir.collector import paused_collector
from pruna_ir.errors import InvalidIRError, UsageError
from pruna_ir.lazy_module import LazyGraphModule, sharing
from pruna_ir.tensor_cache import TensorCache

Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """The name, dtype and shape of one input or output; a ``str`` size is a dynamic dimension."""

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        sizes = ", ".join(str(size) for size in self.shape)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{sizes}]"


@dataclass(frozen=True)
class DimRange:
    """The inclusive range of a dynamic dimension; ``upper`` is None where there is no bound."""

    lower: int
    upper: int | None = None


@dataclass(frozen=True)
class Applied:
    """One entry of a Program's history: a pass with its options and the hashes around it."""

    text: str
    before: str
    after: str


Removed = Mapping[str, Mapping[int, Sequence[int]]]
"""Tensor name -> dimension -> removed indices."""


@dataclass(frozen=True)
class Origin:
    """What a program was pruned or quantised from, for passes that mend what that cost.

    Attributes:
        program: the unpruned, or float, program; its tensors are shared, not copied.
        removed: what the pruned program lacks, numbered as in the unpruned one.
    """

    program: Program
    removed: Removed


@dataclass(frozen=True)
class Program:
    """A captured model as a value.

    Attributes:
        module: the graph module. Read it, run it, never write into it.
        inputs: one spec per placeholder, in order.
        outputs: one spec per returned tensor, in order.
        examples: one concrete tensor per input, as given at capture.
        dims: the range of each dynamic dimension that ``inputs`` name.
        history: the passes that made this program, oldest first.
        attributes: facts that passes state about the whole program, such as
            ``{"quantized-for": "onnx"}``.
        origin: set by pruning passes and insert-fake-quant; the next pass drops it unless it
            works layer by layer (`Rewrite.set_origin`). It is not saved.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: tuple[torch.Tensor, ...]
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    history: tuple[Applied, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``module``."""
        return self.module.graph

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The ``call_function`` nodes, in order; of the given targets only, where any is given."""
        for node in self.graph.nodes:
            if node.op == "call_function" and (not targets or node.target in targets):
                yield node

    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of ``inputs``."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def results(self) -> tuple[fx.Node, ...]:
        """The returned nodes, in the order of ``outputs``."""
        (returned,) = self.graph.output_node().args
        if not isinstance(returned, (tuple, list)):
            raise InvalidIRError("the output node must return a tuple of nodes")
        return tuple(node for node in returned if isinstance(node, fx.Node))

    def tensor(self, target: str) -> torch.Tensor:
        """The parameter, buffer or constant of this dotted name.

        Raises:
            UsageError: the program has no tensor of that name.
        """
        *path, leaf = target.split(".")
        owner: torch.nn.Module | None = self.module
        for part in path:
            # Straight from the tables: the attribute look-up of modules is slow.
            owner = None if owner is None else owner._modules.get(part)
        value = None if owner is None else owner._parameters.get(leaf)
        if value is None:
            value = getattr(owner, leaf, None)
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"the program has no tensor named '{target}'")
        return value

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter, buffer and constant that the graph reads, by name, in graph order."""
        targets = dict.fromkeys(
            str(node.target) for node in self.graph.nodes if node.op == "get_attr"
        )
        return {target: self.tensor(target) for target in targets}

    def fork(self) -> Program:
        """A program with its own nodes that shares every tensor with this one."""
        with paused_collector():
            graph, module = _copied(self.graph), self.module
            if isinstance(module, LazyGraphModule):
                return replace(self, module=sharing(module, graph))
            return replace(self, module=LazyGraphModule(module, graph, "Program"))

    def bind(self, inputs: Iterable[torch.Tensor], named: Mapping[str, torch.Tensor]) -> list[
        torch.Tensor
    ]:
        """Positional and named inputs in the order of ``inputs``, checked against the specs.

        Raises:
            UsageError: an input is missing, unknown, or of another dtype or shape.
        """
        given = list(inputs)
        names = [spec.name for spec in self.inputs]
        if unknown := sorted(set(named) - set(names)):
            raise UsageError(f"unknown input {unknown[0]!r}; the inputs are {', '.join(names)}")
        if len(given) + len(named) != len(names):
            raise UsageError(
                f"{len(given) + len(named)} inputs were given, but the program takes "
                f"{len(names)}: {'; '.join(map(str, self.inputs))}"
            )
        given += [named[name] for name in names[len(given) :] if name in named]
        if len(given) != len(names):
            raise UsageError("an input was given both by position and by name")
        sizes: dict[str, int] = {}
        for spec, value in zip(self.inputs, given, strict=True):
            self._check_input(spec, value, sizes)
        return given

    def _check_input(self, spec: TensorSpec, value: torch.Tensor, sizes: dict[str, int]) -> None:
        actual = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if value.dtype != spec.dtype or value.dim() != len(spec.shape):
            raise UsageError(f"input {spec.name} is {actual}, but the program takes {spec}")
        for axis, (size, actual_size) in enumerate(zip(spec.shape, value.shape, strict=True)):
            expected = size if isinstance(size, int) else sizes.setdefault(size, actual_size)
            if actual_size != expected:
                raise UsageError(
                    f"input {spec.name} is {actual}, but the program takes {spec}: "
                    f"dimension {axis} must be {expected}"
                )
            if isinstance(size, str) and size in self.dims:
                bounds = self.dims[size]
                if actual_size < bounds.lower or (bounds.upper and actual_size > bounds.upper):
                    raise UsageError(
                        f"input {spec.name}: dimension {size} is {actual_size}, outside "
                        f"[{bounds.lower}, {bounds.upper}]"
                    )

    def __call__(self, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the program in torch; returns one tensor per output.

        Raises:
            UsageError: an input is missing, unknown, or of another dtype or shape.
        """
        result: tuple[torch.Tensor, ...] = self.module(*self.bind(inputs, named))
        return result

    def with_history(self, entry: Applied) -> Program:
        """This program with one more entry at the end of its history."""
        return replace(self, history=(*self.history, entry))

    def hash(self) -> str:
        """A structural hash: equal for equal graphs with equal tensors, whatever the node names.

        Covers operators, arguments, shapes, dtypes, input and output names and tensor contents
        (hashed once per tensor and remembered).
        """
        digest = hashlib.sha256()
        numbers: dict[fx.Node, str] = {}

        def number(node: fx.Node) -> str:
            return numbers[node]

        for spec in (*self.inputs, *self.outputs):
            digest.update(str(spec).encode())
        digest.update(repr(sorted(self.attributes.items())).encode())
        for node in self.graph.nodes:
            if node.op == "get_attr":
                numbers[node] = f"@{node.target}"
                digest.update(f"{node.target}={tensor_digest(self.tensor(node.target))}".encode())
                continue
            numbers[node] = f"%{len(numbers)}"
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: _Symbol(number(n)))
            digest.update(f"{node.op} {_target_name(node.target)} {arguments}\n".encode())
        return digest.hexdigest()[:16]


def _copied(graph: fx.Graph) -> fx.Graph:
    """What ``copy.deepcopy(graph)`` gives, without its search of all arguments for raw symbols."""
    new = fx.Graph(tracer_cls=graph._tracer_cls)
    new.set_codegen(copy.deepcopy(graph._codegen))
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        own = new.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        # Past fx's own __setattr__, which files the node anew: arguments do not matter to that.
        object.__setattr__(own, "args", fx.map_arg(node.args, copies.__getitem__))
        if node.kwargs:
            object.__setattr__(own, "kwargs", fx.map_arg(node.kwargs, copies.__getitem__))
        own.meta.update(node.meta)
        copies[node] = own
    return new


class _Symbol(str):
    """A node reference inside hashed arguments; prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _target_name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().cpu()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    if content.numel():
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


tensor_digest = TensorCache(_digest)
"""A hash of a tensor's dtype, shape and bytes."""


def computed_nodes(program: Program) -> set[fx.Node]:
    """The nodes that depend on an input of the program; all others are constants."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a node's value (static or symbolic sizes), None where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's value, None where it is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def module_path(node: fx.Node) -> str:
    """The path of the user's submodule that a node stems from, such as ``layer1.0.conv1``."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def source_line(node: fx.Node) -> str:
    """``file.py:41`` in the user's model, where a node stems from; empty where unknown.

    Frames inside torch itself are passed over: they are never what the user can change.
    """
    return _innermost(str(node.meta.get("stack_trace") or ""))


@lru_cache(maxsize=4096)
def _innermost(stack_trace: str) -> str:
    """The innermost of the user's own frames; repeated layers have equal stack traces."""
    lines = stack_trace.splitlines()
    frames = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    own = [f for f in frames if "/torch/" not in f.replace("\\", "/")] or frames
    if not own:
        return ""
    name, line = own[-1].split('"')[1], own[-1].split("line ")[1].split(",")[0]
    return f"{'/'.join(name.replace(chr(92), '/').split('/')[-2:])}:{line}"

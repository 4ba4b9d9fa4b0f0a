"""The rewriter through which passes edit a program: edits, tensors, remarks and promises.

A pass edits a fork of the program, so that the old one still runs. Every edit keeps shapes fresh
and provenance attached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments, unbind_arguments
from pruna_ir.context import Context
from pruna_ir.dead_nodes import remove_dead_nodes
from pruna_ir.errors import PassError
from pruna_ir.lazy_module import LazyGraphModule
from pruna_ir.printer import print_node
from pruna_ir.program import Origin, Program, module_path, source_line
from pruna_ir.propagate import EqualCalls, fake_mode, propagated, same_value
from pruna_ir.statements import Assurance, Oracle, Remark

COMPUTES = "computes"
"""The key in ``node.meta`` under which a new node names the old one whose value it computes."""


class Rewrite:
    """A program under rewrite: the only way in which a pass edits a graph.

    Every edit keeps shapes fresh and provenance attached. A pass reads ``rw.program`` (its own
    fork) and must not keep the Rewrite after `Pass.rewrite` returns.
    """

    def __init__(
        self, program: Program, pass_name: str, context: Context, scope: Sequence[str] = ()
    ) -> None:
        self.program = program.fork()
        for node in self.program.graph.nodes:
            node.meta.pop(COMPUTES, None)
        self.before = program
        self.context = context
        self.remarks: list[Remark] = []
        self.oracle: Oracle | None = None
        self.assurances: list[Assurance] = []
        self.exact: dict[str, torch.Tensor] = {}
        self._origin: Origin | None = None
        self._pass_name = pass_name
        self._scope = scope
        self._mode = fake_mode(self.program)
        self._stale: set[fx.Node] = set()
        self._reads: dict[str, list[fx.Node]] = {}
        for node in self.program.graph.find_nodes(op="get_attr"):
            self._reads.setdefault(str(node.target), []).append(node)
        self._taken = set(self._reads)

    # -- reading ---------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The graph under rewrite."""
        return self.program.graph

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The calls of these targets (all for none) inside the pass's scope, as a snapshot."""
        return (node for node in list(self.program.calls(*targets)) if self.in_scope(node))

    def in_scope(self, node: fx.Node) -> bool:
        """Whether every ``submodule<glob>`` scope around the pass covers the node."""
        path = module_path(node)
        return all(fnmatchcase(path, g) or fnmatchcase(path, f"{g}.*") for g in self._scope)

    def call(self, node: fx.Node) -> Call:
        """The arguments of a call by schema name."""
        return Call(self.program, node)

    # -- remarks ---------------------------------------------------------------------------

    def skip(self, node: fx.Node, reason: str) -> None:
        """Record a near miss: the node looked right, but for ``reason`` nothing was done."""
        self._remark("missed", node, reason)

    def applied(self, node: fx.Node, what: str) -> None:
        """Record what was done to a node."""
        self._remark("applied", node, what)

    def note(self, node: fx.Node, text: str) -> None:
        """Record a fact about a node."""
        self._remark("note", node, text)

    def _remark(self, kind: str, node: fx.Node, message: str) -> None:
        self.remarks.append(Remark(self._pass_name, kind, node.name, message, source_line(node)))

    def error(self, node: fx.Node, message: str) -> PassError:
        """An error that shows the node and its source; for ``raise rw.error(node, ...)``."""
        where = f"\n  model source: {source_line(node)}" if source_line(node) else ""
        return PassError(f"{self._pass_name}: {message}\n  {print_node(node)}{where}")

    def promise(self, oracle: Oracle) -> None:
        """State exactly what the program now computes; ORACLE passes that change it must."""
        self.oracle = oracle

    def assure(self, assurance: Assurance) -> None:
        """State something that must hold of the result; FITTED passes that change it must.

        The test recomputes from the programs and the data alone what it compares: it reuses no
        figure of the pass.
        """
        self.assurances.append(assurance)

    def set_attribute(self, key: str, value: str) -> None:
        """State a fact about the whole program, such as ``"quantized-for"``: ``"onnx"``."""
        attributes = {**self.program.attributes, key: value}
        self.program = replace(self.program, attributes=attributes)

    def set_origin(self, origin: Origin | None) -> None:
        """State what the new program was pruned from; without this call it has no origin."""
        self._origin = origin

    # -- editing ---------------------------------------------------------------------------

    def insert(
        self, target: torch._ops.OpOverload, /, *, before: fx.Node, like: fx.Node, **arguments: Any
    ) -> fx.Node:
        """A new call, placed before a node, with the provenance of ``like``.

        Arguments are given by schema name. The result's shape is propagated at once.
        """
        args, kwargs = unbind_arguments(target, arguments)
        with self.graph.inserting_before(before):
            name = target._schema.name.rpartition("::")[2]
            node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        _copy_provenance(like, node)
        node.meta["val"] = propagated(self.program, node, self._mode)
        return node

    def insert_function(
        self, function: Callable[..., Any], *args: Any, before: fx.Node, like: fx.Node
    ) -> fx.Node:
        """A new call of ``getitem`` or size arithmetic (things without a schema)."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(function, args)
        _copy_provenance(like, node)
        node.meta["val"] = propagated(self.program, node, self._mode)
        return node

    def inline(
        self, node: fx.Node, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> fx.Node:
        """Replace a node by the operators that ``function(**arguments)`` calls.

        The function calls ``torch.ops`` operators only, with no branch on a tensor's value; node
        arguments reach it as proxies. Returns the node of its result.
        """
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        first_new = node.prev
        with self.graph.inserting_before(node):
            proxied: Any = fx.map_arg(dict(arguments), lambda n: cast("Any", fx.Proxy(n, tracer)))
            result = function(**proxied)
        if not isinstance(result, fx.Proxy):
            raise PassError(f"inlining {node.name}: the function must return one tensor")
        current = first_new.next
        while current is not node:
            self._normalise(current)
            _copy_provenance(node, current)
            current.meta["val"] = propagated(self.program, current, self._mode)
            current = current.next
        self.replace(node, result.node)
        return result.node

    def _normalise(self, node: fx.Node) -> None:
        if isinstance(node.target, torch._ops.OpOverload):
            node.args, node.kwargs = unbind_arguments(node.target, bind_arguments(node))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new`` instead, and remove ``old``."""
        new.meta.setdefault(COMPUTES, old.name)
        readers = old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._stale.update(readers)
        self.graph.erase_node(old)

    def redirect(self, reader: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> None:
        """Let one reader read other nodes in place of those that the mapping names."""
        args, kwargs = fx.map_arg((reader.args, reader.kwargs), lambda n: mapping.get(n, n))
        reader.args, reader.kwargs = args, kwargs
        self._stale.add(reader)

    def update(self, node: fx.Node, /, **arguments: Any) -> None:
        """Change arguments of a call, by schema name; shapes follow at `refresh` or `finish`."""
        if not isinstance(node.target, torch._ops.OpOverload):
            raise PassError(f"{node.name} has no schema; replace it instead")
        bound = bind_arguments(node) | arguments
        node.args, node.kwargs = unbind_arguments(node.target, bound)
        self._stale.add(node)

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody reads."""
        self.graph.erase_node(node)

    # -- tensors ---------------------------------------------------------------------------

    def constant(
        self,
        tensor: torch.Tensor,
        name: str,
        *,
        before: fx.Node,
        rounded_to: torch.dtype | None = None,
    ) -> fx.Node:
        """A new named tensor (a Parameter stays one) and the node that reads it.

        The name is made unique by a number where it is taken. A float64 tensor computed by the
        pass is stored ``rounded_to`` a dtype; see `derive`.
        """
        unique = self._unique(name)
        if rounded_to is not None and tensor.dtype != rounded_to:
            self.exact[unique] = tensor.detach()
            rounded = tensor.detach().to(rounded_to)
            trainable = isinstance(tensor, torch.nn.Parameter)
            tensor = torch.nn.Parameter(rounded) if trainable else rounded
        _set_tensor(self.program.module, unique, tensor)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(unique)
        node.meta["val"] = propagated(self.program, node, self._mode)
        self._reads.setdefault(unique, []).append(node)
        return node

    def _reads_of(self, name: str) -> list[fx.Node]:
        """The get_attr nodes of a tensor, without a walk over the graph."""
        return [node for node in self._reads.get(name, ()) if not node._erased]

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Give a name another tensor, for all of its readers; shapes follow at `refresh`."""
        old = self.program.tensor(name)
        if isinstance(old, torch.nn.Parameter) and not isinstance(tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        _set_tensor(self.program.module, name, tensor)
        self._stale.update(self._reads_of(name))

    def derive(self, source: fx.Node, tensor: torch.Tensor, reader: fx.Node) -> fx.Node:
        """A node for a changed copy of a parameter, to be read by ``reader`` alone.

        Keeps the parameter's name where ``reader`` is its only reader; otherwise the other
        readers keep the old tensor and the copy gets a name of its own.

        A float64 tensor is rounded to the parameter's dtype; the unrounded value serves the check
        of ROUNDING passes, which would otherwise see the rounding of stored tensors as an error
        of the rewrite.
        """
        name = str(source.target)
        dtype = self.program.tensor(name).dtype
        rounds = dtype.is_floating_point and tensor.dtype == torch.float64 != dtype
        readers = [node for get in self._reads_of(name) for node in get.users]
        if readers == [reader]:
            self.exact.pop(name, None)
            if rounds:
                self.exact[name] = tensor.detach()
            self.set_tensor(name, tensor.detach().to(dtype) if rounds else tensor)
            return source
        if isinstance(self.program.tensor(name), torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor.detach())
        return self.constant(
            tensor, name, before=reader, rounded_to=dtype if rounds else None
        )

    def _unique(self, name: str) -> str:
        candidate, number = name, 0
        while candidate in self._taken or hasattr(self.program.module, candidate):
            number += 1
            candidate = f"{name}_{number}"
        self._taken.add(candidate)
        return candidate

    def finish(self) -> Program:
        """The rewritten program: dead nodes removed, shapes propagated, code compiled."""
        remove_dead_nodes(self.graph)
        self.refresh()
        return replace(self.program, module=self._module(), origin=self._origin)

    def _module(self) -> LazyGraphModule:
        """The module of the finished graph: the fork's own where no tensor was left behind."""
        module = self.program.module
        if isinstance(module, LazyGraphModule) and _tensor_names(module) == {
            str(node.target) for node in self.graph.find_nodes(op="get_attr")
        }:
            module.graph = self.graph
            return module
        return LazyGraphModule(module, self.graph, "Program")

    def state(self, values: Mapping[fx.Node, Any]) -> None:
        """Give nodes values that are known; `refresh` then propagates other readers of theirs.

        Calls that were edited are propagated all the same, and the pipeline's verifier compares
        every value with what its operands give.
        """
        for node, value in values.items():
            node.meta["val"] = value
            self._stale.update(user for user in node.users if user not in values)
        self._stale.difference_update(node for node in values if node.op == "get_attr")

    def refresh(self) -> None:
        """Propagate shapes from every changed node to all that depend on it."""
        if not self._stale:
            return
        known = EqualCalls(self.program, self._mode)
        for node in self.graph.nodes:
            if node in self._stale and node.op != "output":
                fresh = known.propagated(node)
                if not same_value(node.meta["val"], fresh):
                    node.meta["val"] = fresh
                    self._stale.update(node.users)
        self._stale.clear()


def _tensor_names(module: torch.nn.Module) -> set[str]:
    """The names of all parameters and buffers; tied ones under each of theirs."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def _set_tensor(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner = module
    for part in path:
        # Straight from the table: the attribute look-up of modules is slow.
        child = owner._modules.get(part)
        if child is None:
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    if leaf in owner._buffers and isinstance(tensor, torch.nn.Parameter):
        del owner._buffers[leaf]
    if leaf in owner._parameters and not isinstance(tensor, torch.nn.Parameter):
        del owner._parameters[leaf]
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        if leaf not in owner._buffers and hasattr(owner, leaf):
            delattr(owner, leaf)
        owner.register_buffer(leaf, tensor)


_PROVENANCE = ("nn_module_stack", "stack_trace", "from_node", "torch_fn")


def _copy_provenance(source: fx.Node, target: fx.Node) -> None:
    for key in _PROVENANCE:
        if key in source.meta:
            target.meta[key] = source.meta[key]

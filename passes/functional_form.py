"""In-place operators rewritten as functional ones.

    y = relu_(x); z = add(x, 1)        -->   y = relu(x); z = add(y, 1)
    v = slice(x, 1, 0, 4); fill_(v, 1) -->   f = full_like(v, 1); x' = slice_scatter(x, f, 1, 0, 4)

The graph is walked in order. Every node that shares memory with another is tied to it as its
view; a write to a node gives new values to all nodes of that memory: the written node's own,
carried back through the chain of views to the tensor that owns the memory, and from there, on
demand, forward to every view that is read later.

Which nodes share memory is found by running each operator that may return a view on the fake
tensors of the capture and comparing storages: operators such as ``reshape`` view or copy depending
on strides, and so no table can know.

Limits: writes into parameters, buffers and constants are refused, except counters that nothing
reads; so are writes through ``unfold``, ``as_strided`` and other views without an inverse here,
and operators that change a tensor's shape in place.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.passes.view_inverses import part_written_back, same_type, written_back
from pruna_ir.program import dtype_of
from pruna_ir.propagate import fake_mode, propagated
from pruna_ir.transform import Rewrite

aten = torch.ops.aten


def functionalise(rw: Rewrite) -> None:
    """Replace every in-place operator of the graph, whatever the scope of the pass.

    Raises:
        PassError: a write cannot be expressed functionally; the message names the operator, the
            node and the user's source line.
    """
    writes = [node for node in rw.program.calls() if is_write(node)]
    if not writes:
        return
    memory = _Memory(rw)
    kept = {node for node in writes if _settle_state_update(rw, memory, node)}
    for node in list(rw.graph.nodes):
        if node in kept:
            continue
        memory.refresh_operands(node)
        if is_write(node):
            _replace_write(rw, memory, node)
    for node in reversed(writes):
        if node not in kept and node not in memory.erased:
            rw.erase(node)


def is_write(node: fx.Node) -> bool:
    """Whether a node is an operator that writes into one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_training(rw: Rewrite) -> bool:
    """Whether any node of the program behaves as in training (dropout, batch norm)."""
    return any(_training_flag(node) for node in rw.program.calls())


def _training_flag(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = {argument.name for argument in node.target._schema.arguments} & {"train", "training"}
    return any(bind_arguments(node)[name] is True for name in names)


# -- who shares memory with whom --------------------------------------------------------------


class _Memory:
    """Which nodes share memory, and the node that holds the current value of each.

    ``parent[v]`` is the node that ``v`` views. ``value[v]`` is the node that holds what ``v``
    holds now, with the number of writes to its memory at which that was so.
    """

    def __init__(self, rw: Rewrite) -> None:
        self.rw = rw
        self.parent: dict[fx.Node, fx.Node] = {}
        self.tangled: set[fx.Node] = set()
        self.value: dict[fx.Node, tuple[int, fx.Node]] = {}
        self.writes: dict[fx.Node, int] = {}
        self.erased: set[fx.Node] = set()
        self._owners: dict[int, fx.Node] = {}
        mode = fake_mode(rw.program)
        for node in rw.graph.nodes:
            if node.op == "get_attr":
                self._tie_constant(node)
            elif node.op == "call_function":
                self._tie(node, _shared_operands(rw, node, mode))

    def _tie_constant(self, node: fx.Node) -> None:
        pointer = self.rw.program.tensor(str(node.target)).untyped_storage().data_ptr()
        owner = self._owners.setdefault(pointer, node)
        if owner is not node:
            self.parent[node] = owner

    def _tie(self, node: fx.Node, operands: list[fx.Node]) -> None:
        if node.target is operator.getitem and node.args[0] not in self.parent:
            # One of several new tensors (topk, lstm): it owns its memory.
            return
        if operands:
            self.parent[node] = operands[0]
        if len({self.root(operand) for operand in operands}) > 1 or (
            operands and node.args[0] is not operands[0]
        ):
            self.tangled.update(self.root(operand) for operand in operands)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that owns the memory."""
        while node in self.parent:
            node = self.parent[node]
        return node

    def current(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node that holds what ``node``'s memory holds at this point of the walk."""
        count = self.writes.get(self.root(node), 0)
        known = self.value.get(node)
        if count == 0 or (known is not None and known[0] == count):
            return known[1] if known is not None else node
        parent = self.parent[node]
        fresh = self.current(parent, before)
        if not _is_alias(node):
            fresh = self._view_again(node, fresh, before)
        self.value[node] = (count, fresh)
        return fresh

    def _view_again(self, node: fx.Node, parent: fx.Node, before: fx.Node) -> fx.Node:
        """The same view of another tensor. The viewed operand is the first argument."""
        if node.target is operator.getitem:
            return self.rw.insert_function(
                operator.getitem, parent, node.args[1], before=before, like=node
            )
        assert isinstance(node.target, torch._ops.OpOverload)
        bound = bind_arguments(node)
        first = node.target._schema.arguments[0].name
        return self.rw.insert(node.target, before=before, like=node, **bound | {first: parent})

    def refresh_operands(self, node: fx.Node) -> None:
        """Let a node read current values, and note at which write it was computed."""
        mapping = {old: self.current(old, node) for old in node.all_input_nodes}
        if any(old is not new for old, new in mapping.items()):
            self.rw.redirect(node, mapping)
        if node in self.parent:
            self.value[node] = (self.writes.get(self.root(node), 0), node)

    def store(self, written: fx.Node, value: fx.Node, before: fx.Node) -> None:
        """Record a write: carry the value back through the views to the owner of the memory."""
        changed = [(written, value)]
        while written in self.parent:
            parent = self.parent[written]
            if written.target is operator.getitem:
                base = self.current(self.parent[parent], before)
                value = part_written_back(self.rw, written, parent, base, value, before)
                parent = self.parent[parent]
            elif not _is_alias(written):
                value = written_back(
                    self.rw, written, self.current(parent, before), value, before
                )
            written = parent
            changed.append((written, value))
        self.writes[written] = self.writes.get(written, 0) + 1
        for node, new in changed:
            self.value[node] = (self.writes[written], new)


def _is_alias(node: fx.Node) -> bool:
    """Whether a view is its parent as it is: a write's result, or a constant read twice."""
    return node.op == "get_attr" or is_write(node)


def _shared_operands(rw: Rewrite, node: fx.Node, mode: Any) -> list[fx.Node]:
    """The operands whose memory a call's result shares."""
    tensors = [n for n in node.all_input_nodes if _storages(n.meta.get("val"))]
    if node.target is operator.getitem:
        return tensors[:1]
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if is_write(node):
        return _written_operands(node)
    if not _may_view(node.target):
        return []
    results = _storages(propagated(rw.program, node, mode))
    return [n for n in tensors if results & _storages(n.meta["val"])]


_NEVER_VIEWS = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.batch_norm.default,
        aten.linear.default, aten.layer_norm.default, aten.group_norm.default,
        aten.matmul.default, aten.scaled_dot_product_attention.default, aten.embedding.default,
    }
)  # fmt: skip
"""Composite operators that are frequent and slow to propagate."""


def _may_view(target: torch._ops.OpOverload) -> bool:
    if target in _NEVER_VIEWS:
        return False
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return True
    overload = target._schema.overload_name
    name = f"{target._schema.name}.{overload}" if overload else target._schema.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _storages(value: Any) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}


def _written_operands(node: fx.Node) -> list[fx.Node]:
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = bind_arguments(node)
    written = [
        bound[argument.name]
        for argument in node.target._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [operand for operand in written if isinstance(operand, fx.Node)]


# -- writes into state ------------------------------------------------------------------------


def _settle_state_update(rw: Rewrite, memory: _Memory, node: fx.Node) -> bool:
    """Whether a write only counts in a buffer that nothing else reads.

    In training programs (batch norm's counter) it stays; otherwise it is dropped here.

    Raises:
        PassError: the write goes into a tensor that the program also reads.
    """
    roots = [memory.root(operand) for operand in _written_operands(node)]
    state = [root for root in roots if root.op == "get_attr"]
    if not state:
        return False
    for root in state:
        aliases = [n for n in rw.graph.nodes if n is root or memory.root(n) is root]
        readers = {user for alias in aliases for user in alias.users}
        if readers != {node}:
            raise rw.error(
                node,
                f"{node.target} writes into the tensor '{root.target}', which the program also "
                "reads: a program keeps no state between runs; make the state an input and an "
                "output of the model",
            )
    if is_training(rw):
        return True
    rw.note(node, f"the update of '{state[0].target}', which nothing reads, is dropped")
    rw.erase(node)
    memory.erased.add(node)
    return True


# -- one write --------------------------------------------------------------------------------


def _replace_write(rw: Rewrite, memory: _Memory, node: fx.Node) -> None:
    (written,) = _written_by_self(rw, node)
    original = memory.parent[node]
    if memory.root(original) in memory.tangled:
        raise rw.error(
            node, f"{node.target} writes into memory that several tensors share at once; "
            "copy the tensor (clone) before writing into it",
        )  # fmt: skip
    if memory.root(original).op == "placeholder":
        rw.note(node, f"input {memory.root(original).name} is no longer overwritten")
    value = _functional(rw, node, written)
    memory.store(original, value, node)
    memory.value[node] = (memory.writes[memory.root(node)], value)
    rw.applied(node, f"{node.target} became functional")


def _written_by_self(rw: Rewrite, node: fx.Node) -> list[fx.Node]:
    """The written operand, where it is the first and only one.

    Raises:
        PassError: the operator writes into several tensors, or changes a tensor's shape.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    written = _written_operands(node)
    first = arguments[0].alias_info
    own = len(written) == 1 and first is not None and first.is_write
    reshapes = (
        torch.Tag.inplace_view in node.target.tags and node.target is not aten.detach_.default
    )
    if not own or reshapes:
        what = "changes the shape of a tensor in place" if reshapes else "writes into its operands"
        raise rw.error(
            node, f"{node.target} {what}, for which there is no functional form here; use an "
            "operator that returns its result",
        )  # fmt: skip
    return written


def _functional(rw: Rewrite, node: fx.Node, written: fx.Node) -> fx.Node:
    """The value that an in-place call leaves in its operand."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = bind_arguments(node)
    if node.target is aten.detach_.default:
        return written
    if node.target in (aten.fill_.Scalar, aten.zero_.default):
        return rw.insert(
            aten.full_like.default,
            before=node, like=node, self=written, fill_value=bound.get("value", 0),
        )  # fmt: skip
    if node.target is aten.copy_.default and same_type(written, bound["src"]):
        source: fx.Node = bound["src"]
        return source
    target = _functional_overload(node.target)
    if target is None:
        raise rw.error(
            node, f"{node.target} has no functional form; use an operator that returns its result"
        )
    names = [argument.name for argument in target._schema.arguments]
    arguments = dict(zip(names, bound.values(), strict=True))
    value = rw.insert(target, before=node, like=node, **arguments)
    dtype = dtype_of(written)
    if dtype_of(value) != dtype:
        value = rw.insert(aten.to.dtype, before=node, like=node, self=value, dtype=dtype)
    return value


def _functional_overload(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None where there is no twin."""
    space, name = target._schema.name.split("::")
    if name.startswith("__i") and name.endswith("__"):
        twin = f"__{name[3:]}"
    elif name.endswith("_") and not name.endswith("__"):
        twin = name[:-1]
    else:
        return None
    packet = getattr(getattr(torch.ops, space), twin, None)
    overload = getattr(packet, target._overloadname, None)
    if not isinstance(overload, torch._ops.OpOverload):
        return None
    same = _argument_types(overload) == _argument_types(target)
    return overload if same and not overload._schema.is_mutable else None


def _argument_types(target: torch._ops.OpOverload) -> list[tuple[str, bool]]:
    """Types in order; names may differ (``dropout(input)`` but ``dropout_(self)``)."""
    return [(str(a.type), a.kwarg_only) for a in target._schema.arguments]

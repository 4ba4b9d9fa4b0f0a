"""Evaluate what depends on constants only, once and for all.

    arange(8) ... unsqueeze ... sub(a, b)   -->   @constant    the value, stored

Every call whose operands are all constant is evaluated by running it, so the result is bit for
bit what the program would compute. Of the constant region only the values that something else
reads are stored. A parameter's plain view (reshape, transpose...) becomes the parameter, under its
name and still trainable, where nothing else reads that. What is computed from parameters in any
other way is stored as a constant, which no longer trains; ``freeze=false`` leaves it alone. A
weight times its 0/1 mask (mask-weights) is stored under the weight's name, zeros in place.

Left as they are: random operators, writes, memory that nobody filled, values of dynamic size,
results that would grow the program beyond ``max_bytes``, and views of tensors that other nodes
read as well, since folding would store those twice.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.sparse_layouts import masked
from pruna_ir.transform import Effect, Pass, Rewrite, is_pure

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace calls on constants by stored results.

    Rewrite:
        a = arange(8); b = unsqueeze(a, 0); y = add(x, b)
          -->
        y = add(x, @b)

    Options:
        max_bytes: by how much the program may grow; results are folded in graph order until then.
        freeze: fold what is computed from trainable parameters, too; it then no longer trains.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> class Ramp(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x + torch.arange(3.0) / 2
    >>> program = apply(FoldConstants(), capture(Ramp(), (torch.zeros(2, 3),))).program
    >>> [str(node.target) for node in program.calls()]
    ['aten.add.Tensor']
    """

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1
    max_bytes: int = 64 * 2**20
    freeze: bool = True

    def rewrite(self, rw: Rewrite) -> None:
        """Find the constant region, then store the values on its border."""
        region = _constant_calls(rw)
        border = [n for n in region if any(user not in region for user in n.users)]
        grown = 0
        for node in border:
            if not isinstance(node.meta["val"], torch.Tensor):
                continue
            sources = _sources(node)
            freed = sum(_freed(rw, source, node) for source in sources)
            growth = _size(node.meta["val"]) - freed
            reason = _reason(rw, node, sources, freeze=self.freeze)
            if not reason and growth > self.max_bytes - grown:
                reason = f"its value would grow the program by {growth} bytes, beyond max_bytes"
            if reason:
                rw.skip(node, reason)
                continue
            grown += growth
            _store(rw, node, sources)


def _constant_calls(rw: Rewrite) -> dict[fx.Node, None]:
    """The calls that depend on nothing but stored tensors, in graph order."""
    region: dict[fx.Node, None] = {}
    for node in rw.calls():
        known = all(o.op == "get_attr" or o in region for o in _operands(node))
        if known and is_pure(node) and not _is_random(node) and _is_plain(node):
            region[node] = None
    return region


_FILLS: dict[Any, Any] = {
    aten.new_zeros.default: lambda _bound: 0,
    aten.new_ones.default: lambda _bound: 1,
    aten.new_full.default: lambda bound: bound["fill_value"],
    aten.zeros_like.default: lambda _bound: 0,
    aten.ones_like.default: lambda _bound: 1,
    aten.full_like.default: lambda bound: bound["fill_value"],
}
"""Calls that take only dtype, device and shape from their operand, and the value they fill in."""


def _operands(node: fx.Node) -> list[fx.Node]:
    """The operands on whose values a call depends."""
    if node.target not in _FILLS:
        return node.all_input_nodes
    fill = _FILLS[node.target](bind_arguments(node))
    return [fill] if isinstance(fill, fx.Node) else []


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def _is_plain(node: fx.Node) -> bool:
    """Static values in a strided layout; memory that nobody filled has no value."""
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target in _UNINITIALISED or node.target.namespace not in ("aten", "prims"):
            return False
    elif node.target is not operator.getitem:
        return False
    value = node.meta["val"]
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(t, torch.Tensor) and _is_static(t) for t in tensors)


_UNINITIALISED = frozenset(
    {
        aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
        aten.empty_strided.default, aten.new_empty_strided.default,
        aten.empty_permuted.default,
    }
)  # fmt: skip


def _is_static(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and all(isinstance(s, int) for s in tensor.shape)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sources(node: fx.Node) -> list[fx.Node]:
    """The get_attr nodes that a constant call depends on."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            found[current] = None
        todo.extend(_operands(current))
    return list(found)


def _freed(rw: Rewrite, source: fx.Node, node: fx.Node) -> int:
    """The bytes of a stored tensor that nobody needs once ``node`` is stored."""
    tensor = rw.program.tensor(str(source.target))
    return _size(tensor) if _only_leads_to(rw, source, node) else 0


def _only_leads_to(rw: Rewrite, source: fx.Node, node: fx.Node) -> bool:
    """Whether every path from a tensor, under whatever node it is read, ends in ``node``."""
    todo = list(rw.graph.find_nodes(op="get_attr", target=source.target))
    while todo:
        current = todo.pop()
        if current is node:
            continue
        if current.op == "output" or not current.users:
            return False
        todo.extend(current.users)
    return True


_VIEWS = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default,
        aten.t.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.flatten.using_ints, aten.numpy_T.default, aten.mT.default,
    }
)  # fmt: skip


def _is_view(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether a call is one stored tensor's values in another shape."""
    if len(sources) != 1:
        return False
    while node is not sources[0]:
        if node.target not in _VIEWS:
            return False
        (node,) = node.all_input_nodes
    return True


def _is_trainable(rw: Rewrite, source: fx.Node) -> bool:
    return rw.program.tensor(str(source.target)).requires_grad


def _reason(
    rw: Rewrite, node: fx.Node, sources: list[fx.Node], *, freeze: bool
) -> str:
    """Why a value on the border is not stored; empty where it may be."""
    if _is_view(node, sources):
        alone = _only_leads_to(rw, sources[0], node)
        return "" if alone else f"it is a view of {sources[0].target}, which others read too"
    trained = [str(source.target) for source in sources if _is_trainable(rw, source)]
    if trained and not freeze:
        return f"it is computed from {trained[0]}, which would no longer train (freeze=false)"
    return ""


def _store(rw: Rewrite, node: fx.Node, sources: list[fx.Node]) -> None:
    value = _evaluate(rw, node, {})
    rw.applied(node, f"stored its value, {list(value.shape)}")
    if _is_view(node, sources):
        rw.set_tensor(str(sources[0].target), value)
        rw.replace(node, sources[0])
        return
    mask = masked(rw.program, node)
    if mask is not None and _only_leads_to(rw, mask.weight, node):
        rw.note(node, f"{mask.weight.target} has zeros now that training would fill again")
        rw.set_tensor(str(mask.weight.target), value)
        rw.replace(node, mask.weight)
        return
    for source in sources:
        if _is_trainable(rw, source):
            rw.note(node, f"what it takes from {source.target} no longer trains")
    rw.replace(node, rw.constant(value, node.name, before=node))


def _evaluate(rw: Rewrite, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a constant call, in memory of its own."""
    for current in _in_order(node):
        if current.op == "get_attr":
            known[current] = rw.program.tensor(str(current.target)).detach()
            continue
        if current.target in _FILLS:
            known[current] = _filled(current)
            continue
        args, kwargs = fx.map_arg((current.args, current.kwargs), lambda n: known[n])
        target: Any = current.target
        with torch.no_grad():
            known[current] = target(*args, **kwargs)
    return known[node].detach().clone(memory_format=torch.contiguous_format)


def _filled(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    fill = _FILLS[node.target](bind_arguments(node))
    return torch.full(tuple(value.shape), fill, dtype=value.dtype, device=value.device)


def _in_order(node: fx.Node) -> list[fx.Node]:
    """A node and all that it depends on, operands first."""
    order: dict[fx.Node, None] = {}
    todo: list[tuple[fx.Node, bool]] = [(node, False)]
    while todo:
        current, expanded = todo.pop()
        if expanded:
            order[current] = None
        elif current not in order:
            todo.append((current, True))
            todo.extend((operand, False) for operand in _operands(current))
    return list(order)

"""Removal: the program without the indices that a plan names.

The size of every dimension after removal is the number of ids that survive there, so all shapes
are known before anything is edited: first the operators' literal arguments are fixed, then the
tensors are cut, then nodes get the shapes so predicted. Only calls whose arguments changed are
propagated, and compared with the prediction: the verifier, which runs after every pass, compares
all nodes with what their operands give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.collector import paused_collector
from pruna_ir.coupling.analysis import Coupling
from pruna_ir.coupling.plan import RemovalPlan
from pruna_ir.coupling.rule import Edit, Result, kept_counts
from pruna_ir.coupling.table import rule_of
from pruna_ir.coupling.value import Block, Extent, Factor, Ids, Mask, Value, extent, product
from pruna_ir.errors import InvalidIRError, UsageError
from pruna_ir.huge_pages import HugePages
from pruna_ir.propagate import resized_value
from pruna_ir.transform import Rewrite


def remove(rw: Rewrite, coupling: Coupling, plan: RemovalPlan) -> None:
    """Remove what a plan names from the program under rewrite.

    Args:
        rw: a rewrite of the program that ``coupling`` was made from, not edited yet.
        coupling: its analysis.
        plan: what goes; every unit in it must go whole.

    Raises:
        UsageError: the plan does not fit the program: an unknown tensor or index, a unit that
            goes in part only, a channel that must stay, a dimension left empty.
        InvalidIRError: a rule resized a node wrongly.
    """
    remove_units(rw, coupling, removed_units(coupling, plan))


@paused_collector()
def remove_units(rw: Rewrite, coupling: Coupling, gone: Mask) -> None:
    """`remove` for whole units.

    Args:
        rw: a rewrite of the program that ``coupling`` was made from, not edited yet.
        coupling: its analysis.
        gone: per unit, whether it goes.

    Raises:
        UsageError: a unit must stay, or nothing would be left of a dimension.
        InvalidIRError: a rule resized a node wrongly.
    """
    _check_units(coupling, gone)
    if not gone.any():
        return
    alive = ~gone[coupling.solved.unit]
    values, shrunk = dict(coupling.values), _Shrunk(alive)
    for node in list(rw.program.calls()):
        rule = rule_of(node.target)
        if rule is not None and rule.resize is not None and _changes(node, values, shrunk):
            rule.resize(Edit(rw, node, bind_arguments(node), values, alive))
    _cut_tensors(rw, coupling, alive)
    rw.state(_predicted(rw, values, shrunk))
    stated = {node: node.meta.get("val") for node in rw.graph.nodes}
    rw.refresh()
    _check_sizes((n for n in rw.graph.nodes if n.meta.get("val") is not stated[n]), values, alive)


def removed_units(coupling: Coupling, plan: RemovalPlan) -> Mask:
    """Per unit, whether a plan removes it; the plan is checked against the coupling.

    Raises:
        UsageError: see `remove`.
    """
    units = coupling.solved.unit
    gone = np.zeros(len(coupling.solved.frozen), np.bool_)
    given = {
        (name, dim): _checked(coupling, name, dim, indices)
        for name, dim, indices in plan.items()
    }
    for (name, dim), wanted in given.items():
        gone[units[_ids(coupling, name, dim)[wanted]]] = True
    _check_units(coupling, gone)
    for name, dim, lost in coupling.lost(gone):
        named = given.get((name, dim), lost[:0])
        if len(named) != len(lost):
            missing = np.setdiff1d(lost, named)
            raise UsageError(
                f"the plan removes a unit in part: index {missing[0]} of dimension {dim} of "
                f"{name} must go with it"
            )
    return gone


def _check_units(coupling: Coupling, gone: Mask) -> None:
    if (stays := gone & coupling.solved.frozen).any():
        raise UsageError(f"the plan removes channels that must stay: {_why(coupling, stays)}")
    if empty := coupling.emptied(gone):
        raise UsageError(f"the plan leaves nothing of a dimension of {empty[0][0]}")


def _ids(coupling: Coupling, name: str, dim: int) -> Ids:
    dims = coupling.tensors.get(name)
    if dims is None:
        raise UsageError(f"the plan names {name}, which is no tensor of the program")
    ids = dims[dim] if 0 <= dim < len(dims) else None
    if ids is None:
        raise UsageError(f"the plan names dimension {dim} of {name}, which has no channels")
    return ids


def _checked(coupling: Coupling, name: str, dim: int, indices: tuple[int, ...]) -> Ids:
    """The indices without repeats, sorted."""
    size = len(_ids(coupling, name, dim))
    wanted = np.unique(np.asarray(indices, np.int64))
    outside = wanted[(wanted < 0) | (wanted >= size)]
    if outside.size:
        raise UsageError(
            f"the plan names index {outside[0]} of dimension {dim} of {name}, which has {size}"
        )
    return wanted


def _why(coupling: Coupling, units: Mask) -> str:
    index = int(coupling.solved.reason[np.flatnonzero(units)[0]])
    return str(coupling.solved.reasons[index]) if index >= 0 else "an extent of a weight"


def _changes(node: fx.Node, values: dict[str, Result], shrunk: _Shrunk) -> bool:
    """Whether a dimension of an operand or of the result shrinks."""
    for one in (*node.all_input_nodes, node):
        result = values.get(one.name)
        for value in result if isinstance(result, tuple) else (result,):
            if value is not None and not all(map(shrunk.is_whole, value.blocks)):
                return True
    return False


def _cut_tensors(rw: Rewrite, coupling: Coupling, alive: Mask) -> None:
    """Cut every tensor; tied names get one and the same cut tensor."""
    cut: dict[int, torch.Tensor] = {}
    memory = HugePages()
    for name, dims in coupling.tensors.items():
        kept = [None if ids is None else alive[ids] for ids in dims]
        if all(mask is None or mask.all() for mask in kept):
            continue
        if id(dims) not in cut:
            cut[id(dims)] = _cut(rw.program.tensor(name), kept, memory)
        rw.set_tensor(name, cut[id(dims)])


def _cut(tensor: torch.Tensor, kept: Sequence[Mask | None], memory: HugePages) -> torch.Tensor:
    """The tensor without what is not kept; a Parameter stays one."""
    result = tensor.detach()
    cuts = [(k, mask) for k, mask in enumerate(kept) if mask is not None and not mask.all()]
    for number, (dim, mask) in enumerate(cuts, start=1):
        index = torch.from_numpy(np.flatnonzero(mask)).to(result.device)
        out = None
        if result.device.type == "cpu" and number in (1, len(cuts)):
            shape = [*result.shape[:dim], len(index), *result.shape[dim + 1 :]]
            make = memory.empty if number == len(cuts) else memory.scratch
            out = make(shape, result.dtype)
        result = torch.index_select(result, dim, index, out=out)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _predicted(
    rw: Rewrite, values: Mapping[str, Result], shrunk: _Shrunk
) -> dict[fx.Node, torch.Tensor | Sequence[torch.Tensor]]:
    """The nodes that shrink, with the values that follow from the surviving ids."""
    found: dict[fx.Node, torch.Tensor | Sequence[torch.Tensor]] = {}
    for node in rw.graph.nodes:
        result, meta = values.get(node.name), node.meta.get("val")
        if isinstance(result, Value) and isinstance(meta, torch.Tensor):
            if (one := shrunk.value(result, meta)) is not None:
                found[node] = one
        elif isinstance(result, tuple) and isinstance(meta, (tuple, list)):
            parts = [shrunk.value(*pair) for pair in zip(result, meta, strict=True)]
            if any(part is not None for part in parts):
                new = [m if p is None else p for p, m in zip(parts, meta, strict=True)]
                found[node] = type(meta)(new)
    return found


class _Shrunk:
    """What survives of blocks, and fake tensors of the sizes after removal.

    Blocks are shared by the nodes that they pass; each is counted once. Equal fake tensors are
    one object.
    """

    def __init__(self, alive: Mask) -> None:
        self._alive = alive
        self._left: dict[int, int] = {}
        self._sizes: dict[Any, tuple[dict[int, tuple[int, int]], tuple[Extent, ...]]] = {}
        self._known: dict[Any, torch.Tensor] = {}

    def is_whole(self, block: Block) -> bool:
        """Whether all of a block survives."""
        return self._count(block) == block.ids.size

    def _count(self, block: Block) -> int:
        count = self._left.get(id(block))
        if count is None:
            count = self._left[id(block)] = int(np.count_nonzero(self._alive[block.ids]))
        return count

    def value(self, value: Value, meta: torch.Tensor) -> torch.Tensor | None:
        """The value of smaller size; None where it keeps its size."""
        if not isinstance(meta, torch.Tensor):
            return None
        key = (value.dims, value.blocks)
        if key not in self._sizes:
            counts = self._counts(value)
            self._sizes[key] = counts, _sizes_after(value, counts)
        counts, after = self._sizes[key]
        if not counts:
            return None
        known = (meta.dtype, meta.device, after)
        if known not in self._known:
            self._known[known] = resized_value(meta, _resized(meta.shape, counts))
        return self._known[known]

    def _counts(self, value: Value) -> dict[int, tuple[int, int]]:
        """For dimensions that shrink: the static part of the size, before and after removal."""
        shrinking = [block for block in value.blocks if not self.is_whole(block)]
        touched = {factor for block in shrinking for factor in block.factors}
        counts = {}
        for dim, factors in enumerate(value.dims):
            if touched.isdisjoint(factors):
                continue
            alone = [block for block in shrinking if block.factors == factors]
            if alone:
                counts[dim] = alone[0].ids.size, self._count(alone[0])
            else:
                counts[dim] = kept_counts(value, dim, self._alive)
        return counts


def _sizes_after(
    value: Value, counts: Mapping[int, tuple[int, int]]
) -> tuple[Extent, ...]:
    """The size of every dimension after removal."""
    sizes = list(value.sizes()) if counts else []
    for dim, (_, after) in counts.items():
        sizes[dim] = after * _symbolic(value.dims[dim])
    return tuple(sizes)


def _symbolic(factors: Sequence[Factor]) -> Extent:
    return product(factor.size for factor in factors if not isinstance(factor.size, int))


def _resized(
    shape: Sequence[int | torch.SymInt], counts: Mapping[int, tuple[int, int]]
) -> list[int | torch.SymInt]:
    """A shape with the dimensions that shrink at their sizes after removal."""
    sizes = list(shape)
    for dim, (before, after) in counts.items():
        if before != after:
            # A static size may be the new one already, where a rule put another node there.
            sizes[dim] = after if isinstance(sizes[dim], int) else sizes[dim] // before * after
    return sizes


def _check_sizes(nodes: Iterable[fx.Node], values: dict[str, Result], alive: Mask) -> None:
    """Compare shapes that propagation changed with the number of surviving ids."""
    for node in nodes:
        value, meta = values.get(node.name), node.meta.get("val")
        if not isinstance(value, Value) or not isinstance(meta, torch.Tensor):
            continue
        for dim, size in enumerate(meta.shape):
            _, after = kept_counts(value, dim, alive)
            rest = _symbolic(value.dims[dim])
            if extent(size) != after * rest:
                raise InvalidIRError(
                    f"removal made dimension {dim} of {node.name} ({node.target}) {size} where "
                    f"{after * rest} channels survive; the coupling rule's resize is wrong"
                )

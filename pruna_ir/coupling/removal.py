"""Removal: the program without the indices that a plan names.

The size of every dimension after removal is the number of ids that survive there, so all shapes
are known before anything is edited: first the operators' literal arguments are fixed, then the
tensors are cut, then nodes get the shapes so predicted. Only calls whose arguments changed are
propagated, and compared with the prediction: the verifier, which runs after every pass, compares
all nodes with what their operands give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.coupling.analysis import Coupling
from pruna_ir.coupling.plan import RemovalPlan
from pruna_ir.coupling.rule import Edit, Result, kept_counts
from pruna_ir.coupling.table import rule_of
from pruna_ir.coupling.value import Mask, Value, extent, product
from pruna_ir.errors import InvalidIRError, UsageError
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
    gone = removed_units(coupling, plan)
    if not gone.any():
        return
    alive = ~gone[coupling.solved.unit]
    values = dict(coupling.values)
    for node in list(rw.program.calls()):
        rule = rule_of(node.target)
        if rule is not None and rule.resize is not None and _changes(node, values, alive):
            rule.resize(Edit(rw, node, bind_arguments(node), values, alive))
    _cut_tensors(rw, coupling, alive)
    rw.state(_predicted(rw, values, alive))
    rw.refresh()
    _check_sizes(rw, values, alive)


def removed_units(coupling: Coupling, plan: RemovalPlan) -> Mask:
    """Per unit, whether a plan removes it; the plan is checked against the coupling.

    Raises:
        UsageError: see `remove`.
    """
    units = coupling.solved.unit
    gone = np.zeros(len(coupling.solved.frozen), np.bool_)
    for name, dim, indices in plan.items():
        gone[units[_ids(coupling, name, dim)[_checked(coupling, name, dim, indices)]]] = True
    if (stays := gone & coupling.solved.frozen).any():
        raise UsageError(f"the plan removes channels that must stay: {_why(coupling, stays)}")
    whole = coupling._plan(gone)
    for name, dim, indices in whole.items():
        given = set(plan.removed.get(name, {}).get(dim, ()))
        if missing := sorted(set(indices) - given):
            raise UsageError(
                f"the plan removes a unit in part: index {missing[0]} of dimension {dim} of "
                f"{name} must go with it"
            )
    if empty := coupling.emptied(gone):
        raise UsageError(f"the plan leaves nothing of a dimension of {empty[0][0]}")
    return gone


def _ids(coupling: Coupling, name: str, dim: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    dims = coupling.tensors.get(name)
    if dims is None:
        raise UsageError(f"the plan names {name}, which is no tensor of the program")
    ids = dims[dim] if 0 <= dim < len(dims) else None
    if ids is None:
        raise UsageError(f"the plan names dimension {dim} of {name}, which has no channels")
    return ids


def _checked(coupling: Coupling, name: str, dim: int, indices: tuple[int, ...]) -> list[int]:
    size = len(_ids(coupling, name, dim))
    if outside := [index for index in indices if not 0 <= index < size]:
        raise UsageError(
            f"the plan names index {outside[0]} of dimension {dim} of {name}, which has {size}"
        )
    return list(indices)


def _why(coupling: Coupling, units: Mask) -> str:
    index = int(coupling.solved.reason[np.flatnonzero(units)[0]])
    return str(coupling.solved.reasons[index]) if index >= 0 else "an extent of a weight"


def _changes(node: fx.Node, values: dict[str, Result], alive: Mask) -> bool:
    """Whether a dimension of an operand or of the result shrinks."""
    results = [values.get(n.name) for n in (*node.all_input_nodes, node)]
    flat = [v for r in results for v in (r if isinstance(r, tuple) else (r,))]
    return any(
        not alive[block.ids].all() for v in flat if isinstance(v, Value) for block in v.blocks
    )


def _cut_tensors(rw: Rewrite, coupling: Coupling, alive: Mask) -> None:
    """Cut every tensor; tied names get one and the same cut tensor."""
    cut: dict[int, torch.Tensor] = {}
    for name, dims in coupling.tensors.items():
        tensor = rw.program.tensor(name)
        if all(ids is None or alive[ids].all() for ids in dims):
            continue
        if id(dims) not in cut:
            cut[id(dims)] = _cut(tensor, dims, alive)
        rw.set_tensor(name, cut[id(dims)])


def _cut(
    tensor: torch.Tensor,
    dims: tuple[np.ndarray[tuple[int], np.dtype[np.int64]] | None, ...],
    alive: Mask,
) -> torch.Tensor:
    result = tensor.detach()
    for dim, ids in enumerate(dims):
        if ids is not None and not alive[ids].all():
            index = torch.from_numpy(np.flatnonzero(alive[ids]))
            result = result.index_select(dim, index.to(result.device))
    result = result.clone() if result.data_ptr() == tensor.data_ptr() else result
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _predicted(
    rw: Rewrite, values: Mapping[str, Result], alive: Mask
) -> dict[fx.Node, torch.Tensor | Sequence[torch.Tensor]]:
    """The nodes that shrink, with the values that follow from the surviving ids."""
    shrunk = _Shrunk(alive)
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
    """Fake tensors of the sizes after removal; equal ones are one object."""

    def __init__(self, alive: Mask) -> None:
        self._alive, self._gone = alive, ~alive
        self._known: dict[Any, torch.Tensor] = {}

    def value(self, value: Value, meta: torch.Tensor) -> torch.Tensor | None:
        """The value of smaller size; None where it keeps its size."""
        if not isinstance(meta, torch.Tensor) or not any(
            self._gone[block.ids].any() for block in value.blocks
        ):
            return None
        sizes = list(meta.shape)
        for dim in range(len(sizes)):
            before, after = kept_counts(value, dim, self._alive)
            if before != after:
                # A static size may be the new one already, where a rule put another node there.
                static = isinstance(sizes[dim], int)
                sizes[dim] = after if static else sizes[dim] // before * after
        key = (meta.dtype, meta.device, tuple(map(extent, sizes)))
        if key not in self._known:
            self._known[key] = resized_value(meta, sizes)
        return self._known[key]


def _check_sizes(rw: Rewrite, values: dict[str, Result], alive: Mask) -> None:
    """Compare every propagated shape with the number of surviving ids."""
    for node in rw.graph.nodes:
        value, meta = values.get(node.name), node.meta.get("val")
        if not isinstance(value, Value) or not isinstance(meta, torch.Tensor):
            continue
        for dim, size in enumerate(meta.shape):
            _, after = kept_counts(value, dim, alive)
            rest = product(f.size for f in value.dims[dim] if not isinstance(f.size, int))
            if extent(size) != after * rest:
                raise InvalidIRError(
                    f"removal made dimension {dim} of {node.name} ({node.target}) {size} where "
                    f"{after * rest} channels survive; the coupling rule's resize is wrong"
                )

"""Which members of a coupled group a criterion scores, and how a tensor's entries become units.

A unit u of a group owns, in a member tensor W, the entries at its indices along the member's
dimension (a filter, the rows of a head, the columns of a consumer). Every criterion of weights
is a sum over these entries: the other dimensions are reduced first, then the indices, so that no
channel is visited by Python.

A tensor that goes by several names (tied weights) counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from pruna_ir.coupling import Coupling, Group, Member
from pruna_ir.program import Program
from pruna_ir.sparse_layouts import masked
from pruna_ir.transform import Context

aten = torch.ops.aten

InPlace = Callable[[torch.Tensor], torch.Tensor]
"""Changes every element by itself, and returns the tensor that it was given."""

Scores = np.ndarray[Any, np.dtype[np.float64]]
"""One number a unit, [units]."""

Parts = list[Scores]
"""The scores that the scored members (or consumers) of one group give to its units."""


@dataclass(frozen=True)
class Candidates:
    """What a criterion is asked to score, and with what.

    Attributes:
        program: the program; it is only read.
        coupling: its coupling.
        groups: groups of the coupling.
        context: the calibration data and the seed.
        window: for statistics of activations: only the last so many batches count.
    """

    program: Program
    coupling: Coupling
    groups: Sequence[Group]
    context: Context
    window: int | None = None

    @cached_property
    def masks(self) -> dict[str, str]:
        """The mask of every masked weight, by name (`pruna_ir.passes.mask_weights`)."""
        pairs = (masked(self.program, node) for node in self.program.calls(aten.mul.Tensor))
        return {str(pair.weight.target): str(pair.mask.target) for pair in pairs if pair}

    def weight(self, name: str) -> torch.Tensor:
        """A tensor as it takes part in the product: what a mask hides counts as zero."""
        tensor = self.program.tensor(name).detach()
        mask = self.masks.get(name)
        return tensor if mask is None else tensor * self.program.tensor(mask)


def producers(program: Program, group: Group) -> list[Member]:
    """The weights (two or more dimensions) that produce the channels, each tensor once.

    Where there are none: the weights that read them; where there are none either: every member.
    Buffers (masks) count only where there is no parameter.
    """
    tensors = {member.tensor: program.tensor(member.tensor) for member in group.members}
    wide = [m for m in group.members if tensors[m.tensor].dim() > 1]
    weights = [m for m in wide if isinstance(tensors[m.tensor], Parameter)] or wide
    produced = [m for m in weights if m.produced]
    return once(program, produced or weights or group.members)


def parameters(program: Program, group: Group) -> list[Member]:
    """The trainable members: weights, biases, scales and shifts, each tensor once."""
    return once(
        program,
        (m for m in group.members if isinstance(program.tensor(m.tensor), Parameter)),
    )


def once(program: Program, members: Iterable[Member]) -> list[Member]:
    """Members without repeats of a tensor that has several names."""
    seen: dict[tuple[int, int], Member] = {}
    for member in members:
        seen.setdefault((program.tensor(member.tensor).data_ptr(), member.dim), member)
    return list(seen.values())


def per_index(entries: torch.Tensor, dim: int, of: InPlace | None = None) -> torch.Tensor:
    """The sum of ``of(entries)`` at each index of one dimension, [size] in float64.

    Computed in float64, part by part: no copy of the whole tensor is made.

    >>> per_index(torch.tensor([[1.0, 2.0], [3.0, -4.0]]), 1, torch.Tensor.abs_)
    tensor([4., 6.], dtype=torch.float64)
    """
    if entries.dim() < 2:
        return _exact(entries, of)
    rows = max(_PART * len(entries) // max(entries.numel(), 1), 1)
    others = [k for k in range(entries.dim()) if k != dim]
    sums = [_exact(part, of).sum(others) for part in torch.split(entries, rows)]
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(0)


def _exact(entries: torch.Tensor, of: InPlace | None) -> torch.Tensor:
    """A function of a copy in float64."""
    exact = entries.to(torch.float64, copy=True)
    return of(exact) if of else exact


_PART = 2**16
"""Elements that are summed at once: few enough to stay in a core's cache as float64."""


def magnitudes(entries: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum of absolute entries at each index of one dimension, [size] in float64.

    Summed in the entries' own precision (float32 at least) within parts of ``_LARGE_PART``
    elements, whose sums are added in float64: half the memory traffic of `per_index`.

    >>> magnitudes(torch.tensor([[1.0, 2.0], [3.0, -4.0]]), 1)
    tensor([4., 6.], dtype=torch.float64)
    """
    if entries.dim() < 2 or entries.dtype not in (torch.float32, torch.float64):
        return per_index(entries, dim, torch.Tensor.abs_)
    rows = max(_LARGE_PART * len(entries) // max(entries.numel(), 1), 1)
    others = [k for k in range(entries.dim()) if k != dim]
    sums = [part.abs().sum(others).double() for part in torch.split(entries, rows)]
    return torch.cat(sums) if dim == 0 else torch.stack(sums).sum(0)


_LARGE_PART = 2**19
"""Elements of float32 that stay in a core's cache."""


def per_unit(each: torch.Tensor, member: Member) -> Scores:
    """The sum over each unit's indices of one number an index, [units] in float64.

    >>> halves = Member("weight", 0, np.array([[0, 1], [2, 3]]), produced=True)
    >>> per_unit(torch.tensor([1.0, 2.0, 3.0, 4.0]), halves)
    array([3., 7.])
    """
    values: Scores = each.detach().double().cpu().numpy()
    return np.asarray(values[member.indices].sum(1))


def unit_rows(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """The entries of each unit side by side, [units, entries per unit]."""
    index = torch.from_numpy(member.indices.reshape(-1)).to(tensor.device)
    rows = tensor.detach().movedim(member.dim, 0).index_select(0, index)
    return rows.reshape(len(member.indices), -1)

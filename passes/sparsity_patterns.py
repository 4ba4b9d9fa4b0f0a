"""Sparsity patterns: from scores of a weight's entries to the mask of those that stay.

    unstructured  any entries; the share of zeros is free
    N:M           at most N non-zeros in M consecutive inputs (Zhou et al., Learning N:M
                  Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021; 2:4 is
                  that of NVIDIA's sparse tensor cores: Mishra et al., 2021); its share of zeros
                  is 1 - N/M
    RxC           whole blocks of R outputs by C inputs, at all kernel positions of a convolution
                  (Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017)

What is compared is a *unit*: an entry, an entry within its group of M, or a block, which scores
the mean of its entries. The lowest units go; of equal ones the first, in the order of the weight's
memory. A count is the share of the units, rounded down.

Edges: a group at the end with fewer than M inputs keeps at most N; a block at the edge is smaller.
Groups of a transposed convolution never share a group of M or a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pruna_ir.errors import UsageError
from pruna_ir.sparse_layouts import Layout

Ranking = str
"""``output``, ``layer`` or ``global``."""


@dataclass(frozen=True)
class Unstructured:
    """Any entries may be zero."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Grouped:
    """N:M: ``kept`` of every ``group`` consecutive inputs stay."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``outputs`` by ``inputs`` entries stay or go as a whole."""

    outputs: int
    inputs: int

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}"


Pattern = Unstructured | Grouped | Blocks


def parse_pattern(text: str) -> Pattern:
    """The pattern that a text names.

    Raises:
        UsageError: it names none, or one that cannot be.

    >>> parse_pattern("2:4"), parse_pattern("16x16")
    (Grouped(kept=2, group=4), Blocks(outputs=16, inputs=16))
    """
    if text == "unstructured":
        return Unstructured()
    found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
    if found is None:
        raise UsageError(
            f"unknown pattern '{text}'; known: unstructured, N:M such as 2:4, and blocks of "
            "outputs x inputs such as 16x16"
        )
    first, second = int(found[1]), int(found[3])
    if found[2] == "x":
        if not first or not second:
            raise UsageError(f"pattern {text}: a block has at least 1x1 entries")
        return Blocks(first, second)
    if not 0 < first < second:
        raise UsageError(f"pattern {text}: N:M keeps N of M entries, with 0 < N < M")
    return Grouped(first, second)


def share(fraction: float, size: int) -> int:
    """``fraction * size``, rounded down; 0.3 of 10 is 3 in spite of binary fractions.

    >>> share(0.3, 10), share(0.5, 7)
    (3, 3)
    """
    return math.floor(fraction * size + 1e-9)


def kept(
    scores: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    pattern: Pattern,
    sparsity: float,
    ranking: Ranking,
) -> list[torch.Tensor]:
    """Which entries stay: a bool tensor of each score's shape.

    Args:
        scores: the score of every entry of each weight; larger stays; no NaN.
        layouts: how each weight lies.
        pattern: what goes together.
        sparsity: the share of units that goes; N:M states its own.
        ranking: units compete within an ``output`` channel, a ``layer``, or all layers
            (``global``); for N:M always within their group.
    """
    if isinstance(pattern, Grouped):
        return [_grouped(s, lay, pattern) for s, lay in zip(scores, layouts, strict=True)]
    units = [_units(s, lay, pattern) for s, lay in zip(scores, layouts, strict=True)]
    chosen = _strongest(units, layouts, sparsity, ranking, pattern)
    return [
        _spread(keep, score, layout, pattern)
        for keep, score, layout in zip(chosen, scores, layouts, strict=True)
    ]


def _grouped(score: torch.Tensor, layout: Layout, pattern: Grouped) -> torch.Tensor:
    """The ``kept`` best of every group; the earlier of equal ones goes first."""
    rows = layout.inputs_last(score)
    size = rows.shape[-1]
    padding = -size % pattern.group
    padded = torch.nn.functional.pad(rows, (0, padding), value=-math.inf)
    groups = padded.reshape(*rows.shape[:-1], -1 if size else 0, pattern.group)
    # A stable ascending order leaves later entries above equal earlier ones.
    order = _ascending(groups)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    if padding:
        # Padding must never displace an entry, not even one that scores -inf.
        last = groups.new_zeros(groups.shape[-1], dtype=torch.bool)
        last[pattern.group - padding :] = True
        order[..., -1, :] = _padding_first(order[..., -1, :], last)
    keep.scatter_(-1, order[..., -pattern.kept :], value=True)
    return layout.restored(keep.flatten(-2)[..., :size])


def _padding_first(order: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """The same order with all padding moved to its lower end."""
    return order.gather(-1, _ascending((~is_padding[order]).to(torch.uint8)))


def _ascending(values: torch.Tensor) -> torch.Tensor:
    """The indices that sort the last dimension; equal values keep their order."""
    return values.sort(dim=-1, stable=True).indices


def _units(score: torch.Tensor, layout: Layout, pattern: Pattern) -> torch.Tensor:
    """The scores of a weight's units: of its shape, or [groups, output blocks, input blocks]."""
    if not isinstance(pattern, Blocks):
        return score
    matrix = _matrix(score, layout)
    total = _block_sums(matrix, pattern)
    return total / _block_sums(torch.ones_like(matrix), pattern)


def _matrix(score: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean over kernel positions, [groups, outputs, inputs] in float64."""
    moved = layout.inputs_last(score).double()  # [outputs, ..., groups, inputs]
    return moved.flatten(1, -3).mean(1).movedim(1, 0) if moved.dim() > 3 else moved.movedim(1, 0)


def _block_sums(matrix: torch.Tensor, pattern: Blocks) -> torch.Tensor:
    outputs, inputs = matrix.shape[1:]
    pad = (0, -inputs % pattern.inputs, 0, -outputs % pattern.outputs)
    padded = torch.nn.functional.pad(matrix, pad)
    groups, high, wide = padded.shape
    blocks = padded.reshape(
        groups, high // pattern.outputs, pattern.outputs, wide // pattern.inputs, pattern.inputs
    )
    return blocks.sum((2, 4))


def _spread(
    keep: torch.Tensor, score: torch.Tensor, layout: Layout, pattern: Pattern
) -> torch.Tensor:
    """The entries of the units that stay, in the weight's shape."""
    if not isinstance(pattern, Blocks):
        return keep
    moved = layout.inputs_last(score)
    outputs, inputs = moved.shape[0], moved.shape[-1]
    wide = keep.repeat_interleave(pattern.outputs, 1).repeat_interleave(pattern.inputs, 2)
    wide = wide[:, :outputs, :inputs].movedim(0, 1)  # [outputs, groups, inputs]
    positions = moved.dim() - 3
    shaped = wide.reshape(outputs, *([1] * positions), *wide.shape[1:])
    return layout.restored(shaped.expand(moved.shape))


def _strongest(
    units: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    sparsity: float,
    ranking: Ranking,
    pattern: Pattern,
) -> list[torch.Tensor]:
    """The units that stay: all but the lowest share of each set that competes."""
    if ranking == "global":
        flat = torch.cat([u.reshape(-1).double() for u in units] or [torch.zeros(0)])
        keep = _above(flat[None], share(sparsity, flat.numel()))[0]
        parts = torch.split(keep, [u.numel() for u in units])
        return [part.view(u.shape) for part, u in zip(parts, units, strict=True)]
    if ranking == "layer":
        return [_above(u.reshape(1, -1), share(sparsity, u.numel())).view(u.shape) for u in units]
    return [
        _by_output(u, 1 if isinstance(pattern, Blocks) else layout.outputs, sparsity)
        for u, layout in zip(units, layouts, strict=True)
    ]


def _by_output(units: torch.Tensor, outputs: int, sparsity: float) -> torch.Tensor:
    moved = units.movedim(outputs, 0)
    rows = moved.flatten(1)
    keep = _above(rows, share(sparsity, rows.shape[1])).view(moved.shape)
    return keep.movedim(0, outputs)


def _above(rows: torch.Tensor, count: int) -> torch.Tensor:
    """All but the ``count`` lowest of each row; of equal ones the first go."""
    if not count or not rows.numel():
        return torch.ones_like(rows, dtype=torch.bool)
    limit = rows.kthvalue(count, -1, keepdim=True).values
    below, equal = rows < limit, rows == limit
    left = count - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1) <= left)))

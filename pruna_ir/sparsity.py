"""Sparsity: which weights hold zeros, in what pattern, and what each backend does with them.

The pattern is read off the zeros themselves, not off the pass that made them:

    1:4, 2:4, 4:8   at most N non-zeros in M consecutive inputs; the strictest that holds
    32x32 ... 4x4   every zero lies in an all-zero block of outputs x inputs (at all kernel
                    positions), aligned to the block size; the largest that holds
    unstructured    anything else

``compressed_bytes`` is what the smallest plain form of the pattern would take, to show what the
zeros could buy: N:M stores N of M values and their positions, blocks store the blocks that stay
and one bit a block, unstructured stores the values that stay and one bit an entry. No backend here
stores weights so: artifacts keep dense size.

A backend states what it does with zeros in a class attribute ``zeros``, from a pattern to a
sentence; the empty pattern stands for all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from pruna_ir.program import Program
from pruna_ir.registry import find_backend
from pruna_ir.sparse_layouts import Layout, SparseWeight, holds, refusals, weights

LEAST = 1 / 16
"""A weight with a smaller share of zeros is dense."""

_GROUPS = ((1, 4), (2, 4), (4, 8))
_BLOCKS = (32, 16, 8, 4)
_UNKNOWN = "not known: the backend does not say"


@dataclass(frozen=True)
class SparsityRow:
    """One weight with zeros.

    Attributes:
        weight: its name.
        pattern: as read off its zeros.
        zeros: how many of its entries are zero.
        entries: how many it has.
        bytes: as stored, dense.
        compressed_bytes: of the smallest plain form of its pattern.
        cusparselt: for 2:4, ``accepted`` in float16, or why not; empty for other patterns.
        targets: what each target does with the zeros.
    """

    weight: str
    pattern: str
    zeros: int
    entries: int
    bytes: int
    compressed_bytes: int
    cusparselt: str = ""
    targets: Mapping[str, str] = field(default_factory=dict)


def sparsity(programs: Mapping[str, Program]) -> tuple[SparsityRow, ...]:
    """The weights with zeros in the programs of some targets, by name.

    Args:
        programs: target to its program; the empty target for a program that is for none.

    >>> from pruna_ir import capture
    >>> layer = torch.nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = layer.weight[:, :2].zero_()
    >>> (row,) = sparsity({"": capture(layer, (torch.ones(2, 4),))})
    >>> row.weight, row.pattern, row.zeros, row.entries
    ('weight', '2:4', 4, 8)
    """
    found: dict[str, SparsityRow] = {}
    for target, program in programs.items():
        for weight in weights(program):
            row = found.get(weight.name) or _row(weight)
            if row is None:
                continue
            sentence = {target: _use(target, row, weight)} if target else {}
            found[weight.name] = SparsityRow(
                row.weight, row.pattern, row.zeros, row.entries, row.bytes, row.compressed_bytes,
                row.cusparselt, {**row.targets, **sentence},
            )  # fmt: skip
    return tuple(found.values())


def _row(weight: SparseWeight) -> SparsityRow | None:
    """What there is to say of a weight; None for a dense one."""
    value, layout = weight.value, weight.layout
    entries = value.numel()
    zeros = entries - int(value.count_nonzero())
    if not entries or zeros < LEAST * entries:
        return None
    pattern = pattern_of(value, layout)
    size = entries * value.element_size()
    accepted = ""
    if pattern in ("1:4", "2:4"):
        accepted = "; ".join(refusals(value, layout, "cusparselt")) or "accepted"
    return SparsityRow(
        weight.name, pattern, zeros, entries, size, compressed_bytes(value, layout, pattern),
        accepted,
    )  # fmt: skip


def pattern_of(value: torch.Tensor, layout: Layout) -> str:
    """The strictest pattern that a weight's zeros obey (see the module's text)."""
    for kept, group in _GROUPS:
        if holds(value, layout, kept, group):
            return f"{kept}:{group}"
    for size in _BLOCKS:
        if _in_blocks(value, layout, size):
            return f"{size}x{size}"
    return "unstructured"


def _in_blocks(value: torch.Tensor, layout: Layout, size: int) -> bool:
    """Whether every zero lies in an all-zero block, one of them a whole one."""
    positions = layout.inputs_last(value != 0)
    if positions.shape[0] < size or positions.shape[-1] < size:
        return False
    empty = _empty_blocks(value, layout, size)
    zeros = value.numel() - int(value.count_nonzero())
    return bool(empty.any()) and zeros == int((empty * _block_entries(value, layout, size)).sum())


def _empty_blocks(value: torch.Tensor, layout: Layout, size: int) -> torch.Tensor:
    return _block_sums(layout.inputs_last((value != 0).float()), size) == 0


def _block_entries(value: torch.Tensor, layout: Layout, size: int) -> torch.Tensor:
    return _block_sums(layout.inputs_last(torch.ones_like(value, dtype=torch.float32)), size)


def _block_sums(moved: torch.Tensor, size: int) -> torch.Tensor:
    """The sums of each block over all kernel positions, [groups, output blocks, input blocks]."""
    outputs, groups, inputs = moved.shape[0], *moved.shape[-2:]
    matrix = moved.reshape(outputs, -1, groups, inputs).sum(1).movedim(1, 0)
    padded = torch.nn.functional.pad(matrix, (0, -inputs % size, 0, -outputs % size))
    high, wide = padded.shape[1:]
    return padded.reshape(groups, high // size, size, wide // size, size).sum((2, 4))


def compressed_bytes(value: torch.Tensor, layout: Layout, pattern: str) -> int:
    """The bytes of the smallest plain form of a pattern.

    >>> half = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    >>> compressed_bytes(half, Layout("linear", 0, 1), "2:4")
    9
    """
    item, entries = value.element_size(), value.numel()
    kept, _, group = pattern.partition(":")
    if group:
        values = entries // int(group) * int(kept)
        return values * item + math.ceil(values * math.log2(int(group)) / 8)
    size, _, wide = pattern.partition("x")
    if wide:
        empty = _empty_blocks(value, layout, int(size))
        gone = int((empty * _block_entries(value, layout, int(size))).sum())
        return (entries - gone) * item + math.ceil(empty.numel() / 8)
    return int(value.count_nonzero()) * item + math.ceil(entries / 8)


def _use(target: str, row: SparsityRow, weight: SparseWeight) -> str:
    """What a target does with a weight's zeros, in its own words."""
    stated: Mapping[str, str] = getattr(find_backend(target), "zeros", {})
    pattern = "2:4" if row.pattern == "1:4" and "1:4" not in stated else row.pattern
    if pattern == "2:4" and pattern in stated:
        refused = refusals(weight.value, weight.layout, "tensorrt")
        if refused:
            return f"{stated.get('', _UNKNOWN)} ({'; '.join(refused)})"
    return stated.get(pattern, stated.get("", _UNKNOWN))


def uses(rows: tuple[SparsityRow, ...]) -> Iterator[tuple[str, str, int, str]]:
    """For each target, pattern and use: the number of weights that it holds for."""
    counted: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for target, use in row.targets.items():
            key = (target, row.pattern, use)
            counted[key] = counted.get(key, 0) + 1
    for (target, pattern, use), count in counted.items():
        yield target, pattern, count, use

"""How many values of a tensor lie in each bin: a few of torch's loops, and one that counts.

Bin i holds the values in [i, i + 1) * 2**exponent; exact zeros are counted apart.

Half of what a ReLU gives is 0. A loop that counts into memory waits where it meets the same
counter again and again among others, and takes half as long again per value. So zeros are dealt
out to `_SPREAD` counters of their own in turn, and summed in the end.

Values are taken in chunks, and large ones, though they leave the cache of one core: threads that
count side by side hand Python's lock to each other at every operator, which on chunks of 2**16
costs half as much as the counting itself. What is made of a chunk lies in memory that each thread
keeps, since fresh memory is slow.

Where torch may use several threads, each takes every n-th chunk. Those have as many values as
torch's own loops give to one thread, so that these do not start threads in turn.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

_CHUNK = 1 << 18
"""Values taken at a time."""
_SHARED_CHUNK = 1 << 15
"""The same where several threads work: torch's loops use one thread for as many values."""
_FAR_CHUNK = 1 << 22
"""The same on an accelerator, where calls are dear; below 2**24, see `_signed`."""
_SPREAD = 16
"""Counters of zeros."""
_LARGEST_EXPONENT = 120
"""For which _SPREAD * 2**exponent is a float32."""

_threshold = torch.ops.aten.threshold.out


def count_bins(
    x: torch.Tensor, counts: torch.Tensor, first: int, exponent: int, *, signed: bool
) -> int:
    """Add the number of values in each bin to counts, and return how many exact zeros there are.

    Args:
        x: finite floating-point values, all of which have a bin, of any shape and strides.
        counts: int64 [bins] on the CPU, of the bins from ``first`` on; changed in place. Zeros
            are left out.
        first: the first bin, <= 0; bin 0 is among them.
        exponent: the bins' width is 2**exponent.
        signed: whether there may be negative values.

    >>> counts = torch.zeros(5, dtype=torch.int64)
    >>> count_bins(torch.tensor([0.5, 3.5, 0.0, -1.0]), counts, -1, 0, signed=True)
    1
    >>> counts.tolist()
    [1, 1, 0, 0, 1]
    """
    flat = flattened(x.detach())
    threads = torch.get_num_threads() if flat.device.type == "cpu" else 1
    size = _CHUNK if threads == 1 else _SHARED_CHUNK
    chunks = torch.split(flat, size if flat.device.type == "cpu" else _FAR_CHUNK)
    # What stands for a zero among the values must itself be a finite one.
    count = _signed if signed or exponent > _LARGEST_EXPONENT else _unsigned
    shares = 1 if len(chunks) < 2 * threads else threads
    # One share is counted here: a pool's thread less to wake up.
    elsewhere = [
        _pool(shares - 1).submit(count, chunks[start::shares], len(counts), first, exponent)
        for start in range(1, shares)
    ]
    found = [count(chunks[::shares], len(counts), first, exponent)]
    found += [share.result() for share in elsewhere]
    for share in found:
        counts[len(counts) - len(share.last) :] += share.last
    return sum(share.zeros for share in found)


class _Counted(NamedTuple):
    """The counts of the last bins, before which nothing was found, and of exact zeros."""

    last: torch.Tensor
    zeros: int


def flattened(x: torch.Tensor) -> torch.Tensor:
    """All values in the order of memory, so that nothing is copied where there are no gaps."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bin-counts")


def _unsigned(
    chunks: tuple[torch.Tensor, ...], bins: int, first: int, exponent: int
) -> _Counted:
    """Of values >= 0: rounding towards 0 finds their bins, zeros lie in -1 to -`_SPREAD`."""
    above = bins + first  # bins from 0 on
    work, index = _kept(chunks[0], _index_dtype(above + _SPREAD))
    turns = _turns(index.dtype, index.device)
    factor, stand_in = math.ldexp(1.0, -exponent), -math.ldexp(_SPREAD, exponent)
    total: torch.Tensor | None = None
    for chunk in chunks:
        length = len(chunk)
        part, at = work[:length], index[:length]
        # Before the product, in which a tiny value may become 0; -_SPREAD after it.
        _threshold(chunk.to(part.dtype), 0.0, stand_in, out=part)
        torch.maximum(at.copy_(part.mul_(factor)), turns[:length], out=at)
        total = _plus(total, torch.bincount(at.add_(_SPREAD), minlength=above + _SPREAD))
    assert total is not None
    return _Counted(total[_SPREAD:], int(total[:_SPREAD].sum()))


def _signed(chunks: tuple[torch.Tensor, ...], bins: int, first: int, exponent: int) -> _Counted:
    """Of any values."""
    work, index = _kept(chunks[0], _index_dtype(bins))
    total, zeros = None, 0
    for chunk in chunks:
        part, at = work[: len(chunk)], index[: len(chunk)]
        value = chunk.to(part.dtype)
        # Exact, as a chunk has fewer than 2**24 values, and several times as fast as
        # count_nonzero.
        zeros += int(torch.eq(value, 0, out=part).sum())
        torch.mul(value, math.ldexp(1.0, -exponent), out=part).floor_()
        if exponent > 0:
            # A tiny negative value may underflow to 0 on the way, which is the bin above.
            part.masked_fill_((part == 0) & (value < 0), -1)
        total = _plus(total, torch.bincount(at.copy_(part).sub_(first), minlength=bins))
    assert total is not None
    total[-first] -= zeros
    return _Counted(total, zeros)


def _plus(total: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    """The sum of counts, on the CPU, in the memory of the first; refuses those of more bins."""
    return counts.cpu() if total is None else total.add_(counts.cpu())


class _Memory(threading.local):
    """What one thread keeps between calls: the two tensors of each kind of chunk."""

    def __init__(self) -> None:
        self.kept: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}


_memory = _Memory()


def _kept(chunk: torch.Tensor, index_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for at least as many values and indices as a chunk has."""
    key = (chunk.device, _precision(chunk), index_dtype)
    found = _memory.kept.get(key)
    if found is None or len(found[0]) < len(chunk):
        found = (
            torch.empty_like(chunk, dtype=_precision(chunk)),
            torch.empty_like(chunk, dtype=index_dtype),
        )
        if chunk.device.type == "cpu":
            _memory.kept[key] = found
    return found


@cache
def _turns(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """-1 to -`_SPREAD` again and again, for the longest chunk there is."""
    longest = max(_CHUNK, _SHARED_CHUNK) if device.type == "cpu" else _FAR_CHUNK
    once = -1 - torch.arange(_SPREAD, dtype=dtype, device=device)
    return once.repeat(longest // _SPREAD)


def _precision(chunk: torch.Tensor) -> torch.dtype:
    return torch.float64 if chunk.dtype is torch.float64 else torch.float32


def _index_dtype(bins: int) -> torch.dtype:
    return torch.int16 if bins < 2**15 else torch.int32

"""How many values of a tensor lie in each bin: a pass over chunks that stay in cache.

Bin i holds the values in [i, i + 1) * 2**exponent; exact zeros are counted apart.

Half of what a ReLU gives is 0. A loop that counts into memory waits where it meets the same
counter again and again among others, and takes twice the time per value. So zeros are dealt out to
`_SPREAD` counters of their own in turn, and summed in the end.

Where torch may use several threads, each takes every n-th chunk. Chunks have as many values as
torch's own loops give to one thread, so that these do not start threads in turn.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

_CHUNK = 1 << 16
"""Values taken at a time: with what is made of them they stay in the cache of one core."""
_SHARED_CHUNK = 1 << 15
"""The same where several threads work: torch's loops use one thread for as many values."""
_FAR_CHUNK = 1 << 22
"""The same on an accelerator, where calls are dear; below 2**24, see `_signed`."""
_SPREAD = 16
"""Counters of zeros."""
_LARGEST_EXPONENT = 120
"""For which _SPREAD * 2**exponent is a float32."""

_threshold = torch.ops.aten.threshold.out


class BinCounts(NamedTuple):
    """The counts of consecutive bins, and of exact zeros, which the bins leave out."""

    counts: torch.Tensor
    zeros: int


def bin_counts(
    x: torch.Tensor, exponent: int, first: int, bins: int, *, signed: bool
) -> BinCounts:
    """Count the values of a floating-point tensor in ``bins`` bins from bin ``first`` on.

    Args:
        x: finite values, all of which have a bin, of any shape and strides.
        exponent: the bins' width is 2**exponent.
        first: the first bin, <= 0.
        bins: how many there are; bin 0 is among them.
        signed: whether there may be negative values.

    >>> x = torch.tensor([0.5, 3.5, 0.0, -1.0])
    >>> counts, zeros = bin_counts(x, 0, -1, 5, signed=True)
    >>> counts.tolist(), zeros
    ([1, 1, 0, 0, 1], 1)
    """
    flat = flattened(x.detach())
    threads = torch.get_num_threads() if flat.device.type == "cpu" else 1
    size = _CHUNK if threads == 1 else _SHARED_CHUNK
    chunks = torch.split(flat, size if flat.device.type == "cpu" else _FAR_CHUNK)
    # What stands for a zero among the values must itself be a finite one.
    count = _signed if signed or exponent > _LARGEST_EXPONENT else _unsigned
    if threads == 1 or len(chunks) < 2 * threads:
        return count(chunks, exponent, first, bins)
    # One share is counted here: a pool's thread less to wake up.
    shares = [
        _pool(threads - 1).submit(count, chunks[start::threads], exponent, first, bins)
        for start in range(1, threads)
    ]
    found = [count(chunks[::threads], exponent, first, bins)]
    found += [share.result() for share in shares]
    return BinCounts(
        torch.stack([one.counts for one in found]).sum(0), sum(one.zeros for one in found)
    )


def flattened(x: torch.Tensor) -> torch.Tensor:
    """All values in the order of memory, so that nothing is copied where there are no gaps."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bin-counts")


def _unsigned(
    chunks: tuple[torch.Tensor, ...], exponent: int, first: int, bins: int
) -> BinCounts:
    """Of values >= 0: rounding towards 0 finds their bins, zeros lie in -1 to -`_SPREAD`."""
    above = bins + first  # bins from 0 on
    longest, dtype = chunks[0], _precision(chunks[0])
    work = torch.empty_like(longest, dtype=dtype)
    index = torch.empty_like(longest, dtype=_index_dtype(above + _SPREAD))
    turns = _turns(index.dtype, longest.device)
    found = torch.zeros(_SPREAD + above, dtype=torch.int64)
    factor, stand_in = math.ldexp(1.0, -exponent), -math.ldexp(_SPREAD, exponent)
    for chunk in chunks:
        length = len(chunk)
        part, at = work[:length], index[:length]
        # Before the product, in which a tiny value may become 0; -_SPREAD after it.
        _threshold(chunk.to(dtype), 0.0, stand_in, out=part)
        part.mul_(factor)
        torch.maximum(at.copy_(part), turns[:length], out=at)
        found += torch.bincount(at.add_(_SPREAD), minlength=len(found)).cpu()
    counts = torch.zeros(bins, dtype=torch.int64)
    counts[-first:] = found[_SPREAD:]
    return BinCounts(counts, int(found[:_SPREAD].sum()))


def _signed(chunks: tuple[torch.Tensor, ...], exponent: int, first: int, bins: int) -> BinCounts:
    """Of any values."""
    counts, zeros = torch.zeros(bins, dtype=torch.int64), 0
    work = torch.empty_like(chunks[0], dtype=_precision(chunks[0]))
    index = torch.empty_like(chunks[0], dtype=_index_dtype(bins))
    for chunk in chunks:
        value, part = chunk.to(work.dtype), work[: len(chunk)]
        # Exact, as a chunk has fewer than 2**24 values, and several times as fast as
        # count_nonzero.
        zeros += int(torch.eq(value, 0, out=part).sum())
        torch.mul(value, math.ldexp(1.0, -exponent), out=part).floor_()
        if exponent > 0:
            # A tiny negative value may underflow to 0 on the way, which is the bin above.
            part.masked_fill_((part == 0) & (value < 0), -1)
        at = index[: len(chunk)].copy_(part.sub_(first))
        counts += torch.bincount(at, minlength=bins).cpu()
    counts[-first] -= zeros
    return BinCounts(counts, zeros)


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

"""Memory for tensors that are made together, in large pages where the system has them.

The system hands out fresh memory in pages of 4 KiB, and the first write to each of them costs more
than copying its contents: filling 76 MB takes seven times as long in fresh memory as in pages of
2 MiB, which Linux gives on request (``madvise(2)``, MADV_HUGEPAGE). Tensors smaller than such a
page share one piece of memory of `PIECE` bytes. Elsewhere this is ``torch.empty``.

Limits: a piece is free again when all of its tensors are gone. A tensor's storage is its own, but
cannot be resized. Where free memory is in small pieces, Linux may have none of these pages, or
take its time to make some.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

PIECE = 1 << 25
"""Bytes that are asked for at once."""
_LEAST = 1 << 12
"""Bytes of the smallest tensor for which this pays."""
_ALIGNMENT = 64


class HugePages:
    """Hands out uninitialised CPU tensors.

    >>> HugePages().empty([2, 3], torch.float32).shape
    torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self._piece: mmap.mmap | None = None
        self._used = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of any contents, with a storage of its own."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if self._piece is None or start + size > len(self._piece):
            self._piece, start = _advised(max(size, PIECE)), 0
        self._used = start + size
        return torch.frombuffer(self._piece, dtype=dtype, count=count, offset=start).view(*shape)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of any contents, in memory that the next call hands out again."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._scratch):
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size].view(dtype).view(*shape)


def _advised(size: int) -> mmap.mmap:
    """Private memory for which the system is asked to use large pages."""
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    piece.madvise(mmap.MADV_HUGEPAGE)
    return piece

"""Dense tensors on the CPU in pieces that stay in cache, for operators of several passes.

A piece is a view, and the same elements in each of the tensors that are cut together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

_FULL = (torch.float32, torch.float64)
_REAL = (torch.Tensor, torch.nn.Parameter)
CHUNK = 1 << 17
"""Elements that one thread works on at a time, so that every step finds them in its cache."""


def is_dense(*tensors: torch.Tensor) -> bool:
    """Whether these are real CPU tensors in one layout without gaps, in one full precision."""
    first = tensors[0]
    dtype, stride = first.dtype, first.stride()
    if dtype not in _FULL or first.device.type != "cpu":
        return False
    for tensor in tensors:
        if type(tensor) not in _REAL or tensor.dtype is not dtype or tensor.stride() != stride:
            return False
    return first.is_contiguous() or flat(first) is not None


def flat(x: torch.Tensor) -> torch.Tensor | None:
    """All elements in the order of memory, as a view; None where there are gaps."""
    if x.is_contiguous():
        return x.detach().view(-1)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    permuted = x.detach().permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else None


def chunks(*tensors: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
    """The same pieces of dense tensors of one layout."""
    size = CHUNK * torch.get_num_threads()
    whole = [found for t in tensors if (found := flat(t)) is not None]
    if tensors[0].numel() <= size:
        return iter([whole])
    return zip(*(torch.split(found, size) for found in whole), strict=True)


def channel_pieces(
    axis: int, x: torch.Tensor, *others: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same channels of a dense tensor, and of others with as many, a few at a time.

    All at once where a channel is no piece of memory: then nothing would stay in cache.
    """
    dim, tensors = axis % x.dim(), tuple(t.detach() for t in (x, *others))
    whole = x.dim() > 1 and x.stride(dim) == max(x.stride())
    rows = CHUNK * torch.get_num_threads() * x.shape[dim] // max(x.numel(), 1) if whole else 0
    if not whole or rows >= x.shape[dim]:
        return iter([tensors])
    # A parameter has its channels in the same dimension, counted from the end.
    split = (torch.split(t, max(rows, 1), dim - x.dim() + t.dim()) for t in tensors)
    return zip(*split, strict=True)

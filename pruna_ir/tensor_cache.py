"""A fact per tensor, computed once and remembered until the tensor is written to or dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


class TensorCache(Generic[T]):
    """Remembers ``compute(tensor)`` by identity and version counter.

    >>> total = TensorCache(lambda tensor: float(tensor.sum()))
    >>> x = torch.ones(3)
    >>> total(x), total(x.mul_(2))
    (3.0, 6.0)
    """

    def __init__(self, compute: Callable[[torch.Tensor], T]) -> None:
        self._compute = compute
        self._known: Any = WeakIdKeyDictionary()

    def __call__(self, tensor: torch.Tensor) -> T:
        """The fact for this tensor."""
        known: tuple[int, T] | None = self._known.get(tensor)
        if known is None or known[0] != tensor._version:
            known = (tensor._version, self._compute(tensor))
            self._known[tensor] = known
        return known[1]

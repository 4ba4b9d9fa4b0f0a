"""Observers: what summarises, in fixed size, all values that a tensor takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from pruna_ir.bin_counts import flattened


class Observer(Protocol):
    """Something of fixed size that summarises all values that a tensor takes.

    It must not matter how the values are split into calls, nor which strides they have.
    """

    low: float
    high: float

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        ...


@runtime_checkable
class Mergeable(Observer, Protocol):
    """An observer of which several can see some of the values each, in threads of their own."""

    def empty(self) -> Mergeable:
        """One of the same kind that has seen nothing."""
        ...

    def merge(self, other: Any) -> None:
        """Take in everything that another of the same kind has taken in."""
        ...


@dataclass
class MinMax:
    """The smallest and largest value so far.

    >>> seen = MinMax()
    >>> seen.update(torch.tensor([1.0, -2.0]))
    >>> seen.low, seen.high
    (-2.0, 1.0)
    """

    low: float = math.inf
    high: float = -math.inf

    def update(self, x: torch.Tensor) -> None:
        """Take in the finite, non-empty tensor ``x``."""
        self.widen(*bounds(x))

    def widen(self, least: float, most: float) -> None:
        """`update`, with the smallest and largest value of a tensor."""
        self.low, self.high = min(self.low, least), max(self.high, most)

    def merge(self, other: MinMax) -> None:
        """Take in everything that another has taken in."""
        self.widen(other.low, other.high)

    def empty(self) -> MinMax:
        """One of the same kind that has seen nothing."""
        return MinMax()


def bounds(x: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest value of a non-empty tensor; NaN where it holds one."""
    # Flattened, as torch copies what is not in the order of its dimensions.
    least, most = torch.aminmax(flattened(x.detach()))
    return float(least), float(most)

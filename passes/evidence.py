"""Evidence: sums over calibration data, exact enough that no split of the data changes them.

Criteria that look at data reduce it to sums: of squares of activations, of gradients, of counts.
Sums are kept in float64 (counts in int64), so that batches, windows of batches and ranks combine
by addition: `Evidence.merge` is associative and commutative up to the rounding of float64, and
integers are exact.

Where torch.distributed is initialised every rank brings its own part of the data, and
`Evidence.over_ranks` gives all of them the sums over all parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from pruna_ir.errors import UsageError


class Evidence:
    """Named sums, float64 or int64.

    >>> a, b = Evidence(), Evidence()
    >>> a.add("x", torch.tensor([1.0, 2.0]))
    >>> b.add("x", torch.tensor([0.5, 0.5]))
    >>> b.add("n", torch.tensor(3))
    >>> a.merge(b)
    >>> a["x"].tolist(), int(a["n"])
    ([1.5, 2.5], 3)
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        """The sum of this name.

        Raises:
            KeyError: nothing of this name was added.
        """
        return self._sums[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, key: str, value: torch.Tensor) -> None:
        """Add a value to the sum of this name; integers stay int64, all else is float64."""
        value = value.detach()
        exact = torch.float64 if value.is_floating_point() else torch.int64
        if key in self._sums:
            self._sums[key] += value.to(exact)
        else:
            self._sums[key] = value.to(exact, copy=True)

    def merge(self, other: Evidence) -> None:
        """Take in everything that another evidence has taken in."""
        for key, value in other._sums.items():
            self.add(key, value)

    def copy(self) -> Evidence:
        """The same sums on tensors of their own."""
        copied = Evidence()
        copied.merge(self)
        return copied

    def sums(self) -> Mapping[str, torch.Tensor]:
        """All sums by name."""
        return dict(self._sums)

    def over_ranks(self) -> None:
        """Replace the sums by those over all ranks of torch.distributed, where it is initialised.

        Every rank must have gathered sums of the same names.

        Raises:
            UsageError: a rank has gathered others, or nothing; every rank raises it.
        """
        if not distributed():
            return
        names = sorted(self._sums)
        if not agree("\n".join(names)) or not names:
            raise UsageError(
                "the ranks have not gathered the same calibration evidence; give every rank the "
                "same program and at least one batch of data"
            )
        for name in names:
            value = self._sums[name]
            moved = value.to(_device())
            dist.all_reduce(moved)
            self._sums[name] = moved.to(value.device)


def distributed() -> bool:
    """Whether there are ranks to combine with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(text: str) -> bool:
    """Whether all ranks bring the same text; every rank must call it."""
    if not distributed():
        return True
    given: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(given, text)
    return all(other == text for other in given)


def least_over_ranks(number: int) -> int:
    """The smallest number that a rank brings; every rank must call it."""
    if not distributed():
        return number
    value = torch.tensor(number, device=_device())
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return int(value)


def mean_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor, in place, by its mean over the ranks; every rank must call it."""
    if not distributed():
        return
    for tensor in tensors:
        moved = tensor.to(_device())
        dist.all_reduce(moved)
        tensor.copy_(moved / dist.get_world_size())


def _device() -> torch.device:
    """Where the ranks' backend takes its tensors."""
    cpu = "gloo" in str(dist.get_backend())
    return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())


class Window:
    """The evidence of the last batches: a sliding window.

    >>> window = Window(2)
    >>> for number in (1.0, 10.0, 100.0):
    ...     seen = Evidence()
    ...     seen.add("x", torch.tensor(number))
    ...     window.push(seen)
    >>> float(window.total()["x"])
    110.0
    """

    def __init__(self, batches: int) -> None:
        if batches < 1:
            raise UsageError(f"a window holds at least 1 batch, not {batches}")
        self._recent: deque[Evidence] = deque(maxlen=batches)

    def push(self, evidence: Evidence) -> None:
        """Take in the evidence of one batch; the oldest goes where the window is full."""
        self._recent.append(evidence)

    def total(self) -> Evidence:
        """The sums over the window, added afresh: nothing is ever subtracted."""
        total = Evidence()
        for evidence in self._recent:
            total.merge(evidence)
        return total

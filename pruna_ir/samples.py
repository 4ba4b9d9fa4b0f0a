"""Samples: training data by number, so that a loop can draw it in any order.

A `DataSource` only iterates. What trains needs any sample at any time: in another order each
epoch, split over processes, and from the middle on when a run continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from pruna_ir.data import Batch, DataSource, TensorData
from pruna_ir.errors import UsageError


@runtime_checkable
class Samples(Protocol):
    """Numbered samples; a data source that has these two is trained on as it is.

    Augmentation belongs into ``gather``. It must depend on the arguments alone, never on earlier
    calls, so that the result depends on neither the number of processes nor on resuming.
    """

    @property
    def count(self) -> int:
        """The number of samples."""
        ...

    def gather(self, indices: torch.Tensor, epoch: int) -> Batch:
        """The samples of these numbers, as augmented in this epoch."""
        ...


@dataclass(frozen=True)
class Held:
    """Samples held in memory.

    >>> Held((torch.arange(6.0).reshape(3, 2),)).gather(torch.tensor([2, 0]), 0).inputs
    (tensor([[4., 5.],
            [0., 1.]]),)
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.inputs[0])

    def gather(self, indices: torch.Tensor, epoch: int) -> Batch:  # noqa: ARG002
        """The samples of these numbers."""
        labels = None if self.labels is None else self.labels[indices]
        return Batch(tuple(tensor[indices] for tensor in self.inputs), labels)


def samples_of(data: DataSource) -> Samples:
    """A data source as numbered samples; one that only iterates is read once and held in memory.

    Raises:
        UsageError: it is empty, or some of its batches have labels and others do not.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, TensorData):
        return Held(data.inputs, data.labels)
    batches = list(data)
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if not batches or len(labels) not in (0, len(batches)):
        raise UsageError(
            "the training data holds no batch" if not batches
            else "some batches of the training data have labels and others do not"
        )  # fmt: skip
    columns = zip(*(batch.inputs for batch in batches), strict=True)
    return Held(tuple(map(torch.cat, columns)), torch.cat(labels) if labels else None)

"""Samples by number: tensors, sources that only iterate, and sources with samples of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pruna_ir.data import Batch, TensorData
from pruna_ir.errors import UsageError
from pruna_ir.samples import Held, samples_of


class Stream:
    def __init__(self, *batches: Batch) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def test_a_source_that_only_iterates_is_read_once() -> None:
    x, labels = torch.arange(5.0)[:, None], torch.arange(5)
    stream = Stream(Batch((x[:3],), labels[:3]), Batch((x[3:],), labels[3:]))
    found, held = samples_of(stream), samples_of(TensorData((x,), labels))
    chosen = torch.tensor([4, 0, 3])
    assert found.count == held.count == 5
    for one in (found.gather(chosen, 0), held.gather(chosen, 7)):
        assert torch.equal(one.inputs[0], x[chosen])
        assert torch.equal(one.labels, chosen)


def test_samples_are_taken_as_they_are() -> None:
    class Own(Stream):
        count = 2

        def gather(self, indices: torch.Tensor, epoch: int) -> Batch:
            return Batch((indices + epoch,))

    own = Own()
    assert samples_of(own) is own
    assert not isinstance(samples_of(TensorData((torch.ones(2),))), Own)


def test_refuses_nothing_and_labels_in_parts() -> None:
    with pytest.raises(UsageError, match="no batch"):
        samples_of(Stream())
    x = torch.ones(2, 1)
    with pytest.raises(UsageError, match="some batches"):
        samples_of(Stream(Batch((x,)), Batch((x,), torch.zeros(2))))
    assert Held((x,)).gather(torch.tensor([0]), 0).labels is None

"""Calibration runs: how batches are cut to what a program takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_runs import runs


def linear(*, dynamic=True):
    return capture(nn.Linear(3, 2), (torch.randn(2, 3),), dynamic_batch=dynamic)


def sizes(found):
    return [len(batch.inputs[0]) for batch in found]


def data(count=5, batch_size=3):
    return TensorData((torch.arange(3.0 * count).view(count, 3),), torch.arange(count), batch_size)


def test_a_dynamic_program_takes_the_batches_as_they_are():
    assert sizes(runs(linear(), data())) == [3, 2]


def test_single_samples_come_with_their_labels():
    found = list(runs(linear(), data(), single=True))
    assert sizes(found) == [1] * 5
    assert [int(batch.labels) for batch in found] == list(range(5))
    assert torch.cat([batch.inputs[0] for batch in found]).equal(data().inputs[0])


def test_a_fixed_batch_leaves_the_rest_out():
    fixed = linear(dynamic=False)
    assert sizes(runs(fixed, data(8, 5))) == [2, 2, 2]
    assert sizes(runs(fixed, data(8, 5), single=True)) == [2, 2, 2]


@pytest.mark.parametrize("count", [1, 0])
def test_data_without_a_run_is_refused(count):
    fixed = linear(dynamic=False)
    one = data(1)

    class Few:
        def __len__(self):
            return count

        def __iter__(self):
            return iter(list(one)[:count])

    with pytest.raises(UsageError, match="holds no sample that fits the program's inputs"):
        list(runs(fixed, Few()))


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="the program takes"):
        list(runs(linear(), TensorData((torch.zeros(2, 4),))))

"""Data sources: re-iterable batches, and files that are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.data import TensorData, load_data
from pruna_ir.errors import CaptureError, UsageError


@given(st.integers(1, 40), st.integers(1, 12))
def test_batches_cover_every_sample_once_and_again(samples, batch_size):
    data = TensorData((torch.arange(samples),), torch.arange(samples) * 2, batch_size)
    for _ in range(2):
        batches = list(data)
        assert len(batches) == len(data)
        assert torch.cat([b.inputs[0] for b in batches]).tolist() == list(range(samples))
        assert torch.cat([b.labels for b in batches]).tolist() == list(range(0, 2 * samples, 2))


def test_take_keeps_the_first_samples():
    data = TensorData((torch.arange(5),), torch.arange(5), 2).take(3)
    assert [batch.labels.tolist() for batch in data] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("inputs", "labels", "batch_size", "message"),
    [
        ((torch.zeros(3), torch.zeros(4)), None, 1, r"not \[3, 4\]"),
        ((torch.zeros(3),), torch.zeros(2), 1, r"not \[2, 3\]"),
        ((torch.zeros(0, 3),), None, 1, r"not \[0\]"),
        ((torch.zeros(3),), None, 0, "batch_size must be at least 1"),
    ],
)
def test_an_unusable_source_is_refused(inputs, labels, batch_size, message):
    with pytest.raises(UsageError, match=message):
        TensorData(inputs, labels, batch_size)


def test_a_file_with_inputs_by_name_and_labels(tmp_path):
    np.savez(tmp_path / "d.npz", b=np.ones((4, 2), np.float32), a=np.zeros(4), labels=np.arange(4))
    data = load_data(tmp_path / "d.npz", ("a", "b"), batch_size=3)
    first = next(iter(data))
    assert [tuple(tensor.shape) for tensor in first.inputs] == [(3,), (3, 2)]
    assert first.labels.tolist() == [0, 1, 2]


def test_a_single_input_may_have_any_name(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.ones((4, 2), np.float32))
    assert len(load_data(tmp_path / "d.npz", ("x",)).inputs) == 1


def write_objects(path):
    np.savez(path, x=np.array([{"a": 1}], dtype=object), allow_pickle=True)


def write_truncated(path):
    np.savez(path, x=np.zeros((50, 50)))
    path.write_bytes(path.read_bytes()[:500])


def write_other_names(path):
    np.savez(path, a=np.zeros(3), b=np.zeros(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_objects, "Object arrays cannot be loaded"),
        (write_truncated, "npz file"),
        (write_other_names, "has no array named 'x'; it holds a, b"),
        (lambda path: path.write_text("not a zip"), "npz file"),
        (Path.touch, "npz file"),
    ],
)
def test_a_bad_file_is_refused_with_its_path(tmp_path, write, message):
    path = tmp_path / "d.npz"
    write(path)
    with pytest.raises(CaptureError, match=message) as caught:
        load_data(path, ("x",))
    assert str(path) in str(caught.value)

"""Tensors in shared pieces of memory: apart from one another, of any size and dtype."""

from __future__ import annotations

import copy

import pytest
import torch

from pruna_ir.huge_pages import PIECE, HugePages


def test_tensors_do_not_overlap_and_are_aligned():
    memory = HugePages()
    made = [memory.empty([size, 7], torch.float32) for size in (1000, 3, 2049, 501)]
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, tensor in enumerate(made):
        assert bool((tensor == number).all())
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()


def test_each_has_a_storage_of_its_own():
    memory = HugePages()
    a, b = (memory.empty([2000], torch.float32) for _ in range(2))
    assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes() == 8000
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [[0, 5], [1], [4096, 3], [PIECE // 8 + 5]])
def test_any_dtype_and_size_even_beyond_a_piece(shape: list[int], dtype: torch.dtype):
    tensor = HugePages().empty(shape, dtype)
    assert list(tensor.shape) == shape
    assert tensor.dtype == dtype
    assert bool((tensor.zero_() == 0).all())


def test_a_tensor_outlives_the_others_and_can_be_copied():
    tensor = HugePages().empty([5000], torch.float32).fill_(3.0)
    assert torch.equal(copy.deepcopy(tensor), torch.full([5000], 3.0))
    tensor.add_(1.0)
    assert float(tensor.sum()) == 20000.0


def test_scratch_is_used_again_and_grows():
    memory = HugePages()
    small = memory.scratch([3, 5], torch.float32).fill_(1.0)
    again = memory.scratch([2, 4], torch.bfloat16)
    assert small.shape == (3, 5)
    assert again.data_ptr() == small.data_ptr()
    large = memory.scratch([100, 7], torch.float64).fill_(2.0)
    assert large.shape == (100, 7)
    assert bool((small == 1.0).all())

"""Packed weights: nibbles come back, and blocks are found from values."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.packed_weights import blocked, pack_nibbles, unpack_nibbles

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), max_size=2), st.integers(0, 9), st.booleans(), seeds)
def test_nibbles_come_back(outer: list[int], count: int, signed: bool, seed: int) -> None:
    low, high = (-8, 8) if signed else (0, 16)
    kind = np.int8 if signed else np.uint8
    values = np.random.default_rng(seed).integers(low, high, (*outer, count)).astype(kind)
    packed = pack_nibbles(values)
    assert packed.dtype == np.uint8
    assert packed.shape == (*outer, (count + 1) // 2)
    found = unpack_nibbles(packed, count, signed=signed)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, values)


def test_the_first_value_is_the_low_half() -> None:
    assert pack_nibbles(np.array([1, 15, 3], np.uint8)).tolist() == [0xF1, 0x03]


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.booleans(), seeds)
def test_blocks_are_found_and_stand_for_the_same_numbers(
    outputs: int, inputs: int, block: int, signed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kind = np.int8 if signed else np.uint8
    limits = np.iinfo(kind)
    q = rng.integers(limits.min, limits.max + 1, (outputs, inputs)).astype(kind)
    count = -(-inputs // block)
    scale = rng.random((outputs, count)).astype(np.float32).repeat(block, 1)[:, :inputs]
    zero = rng.integers(limits.min, limits.max + 1, (outputs, count)).astype(kind)
    zero = zero.repeat(block, 1)[:, :inputs]
    found = blocked(q, scale, zero)
    reals = (q.astype(np.float32) - zero.astype(np.float32)) * scale
    np.testing.assert_array_equal(found.reals(), reals)
    assert found.block >= min(block, inputs)
    padded = found.padded()
    assert padded.integers.shape[1] % padded.block == 0
    np.testing.assert_array_equal(padded.reals()[:, :inputs], reals)
    assert not padded.reals()[:, inputs:].any()
    smaller = found.repeated(1) if found.block != inputs else found.repeated(3)
    np.testing.assert_array_equal(smaller.reals(), reals)


def test_bits_are_those_that_integers_and_zero_points_need() -> None:
    scale = np.ones((1, 2), np.float32)
    zero = np.zeros((1, 2), np.int8)
    for values, kind, bits in (
        ([-8, 7], np.int8, 4), ([-9, 7], np.int8, 8), ([-8, 8], np.int8, 8),
        ([0, 15], np.uint8, 4), ([0, 16], np.uint8, 8),
    ):  # fmt: skip
        assert blocked(np.array([values], kind), scale, zero.astype(kind)).bits == bits
    wide = np.full((1, 2), 16, np.uint8)
    assert blocked(np.ones((1, 2), np.uint8), scale, wide).bits == 8

"""Packed weights: integers of a matrix by blocks, and two of 4 bits in a byte.

What a runtime stores of a weight [outputs, inputs] are integers, and a scale and zero point for
each block of each row. An exporter finds them behind reshapes and transpositions; `blocked` takes
them element by element and finds the blocks from the values, whatever the views were:

    W[n, k] = (q[n, k] - z[n, k // block]) * s[n, k // block]

Two nibbles share a byte, the first in its low half: the order of ONNX, OpenVINO and NumPy's
little-endian bit streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlockedWeight:
    """The integers of a matrix with the scales and zero points of its blocks.

    Attributes:
        integers: [outputs, inputs], int8 or uint8.
        scale: float32 [outputs, blocks].
        zero_point: [outputs, blocks], of the dtype of ``integers``.
        block: the number of inputs of a block; the last one of a row may have fewer.
    """

    integers: Array
    scale: Array
    zero_point: Array
    block: int

    @property
    def bits(self) -> int:
        """4 where every integer and zero point fits into 4 bits of its signedness, else 8."""
        low, high = (-8, 7) if self.integers.dtype == np.int8 else (0, 15)
        least = min(self.integers.min(initial=0), self.zero_point.min(initial=0))
        most = max(self.integers.max(initial=0), self.zero_point.max(initial=0))
        return 4 if low <= least and most <= high else 8

    def repeated(self, block: int) -> BlockedWeight:
        """The same weight with other blocks, of a size that divides the present one's.

        Any size will do where a row is one block.
        """
        inputs = self.integers.shape[1]
        starts = np.arange(0, inputs, block) // self.block
        scale, zero = (np.ascontiguousarray(v[:, starts]) for v in (self.scale, self.zero_point))
        return BlockedWeight(self.integers, scale, zero, block)

    def padded(self) -> BlockedWeight:
        """The same weight with zeros behind each row, so that its last block is full."""
        short = -self.integers.shape[1] % self.block
        # What a short block is filled up with must stand for 0.
        fill = np.repeat(self.zero_point[:, -1:], short, axis=1)
        return replace(self, integers=np.concatenate([self.integers, fill], axis=1))

    def reals(self) -> Array:
        """The float32 matrix that the integers stand for."""
        inputs = self.integers.shape[1]
        where = np.arange(inputs) // self.block
        levels = self.integers.astype(np.float32) - self.zero_point[:, where].astype(np.float32)
        return np.asarray(levels * self.scale[:, where], dtype=np.float32)


def blocked(integers: Array, scale: Array, zero_point: Array) -> BlockedWeight:
    """A weight from its integers, scales and zero points, all [outputs, inputs].

    The blocks are the largest of one size, from the start of the row, on which scale and zero
    point are constant; the whole row where they are constant on that.

    >>> scale = np.array([[1.0, 1.0, 2.0, 2.0]], dtype=np.float32)
    >>> found = blocked(np.ones((1, 4), np.int8), scale, np.zeros((1, 4), np.int8))
    >>> found.block, found.scale.tolist()
    (2, [[1.0, 2.0]])
    """
    inputs = integers.shape[1]
    changes = (np.diff(scale, axis=1) != 0) | (np.diff(zero_point, axis=1) != 0)
    edges = np.flatnonzero(changes.any(axis=0)) + 1
    block = math.gcd(*edges.tolist()) or inputs
    return BlockedWeight(
        np.ascontiguousarray(integers),
        np.ascontiguousarray(scale[:, ::block], dtype=np.float32),
        np.ascontiguousarray(zero_point[:, ::block]),
        block,
    )


def pack_nibbles(values: Array) -> Array:
    """Two values a byte along the last dimension, an odd one padded with 0; uint8.

    >>> pack_nibbles(np.array([1, 2, -1], dtype=np.int8)).tolist()
    [33, 15]
    """
    halves = values.astype(np.uint8) & 15
    if halves.shape[-1] % 2:
        halves = np.concatenate([halves, np.zeros_like(halves[..., :1])], axis=-1)
    return np.asarray(halves[..., 0::2] | (halves[..., 1::2] << 4), dtype=np.uint8)


def unpack_nibbles(packed: Array, count: int, *, signed: bool) -> Array:
    """The inverse of `pack_nibbles`: ``count`` values along the last dimension.

    >>> unpack_nibbles(np.array([33, 15], dtype=np.uint8), 3, signed=True).tolist()
    [1, 2, -1]
    """
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    values = halves[..., :count]
    if not signed:
        return np.asarray(values, dtype=np.uint8)
    return np.asarray((values.astype(np.int8) ^ 8) - 8, dtype=np.int8)

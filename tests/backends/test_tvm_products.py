"""Packed matrix products: any sizes, batches, epilogues; and what torch spells with reshapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_plain_products import with_plain_products
from pruna_ir.backends.tvm_products import (
    Registers,
    Tile,
    batched_product,
    choose_tile,
    pack,
    packed_product,
)
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions
from pruna_ir.transform import Context
from tests.backends.tvm_expressions import Array, compiled

AVX512, AVX2 = Registers(16, 32), Registers(8, 16)
PROCESSORS = st.sampled_from((AVX512, AVX2))
BATCHES = (((2,), (2,)), ((3,), (1,)), ((1,), (2,)), ((2, 1), (3,)))


def within_rounding(actual: Array, a: Array, b: Array, added: float = 0.0) -> bool:
    """Whether each sum of K products is within K + 3 roundings of the float64 one; NaN is not."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64) + added
    return bool((np.abs(actual - exact) <= (a.shape[-1] + 3) * 2.0**-24 * size).all())


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 130), PROCESSORS)
def test_packed_product_of_any_sizes(m: int, k: int, n: int, registers: Registers) -> None:
    rng = np.random.default_rng([m, k, n])
    a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((2, m, k), (k, n)))
    tile = choose_tile(m, n, k, registers)
    actual = compiled(
        lambda left, right: packed_product(n, tile)(left, pack(right, tile.panel)), a, b
    )
    assert within_rounding(actual, a, b)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 70), st.sampled_from(BATCHES))
def test_batched_product_of_any_sizes(
    m: int, k: int, n: int, batches: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    rng = np.random.default_rng([m, k, n])
    a = rng.standard_normal((*batches[0], m, k), dtype=np.float32)
    b = rng.standard_normal((*batches[1], k, n), dtype=np.float32)
    tile = choose_tile(m, n, k, AVX512)
    assert within_rounding(compiled(batched_product(tile), a, b), a, b)


def test_the_check_finds_a_missing_product() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((5, 7), (7, 3)))
    assert within_rounding(a @ b, a, b)
    assert not within_rounding(a[:, :6] @ b[:6], a, b)
    assert not within_rounding(np.where(a @ b > 1, np.nan, a @ b), a, b)


@pytest.mark.parametrize(("m", "n"), [(13, 16), (8, 48), (7, 33), (1, 1000)])
def test_what_follows_is_computed_in_the_write_back(m: int, n: int) -> None:
    from tvm import te, tirx

    rng = np.random.default_rng(m)
    a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((m, 9), (9, n)))
    bias, residual = (rng.standard_normal(s, dtype=np.float32) for s in ((n,), (m, n)))
    tile = choose_tile(m, n, 9, AVX512)

    def expression(left: Any, right: Any, shift: Any, other: Any) -> Any:
        product = packed_product(n, tile)(left, pack(right, tile.panel))
        shifted = te.compute((m, n), lambda i, j: product[i, j] + shift[j], name="shifted")
        positive = te.compute(
            (m, n), lambda i, j: tirx.max(shifted[i, j], tirx.const(0, "float32")), name="positive"
        )
        return te.compute((m, n), lambda i, j: positive[i, j] + other[i, j], name="total")

    actual = compiled(expression, a, b, bias, residual)
    exact = np.maximum(a.astype(float) @ b.astype(float) + bias, 0) + residual
    assert np.abs(actual - exact).max() < 1e-5


@given(st.integers(0, 500), st.integers(1, 5000), st.integers(1, 5000), PROCESSORS)
def test_a_tile_fits_into_the_registers(
    rows: int, columns: int, depth: int, registers: Registers
) -> None:
    tile = choose_tile(rows, columns, depth, registers)
    assert tile.rows * tile.vectors + tile.vectors + 1 < registers.count
    assert tile.lanes == registers.lanes
    assert not rows or tile.rows <= rows
    assert (tile.vectors - 1) * tile.lanes < columns


def test_the_rule_for_known_shapes() -> None:
    assert choose_tile(64, 768, 3072, AVX512) == Tile(8, 3, 16)
    assert choose_tile(1, 1000, 2048, AVX512).rows == 1
    assert choose_tile(0, 1000, 2048, AVX512).rows == 6


# -- from torch -----------------------------------------------------------------------------------


class Dense(torch.nn.Module):
    """A dense layer as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 10))
        self.bias = torch.nn.Parameter(torch.randn(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, 6), self.weight)
        return rows.reshape(*x.shape[:-1], 10)


def names(program: Any) -> list[str]:
    return [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]


def test_a_product_of_flattened_rows_loses_its_reshapes() -> None:
    made = capture(Dense(), (torch.randn(2, 5, 6),))
    plain = with_plain_products(made)
    assert names(plain)[-2:] == ["aten.matmul.default", "aten.add.Tensor"]
    x = torch.randn(3, 5, 6)
    assert torch.allclose(plain(x)[0], made(x)[0], atol=1e-6)


def test_a_scaled_product_keeps_its_reshapes() -> None:
    class Scaled(Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.addmm(self.bias, x.reshape(-1, 6), self.weight, alpha=2)
            return rows.reshape(*x.shape[:-1], 10)

    made = capture(Scaled(), (torch.randn(2, 5, 6),))
    assert "aten.addmm.default" in names(with_plain_products(made))


class Attention(torch.nn.Module):
    """Attention with each of its options; one row of the masks has no key."""

    def __init__(self) -> None:
        super().__init__()
        allowed = torch.rand(5, 7) > 0.4
        allowed[2] = False
        self.register_buffer("allowed", allowed)
        self.register_buffer("added", torch.where(allowed, 0.5, -torch.inf))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        v, pair, attend = k.tanh(), k[:, :2], scaled_dot_product_attention
        return (
            attend(q, k, v),
            attend(q, k, v, is_causal=True),
            attend(q, k, v, attn_mask=self.allowed, scale=0.3),
            attend(q, k, v, attn_mask=self.added),
            attend(q, pair, pair.sin(), enable_gqa=True),
        )


def test_attention_of_every_kind_for_every_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = capture(Attention(), (torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6)))
    ToTvm().lower(made, tmp_path, Context())
    runner = ToTvm().load(tmp_path, LoadOptions(threads=1))
    q, k = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 7, 6)
    actual = runner.run([q.numpy(), k.numpy()])
    expected = made(q, k)
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 2e-6
    assert not actual[2][:, :, 2].any()
    assert not actual[3][:, :, 2].any()

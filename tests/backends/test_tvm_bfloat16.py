"""bfloat16 products: rounding to the bit, any sizes, and what a program's layers become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_bfloat16 import bfloat16_product, narrow, pack_pairs, widen
from pruna_ir.backends.tvm_build import has_dots, host_target
from pruna_ir.backends.tvm_dot import BFLOAT16
from pruna_ir.backends.tvm_products import Registers, choose_tile
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.test_tvm_integer_products import language_model, vision_transformer
from tests.backends.tvm_expressions import Array, compiled

AVX512 = Registers(16, 32)
NATIVE = pytest.mark.skipif(
    not has_dots(host_target(), BFLOAT16), reason="this processor has no AVX512-BF16"
)


def test_every_number_is_rounded_as_torch_rounds_it() -> None:
    """All exponents, both signs, ties, NaN that would round up to infinity, infinities, zeros."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 40000, np.uint32)
    ties = (rng.integers(0, 2**16, 4000, np.uint32) << 16) | np.uint32(0x8000)
    special = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0], np.uint32)
    x = np.concatenate([bits, ties, special]).view(np.float32)
    actual = compiled(lambda a: widen(narrow(a)), x)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(actual, expected, equal_nan=True)
    assert np.array_equal(np.signbit(actual), np.signbit(x))


def product(a: Array, w: Array, *, transposed: bool = False) -> Array:
    m, (k, n) = a.shape[-2], w.shape
    tile = choose_tile(m, n, -(-k // 2), AVX512)

    def expression(rows: Any, weight: Any) -> Any:
        packed = pack_pairs(narrow(weight), tile.panel, transposed)
        return bfloat16_product(n, tile)(narrow(rows), packed)

    return compiled(expression, a, np.ascontiguousarray(w.T) if transposed else w)


def operands(m: int, k: int, n: int) -> tuple[Array, Array]:
    rng = np.random.default_rng([m, k, n])
    a, w = (rng.standard_normal(s, dtype=np.float32) for s in ((2, m, k), (k, n)))
    return a, w


def within_rounding(actual: Array, a: Array, w: Array) -> bool:
    """Whether each sum is within K + 3 float32 roundings of that of the rounded operands."""
    left, right = (torch.from_numpy(v).bfloat16().double().numpy() for v in (a, w))
    bound = (a.shape[-1] + 3) * 2.0**-24 * (np.abs(left) @ np.abs(right))
    return bool((np.abs(actual - left @ right) <= bound).all())


@NATIVE
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 130), st.booleans())
def test_products_of_any_sizes(m: int, k: int, n: int, transposed: bool) -> None:
    a, w = operands(m, k, n)
    assert within_rounding(product(a, w, transposed=transposed), a, w)


def test_the_check_finds_operands_that_were_not_rounded() -> None:
    a, w = operands(5, 7, 3)
    left, right = (torch.from_numpy(v).bfloat16().double().numpy() for v in (a, w))
    assert within_rounding(left @ right, a, w)
    assert not within_rounding(a.astype(float) @ w, a, w)
    assert not within_rounding(left[..., :6] @ right[:6], a, w)


# -- programs -------------------------------------------------------------------------------------

CAST = "canonicalize,cast-floats{dtype=bfloat16}"


def cast(make: Any) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    model, data = make()
    arguments = ((), {"input_ids": data[:2]}) if data.dtype is torch.int64 else ((data[:2],), {})
    return Pipeline.parse(CAST).run(capture(model, *arguments), Context()).program, data


@NATIVE
@pytest.mark.parametrize("make", [language_model, vision_transformer])
def test_transformers_pass_their_certificates(make: Any, tmp_path: Path) -> None:
    program, data = cast(make)
    artifact = build(program, "tvm", tmp_path / "artifact")
    assert artifact.certificate.verdict is Verdict.PASSED
    runner = artifact.load()
    linear = {row.precision for row in runner.audit() if row.kind == "linear"}
    assert linear == {"bfloat16"}
    assert np.isfinite(runner.run([data[:3].numpy()])[0]).all()


def dense() -> tuple[torch.nn.Module, torch.Tensor]:
    return torch.nn.Linear(7, 5), torch.randn(8, 7)


def test_a_processor_without_the_instruction_multiplies_float32(tmp_path: Path) -> None:
    program, data = cast(dense)
    backend = ToTvm(cpu="x86-64-v3")
    with pytest.warns(RuntimeWarning, match="x86-64-v3 has no AVX512-BF16"):
        lowered = backend.lower(program, tmp_path, Context())
    assert any("AVX512-BF16" in text for text in lowered.warnings)
    runner = backend.load(tmp_path, LoadOptions(threads=1))
    assert [r.precision for r in runner.audit() if r.kind == "linear"] == ["float32"]
    with torch.no_grad():
        expected = program(data)[0].numpy()
    # the program rounds its result to bfloat16, the artifact does not
    assert np.abs(runner.run([data.numpy()])[0] - expected).max() <= 2.0**-8 * 4


def test_weights_are_stored_in_two_bytes(tmp_path: Path) -> None:
    program, _ = cast(dense)
    lowered = ToTvm().lower(program, tmp_path, Context())
    assert lowered.facts["stored-parameter-bytes"] == 7 * 5 * 2 + 5 * 4

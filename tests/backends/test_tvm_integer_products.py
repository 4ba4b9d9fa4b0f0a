"""Products on integers: every sum exact for any sizes, and what a program's layers become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import has_dots, host_target
from pruna_ir.backends.tvm_bytes import Grid
from pruna_ir.backends.tvm_integer_products import column_sums, integer_product, pack_words
from pruna_ir.backends.tvm_products import Registers, choose_tile
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.tvm_expressions import Array, compiled

AVX512 = Registers(16, 32)
NATIVE = pytest.mark.skipif(
    not has_dots(host_target()), reason="this processor has no AVX512-VNNI"
)


def integers(m: int, k: int, n: int) -> tuple[Array, Array]:
    """Bytes of every size, the largest and smallest among them."""
    rng = np.random.default_rng([m, k, n])
    a, w = rng.integers(0, 256, (2, m, k), np.uint8), rng.integers(-127, 128, (k, n), np.int8)
    a.flat[0], w.flat[0] = 255, -127
    return a, w


def product(a: Array, w: Array, point: int, *, transposed: bool = False) -> Array:
    """``(a - point) @ w`` as an artifact computes it, with scales of one."""
    m, (k, n) = a.shape[-2], w.shape
    tile = choose_tile(m, n, -(-k // 4), AVX512)

    def expression(q: Any, weight: Any, scale: Any, zero: Any) -> Any:
        packed = pack_words(weight, tile.panel, transposed)
        sums = column_sums(weight, zero, transposed)
        return integer_product(n, tile)(q, packed, sums, scale)

    given_weight = np.ascontiguousarray(w.T) if transposed else w
    return compiled(expression, a, given_weight, np.ones(n, np.float32), Grid(1, point).numbers[1])


def reference(a: Array, w: Array, point: int) -> Array:
    return (a.astype(np.int64) - point) @ w.astype(np.int64)


@NATIVE
@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 130), st.integers(0, 255), st.booleans()
)
def test_every_sum_is_exact_for_any_sizes(
    m: int, k: int, n: int, point: int, transposed: bool
) -> None:
    a, w = integers(m, k, n)
    assert np.array_equal(product(a, w, point, transposed=transposed), reference(a, w, point))


@NATIVE
def test_the_largest_bytes_do_not_saturate() -> None:
    """Sums of 2^24 and more are rounded as float32 rounds them, and none wraps."""
    a, w = np.full((1, 3, 4099), 255, np.uint8), np.full((4099, 5), -127, np.int8)
    exact = reference(a, w, 0).astype(np.float32)
    assert np.array_equal(product(a, w, 0), exact)


@NATIVE
def test_the_check_finds_one_wrong_byte() -> None:
    a, w = integers(5, 7, 3)
    other = a.copy()
    other[1, 4, 6] ^= 1
    assert not np.array_equal(product(other, w, 3), reference(a, w, 3))


# -- programs -------------------------------------------------------------------------------------


class Products(torch.nn.Module):
    """A product, its activation on a grid of its own, and one of a weight with zero points."""

    def __init__(self, *, points: int = 0) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(7, 33), torch.nn.Linear(33, 5)
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("point", torch.tensor(113, dtype=torch.int32))
        self.register_buffer("steps", torch.full((5,), 0.01))
        self.register_buffer("points", torch.full((5,), points, dtype=torch.int32))
        self.register_buffer("step", torch.tensor(0.01))
        self.register_buffer("none", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = fake_quant(x, self.scale, self.point, None, 0, 255)
        weight = fake_quant(self.first.weight, self.step, self.none, None, -127, 127)
        x = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, self.first.bias))
        x = fake_quant(x, self.scale, self.none, None, -128, 127)
        weight = fake_quant(self.second.weight, self.steps, self.points, 0, -127, 127)
        return torch.nn.functional.linear(x, weight, self.second.bias)


def rows(made: Program, folder: Path, cpu: str = "") -> list[tuple[str, str]]:
    backend = ToTvm(cpu=cpu)
    backend.lower(made, folder, Context())
    audit = backend.load(folder, LoadOptions(threads=1)).audit()
    return [(row.kind, row.precision) for row in audit if row.kind == "linear"]


@NATIVE
@pytest.mark.parametrize(("points", "second"), [(0, "int8"), (3, "float32")])
def test_the_audit_names_what_is_multiplied(points: int, second: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = capture(Products(points=points).eval(), (torch.randn(2, 3, 7),))
    assert rows(made, tmp_path) == [("linear", "int8"), ("linear", second)]
    runner = ToTvm().load(tmp_path, LoadOptions(threads=1))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 7)
        with torch.no_grad():
            expected = made(x)[0].numpy()
        found = np.abs(runner.run([x.numpy()])[0] - expected).max()
        assert found < 2e-6


def test_a_processor_without_the_instruction_computes_in_float32(tmp_path: Path) -> None:
    made = capture(Products().eval(), (torch.randn(2, 3, 7),))
    with pytest.warns(RuntimeWarning, match="x86-64-v3 has no AVX512-VNNI"):
        assert rows(made, tmp_path, "x86-64-v3") == [("linear", "float32")] * 2


INT8 = "canonicalize,insert-fake-quant{samples=8},eliminate-dead-code"


def language_model() -> tuple[torch.nn.Module, torch.Tensor]:
    import transformers

    sizes = {"n_layer": 1, "n_embd": 48, "n_head": 4, "vocab_size": 90}
    config = transformers.GPT2Config(**sizes, use_cache=False)
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 90, (8, 19))


def encoder() -> tuple[torch.nn.Module, torch.Tensor]:
    import transformers

    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=100,
        vocab_size=90,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    return model, torch.randint(0, 90, (8, 19))


def vision_transformer() -> tuple[torch.nn.Module, torch.Tensor]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, embed_dim=48, depth=1, num_heads=3, num_classes=10
    )
    return model.eval(), torch.randn(8, 3, 48, 48)


@NATIVE
@pytest.mark.parametrize("make", [language_model, encoder, vision_transformer])
def test_transformers_pass_their_certificates(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = make()
    arguments = ((), {"input_ids": data[:2]}) if data.dtype is torch.int64 else ((data[:2],), {})
    context = Context(data=TensorData((data,), batch_size=4), target="tvm")
    program = Pipeline.parse(INT8).run(capture(model, *arguments), context).program
    artifact = build(program, "tvm", tmp_path / "artifact")
    assert artifact.certificate.verdict is Verdict.PASSED
    audit = artifact.load().audit()
    assert {row.precision for row in audit if row.kind == "linear"} == {"int8"}

"""Weight-only and dynamic quantisation in every runtime: what runs, how large, and how right."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
import torch

from pruna_ir.backends.to_tensorrt import ToTensorrt
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.certify import audit_summary
from pruna_ir.errors import UsageError
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.onnx_blocks import pack_products
from pruna_ir.onnx_export import export_onnx
from pruna_ir.passes.quantize_dynamically import QuantizeDynamically
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply
from tests.backends import runtime_cases as cases
from tests.passes.products import gpt2, products

FORMS = {
    "int8": {"bits": 8},
    "int8 blocks": {"bits": 8, "block": 32},
    "int4": {"bits": 4},
    "int4 blocks": {"bits": 4, "block": 32},
    "int4 zero points": {"bits": 4, "block": 16, "symmetric": False},
    "int8 zero points": {"bits": 8, "symmetric": False},
}


@cache
def float_products() -> Program:
    return products()


@cache
def weight_only(form: str) -> Program:
    return apply(QuantizeWeights(**FORMS[form]), float_products()).program


@cache
def language_model() -> Program:
    return gpt2()


def linears(artifact) -> dict[str, int]:
    return audit_summary(artifact.certificate.audit).get("linear", {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_weights_stay_integers_in_the_runtime(form: str, backend: str, tmp_path) -> None:
    artifact = cases.built(weight_only(form), backend, tmp_path / "out")
    assert linears(artifact) == {f"{form[:4]} weights": 3}


@pytest.mark.parametrize("form", ["int8", "int4 zero points"])
def test_tvm_stores_bytes_and_computes_in_float(form: str, tmp_path) -> None:
    artifact = cases.built(weight_only(form), "tvm", tmp_path / "out")
    assert linears(artifact) == {"float32": 3}
    assert artifact.manifest.facts["stored-parameter-bytes"] < 12_000
    said = [row.detail for row in artifact.certificate.audit if row.kind == "linear"]
    width = "uint8" if "zero" in form else "int8"
    assert said == [f"{width} weights, expanded to float32 at load"] * 3


def test_tvm_says_nothing_of_the_kind_about_float_weights(tmp_path) -> None:
    artifact = cases.built(float_products(), "tvm", tmp_path / "out")
    assert {row.detail for row in artifact.certificate.audit} == {""}


@pytest.mark.parametrize("form", ["int8", "int8 blocks", "int4 blocks"])
def test_tensorrt_builds_and_its_model_is_right(form: str, tmp_path) -> None:
    """The ONNX model behind the engine is the program's function, and holds a byte a weight."""
    program = weight_only(form)
    artifact = build(program, "tensorrt", tmp_path / "out", options=LoadOptions(threads=1))
    if not torch.cuda.is_available():
        assert artifact.certificate.verdict is Verdict.NOT_RUN
    model = onnx.load(tmp_path / "out" / "model.onnx")
    stored = {t.name: t.data_type for t in model.graph.initializer if "quantized" in t.name}
    assert list(stored.values()) == [onnx.TensorProto.INT8] * 3
    runner = ToTensorrt().load_intermediate(tmp_path / "out", LoadOptions(threads=1))
    x = torch.randn(2, 3, 64)
    (found,) = runner.run([x.numpy()])
    right = program(x)[0].detach().numpy()
    assert np.abs(found - right).max() < 1e-5 * np.abs(right).max()
    wrong = float_products()(x)[0].detach().numpy()
    assert np.abs(found - wrong).max() > 1e-3 * np.abs(right).max()


def test_tensorrt_refuses_zero_points_before_any_work() -> None:
    with pytest.raises(UsageError, match="without zero points only; leave out symmetric=false"):
        apply(QuantizeWeights(symmetric=False), float_products(), Context(target="tensorrt"))


@pytest.mark.parametrize(("symmetric", "most"), [(True, 4.6), (False, 4.7)])
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_int4_takes_half_a_byte_and_its_scales(
    backend: str, symmetric: bool, most: float, tmp_path
) -> None:
    torch.manual_seed(0)
    inputs, outputs = 512, 384
    program = capture(torch.nn.Linear(inputs, outputs, bias=False), (torch.randn(2, inputs),))
    pass_ = QuantizeWeights(bits=4, block=64, symmetric=symmetric)
    cases.built(apply(pass_, program).program, backend, tmp_path / "out")
    name = "model.onnx" if backend == "onnx" else "model.bin"
    bits = 8 * (tmp_path / "out" / name).stat().st_size / (inputs * outputs)
    assert 4.5 <= bits < most


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_wrong_weights_are_told_from_right_ones(backend: str, tmp_path) -> None:
    cases.check_faults_fail(weight_only("int4 blocks"), backend, "wide.weight", tmp_path)


@pytest.mark.parametrize("backend", ["onnx", "openvino", "tvm"])
def test_a_wrong_scale_is_told_from_a_right_one(backend: str, tmp_path) -> None:
    program = weight_only("int4 zero points")
    wrong = cases.changed(program, "turned.weight_zero_point", lambda z: (z + 1).clamp(0, 15))
    artifact = build(
        wrong, backend, tmp_path / "out", options=LoadOptions(threads=1), verify=False
    )
    x = torch.randn(2, 3, 64)
    (found,) = artifact.load(LoadOptions(threads=1)).run([x.numpy()])
    right = program(x)[0].detach().numpy()
    assert np.abs(found - right).max() > 0.01 * np.abs(right).max()


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_every_addmm_of_gpt2_runs_on_int4_weights_but_the_excluded(backend, tmp_path) -> None:
    excluded = ("lm_head", "transformer.h.0.attn*")
    pass_ = QuantizeWeights(bits=4, block=32, exclude=excluded)
    program = apply(pass_, language_model()).program
    artifact = cases.built(program, backend, tmp_path / "out")
    # Float: the two of the excluded attention, and the head.
    assert linears(artifact) == {"int4 weights": 6, "float32": 3}


def test_products_without_their_form_stay_as_they_are() -> None:
    """A static int8 program's products run on integers, and float ones have no integers."""
    for program in (float_products(), apply(QuantizeDynamically(), float_products()).program):
        model = export_onnx(program)
        before = [node.op_type for node in model.graph.node]
        assert pack_products(model) == 0
        assert [node.op_type for node in model.graph.node] == before


def test_the_packed_model_is_valid_and_holds_no_dequantised_weight() -> None:
    model = export_onnx(weight_only("int4 blocks"))
    assert pack_products(model) == 3
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 3
    assert not {"DequantizeLinear", "MatMul", "Gemm"} & set(kinds)
    assert len({t.name for t in model.graph.initializer}) == len(model.graph.initializer)


def test_onnx_runtime_ranges_activations_itself(tmp_path) -> None:
    program = apply(QuantizeDynamically(), float_products()).program
    artifact = cases.built(program, "onnx", tmp_path / "out")
    rows = [row for row in artifact.certificate.audit if row.kind == "linear"]
    assert [(row.precision, row.detail) for row in rows] == [
        ("int8", "com.microsoft.DynamicQuantizeMatMul")
    ] * 3


def test_products_that_share_an_input_share_its_range(tmp_path) -> None:
    program = apply(QuantizeDynamically(exclude=("lm_head",)), language_model()).program
    artifact = cases.built(program, "onnx", tmp_path / "out")
    assert linears(artifact) == {"int8": 8, "float32": 1}


@pytest.mark.parametrize("backend", ["openvino", "tvm"])
def test_other_runtimes_compute_the_same_in_float(backend: str, tmp_path) -> None:
    program = apply(QuantizeDynamically(), float_products()).program
    artifact = cases.built(program, backend, tmp_path / "out")
    expected = {"int8 weights": 3} if backend == "openvino" else {"float32": 3}
    assert linears(artifact) == expected

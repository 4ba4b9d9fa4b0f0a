"""The tensorrt backend: engines built ahead of time, the ONNX model behind them verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from pruna_ir.backends.tensorrt_engine import layer_rows
from pruna_ir.backends.to_tensorrt import MODEL, ToTensorrt, shape_for_tensorrt
from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError, ToolchainError, UsageError
from pruna_ir.lowering import KernelRow, LoadOptions, Lowered
from pruna_ir.onnx_export import export_onnx
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.backend_models import Block, SmallCnn, inputs, program

BACKEND = ToTensorrt()
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without")


def lowered(made: Program, folder: Path, backend: ToTensorrt = BACKEND) -> Lowered:
    return backend.lower(made, folder, Context())


def largest_difference(made: Program, folder: Path, x: torch.Tensor) -> float:
    runner = BACKEND.load_intermediate(folder, LoadOptions())
    assert runner is not None
    with torch.no_grad():
        expected = made(x)[0].numpy()
    (actual,) = runner.run([x.numpy()])
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


@pytest.mark.parametrize("kind", [SmallCnn, Block])
@pytest.mark.parametrize("int8", [False, True])
def test_the_model_behind_the_engine_computes_what_the_program_does(
    kind: type[torch.nn.Module], int8: bool, tmp_path: Path
) -> None:
    made = program(kind, int8=int8)
    lowered(made, tmp_path)
    for batch in (1, 3):
        assert largest_difference(made, tmp_path, inputs(kind, batch)) < 2e-6


def test_another_programs_artifact_is_told_apart(tmp_path: Path) -> None:
    lowered(program(SmallCnn, seed=1), tmp_path)
    other = program(SmallCnn, seed=2)
    assert largest_difference(other, tmp_path, inputs(SmallCnn, 3)) > 1e-2


def test_every_product_of_a_quantised_program_is_int8(tmp_path: Path) -> None:
    lowered(program(SmallCnn, int8=True), tmp_path)
    runner = BACKEND.load_intermediate(tmp_path, LoadOptions())
    assert runner is not None
    rows = [row for row in runner.audit() if row.kind in ("conv", "linear")]
    assert [row.precision for row in rows] == ["int8"] * 4


def test_a_float_programs_products_are_float32(tmp_path: Path) -> None:
    lowered(program(SmallCnn), tmp_path)
    runner = BACKEND.load_intermediate(tmp_path, LoadOptions())
    assert runner is not None
    assert {row.precision for row in runner.audit()} == {"float32"}
    assert {"conv", "linear"} <= {row.kind for row in runner.audit()}


def test_layers_are_read_from_the_build_log() -> None:
    tensor = "{{ Name: {}, Dimensions: [{}], Strides: [1], Datatype: {}, Format: (x) }}"
    x, w = tensor.format("x", "-1,4,9,9", "Int8"), tensor.format("w", "8,4,3,3", "Int8")
    y, a = tensor.format("y", "-1,8", "Float"), tensor.format("a", "-1,18", "Half")
    scale = tensor.format("s", "1", "Float")
    lines = [
        "Engine generation completed in 0.2 seconds.",
        f"Name: c, LayerType: correlation, Inputs: [ {x}], Constants: [ {w}, {scale}], "
        f"Outputs: [ {y}], TacticName: t1, StreamId: 0, Metadata: ",
        f"Name: g, LayerType: gemm, Inputs: [ {a}], Constants: [ {w}], Outputs: [ {y}], "
        "TacticName: t2, StreamId: 0, Metadata: ",
        f"Name: m, LayerType: gemm, Inputs: [ {a}, {a}], Constants: [ {scale}], "
        f"Outputs: [ {y}], TacticName: t3, StreamId: 0, Metadata: ",
        f"Name: __myl_MulFcAdd_myl0_6, LayerType: runtime_fusion, Inputs: [ {y}], "
        f"Constants: [ {w}], Outputs: [ {x}], TacticName: t4, StreamId: 0, Metadata: ",
        "Name: s, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , S",
        f"Name: k, LayerType: kgen, Inputs: [ {y}], Constants: [], Outputs: [ {x}], "
        "TacticName: t5, StreamId: 0, Metadata: ",
    ]
    assert list(layer_rows(lines)) == [
        KernelRow("c", "conv", "int8", "t1"),
        KernelRow("g", "linear", "float16", "t2"),
        KernelRow("m", "matmul", "float16", "t3"),
        KernelRow("__myl_MulFcAdd_myl0_6", "linear", "float32", "t4"),
        KernelRow("k", "kgen", "int8", "t5"),
    ]


def test_weights_are_stored_as_integers(tmp_path: Path) -> None:
    lowered(program(Block, int8=True), tmp_path)
    model = onnx.load(tmp_path / MODEL)
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    assert sorted(a.shape for a in stored if a.dtype == np.int8 and a.ndim == 2) == [
        (24, 24),
        (24, 50),
        (24, 72),
        (50, 24),
    ]
    assert {int(a.max()) for a in stored if a.dtype == np.int8 and a.ndim < 2} == {0}


def test_shaping_folds_shape_arithmetic_and_keeps_quantisers() -> None:
    model = export_onnx(program(Block, int8=True))
    shaped = onnx.load_from_string(shape_for_tensorrt(model))
    before = [node.op_type for node in model.graph.node]
    after = [node.op_type for node in shaped.graph.node]
    assert before.count("Trilu") == 1
    assert not {"Trilu", "Identity", "Constant", "Expand"} & set(after)
    for operator in ("QuantizeLinear", "DequantizeLinear", "MatMul"):
        assert after.count(operator) == before.count(operator)


def test_the_profile_spans_the_dynamic_batch(tmp_path: Path) -> None:
    facts = lowered(program(SmallCnn), tmp_path).facts
    assert facts["profile"] == {"batch": [1, 2, 32]}
    runner = BACKEND.load_intermediate(tmp_path, LoadOptions())
    assert runner is not None
    with pytest.raises(UsageError, match="batch from 1 to 32"):
        runner.run([np.zeros((33, 3, 17, 15), np.float32)])
    with pytest.raises(UsageError, match=r"input x is float64\[2, 3, 17, 15\]"):
        runner.run([np.zeros((2, 3, 17, 15))])


def test_the_compute_capability_is_chosen_and_stated(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("full TensorRT builds for the device at hand")
    made = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    facts = lowered(made, tmp_path, ToTensorrt(compute_capability="12.0")).facts
    assert facts["compute-capability"] == "12.0"
    with pytest.raises(UsageError, match=r"compute capability 9\.9; it knows 7\.5, 8\.0"):
        lowered(made, tmp_path, ToTensorrt(compute_capability="9.9"))


@needs_no_gpu
def test_without_a_device_it_builds_but_does_not_execute(tmp_path: Path) -> None:
    availability = BACKEND.availability()
    assert availability.build == ""
    assert availability.execute.startswith("no CUDA device")
    lowered(program(SmallCnn), tmp_path)
    with pytest.raises(ToolchainError, match="^no CUDA device$"):
        BACKEND.load(tmp_path, LoadOptions())


@pytest.mark.parametrize("name", ["model.engine", "model.onnx", "layers.json", "engine.json"])
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    lowered(capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),)), tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(LoweringError, match=r"not the file that was written|no whole"):
        BACKEND.load(tmp_path, LoadOptions())
    with pytest.raises(LoweringError, match=r"not the file that was written|no whole"):
        BACKEND.load_intermediate(tmp_path, LoadOptions())


class Determinants(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x) + torch.linalg.det(x.transpose(1, 2)).relu()


def test_names_every_node_that_tensorrt_cannot_parse() -> None:
    offenders = BACKEND.unsupported(capture(Determinants(), (torch.randn(2, 3, 3),)))
    assert [offender.operator for offender in offenders] == ["aten.linalg_det.default"] * 2
    assert {offender.reason for offender in offenders} == {"onnx.Det: TensorRT has no Det"}
    assert all("test_to_tensorrt.py" in offender.source for offender in offenders)
    assert BACKEND.unsupported(program(SmallCnn, int8=True)) == []


def test_resnet18(tmp_path: Path) -> None:
    import torchvision
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    made = capture(torchvision.models.resnet18().eval(), (x,))
    lowered(made, tmp_path)
    assert largest_difference(made, tmp_path, x[:1]) < 2e-5

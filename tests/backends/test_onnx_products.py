"""Integer products: bias, slices and attention in one operator, and what is left alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pruna_ir.backends.onnx_products import KIND, integer_products, split_gemms
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.quantize_dynamically import QuantizeDynamically
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply
from tests.backends import runtime_cases as cases


class Attention(nn.Module):
    """Self-attention of two heads, its projections in one."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(16, 48), nn.Linear(16, 16, bias=False), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 16))


def quantised(*, causal: bool = False, dynamic: bool = False) -> Program:
    torch.manual_seed(0)
    x = torch.randn(16, 5, 16)
    program = apply(Canonicalize(), capture(Attention(causal=causal).eval(), (x[:2],))).program
    pass_ = QuantizeDynamically() if dynamic else InsertFakeQuant(target="onnx")
    context = Context(data=TensorData((x,), batch_size=4), target="onnx")
    return apply(pass_, program, context).program


def kinds(folder) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "out/model.onnx").graph.node)


def test_attention_runs_on_integers_but_for_its_probabilities(tmp_path):
    """Queries, keys and values apart, their product, and the projection behind: five kernels."""
    artifact = cases.built(quantised(), "onnx", tmp_path / "out")
    summary = artifact.certificate.audit_summary()
    assert summary["linear"] == {"int8": 4}
    assert summary["matmul"] == {"int8": 1, "float32": 1}
    found = kinds(tmp_path)
    assert (found[KIND], found["MatMul"], found["Slice"], found["Add"]) == (5, 1, 0, 0)
    assert artifact.manifest.facts["disabled_optimizers"] == []
    names = [row.layer for row in artifact.certificate.audit]
    assert sum(name.startswith("qkv/") for name in names) == 3


def test_causal_attention_stays_float(tmp_path):
    """torch.onnx scales its query and key apart: integers would not reach the product."""
    program = quantised(causal=True)
    assert len(list(program.calls(FAKE_QUANT.op))) == 4
    artifact = cases.built(program, "onnx", tmp_path / "out")
    assert artifact.certificate.audit_summary()["matmul"] == {"float32": 2}


def test_ranges_found_at_run_time_take_the_same_form(tmp_path):
    artifact = cases.built(quantised(dynamic=True), "onnx", tmp_path / "out")
    assert artifact.certificate.audit_summary()["linear"] == {"int8": 4}
    assert kinds(tmp_path)["Add"] == 0


def product(*, zero: type = np.uint8, axis: int = 1, behind: str = "Add"):
    """A float32[2, 3] input, quantised, times an int8 [3, 3] weight, and what is behind it."""
    make, const = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = [
        const(np.float32(0.1), "sx"),
        const(np.asarray(7, zero), "zx"),
        const(np.arange(9, dtype=np.int8).reshape(3, 3), "w8"),
        const(np.linspace(0.1, 1, 3, dtype=np.float32), "sw"),
        const(np.zeros(3, np.int8), "zw"),
        const(np.linspace(-1, 1, 3, dtype=np.float32), "c"),
    ]
    nodes = [
        make("QuantizeLinear", ["x", "sx", "zx"], ["x8"]),
        make("DequantizeLinear", ["x8", "sx", "zx"], ["xf"]),
        make("DequantizeLinear", ["w8", "sw", "zw"], ["wf"], axis=axis),
        make("MatMul", ["xf", "wf"], ["y" if not behind else "p"]),
    ]
    if behind == "Add":
        nodes.append(make("Add", ["p", "c"], ["y"]))
    elif behind:
        nodes += [
            make("QuantizeLinear", ["p", "sx", "zx"], ["p8"]),
            make("DequantizeLinear", ["p8", "sx", "zx"], ["y"]),
        ]
    return _model(nodes, constants, [2, 3])


def _model(nodes, constants, sizes):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, 3])],
        [value("y", onnx.TensorProto.FLOAT, sizes)],
        constants,
    )
    opset = [onnx.helper.make_opsetid("", 19)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)


@pytest.mark.parametrize("behind", ["Add", ""])
def test_a_product_and_its_bias_are_one_operator(behind):
    model = product(behind=behind)
    assert integer_products(model) == 1
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", KIND]
    assert list(model.graph.node[1].input[6:]) == (["c"] if behind else [])
    assert {tensor.name for tensor in model.graph.initializer} >= {"w8", "sw"}
    assert integer_products(model) == 0


@pytest.mark.parametrize(
    "options", [{"zero": np.int8}, {"axis": 0}, {"behind": "QuantizeLinear"}]
)
def test_what_the_kernel_is_not_for_stays(options):
    """Signed activations, a scale for each row, a result that is quantised again."""
    model = product(**options)
    assert integer_products(model) == 0
    assert "MatMul" in [node.op_type for node in model.graph.node]


def test_a_number_behind_a_product_goes_into_its_scale():
    """And the runtime computes what the graph said."""
    import onnxruntime

    model = product(behind="")
    (made,) = [node for node in model.graph.node if node.op_type == "MatMul"]
    made.output[0] = "p"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.25), "q"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["p", "q"], ["y"]))
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    before = evaluate(model, x)
    assert integer_products(model) == 1
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", KIND]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], before, rtol=1e-5)


def gemm(trans_b: int, axis: int, *, bias: bool = True, alpha: float = 1.0):
    """A float32[2, 3] input, quantised, times an int8 [3, 4] weight."""
    make, const = onnx.helper.make_node, onnx.numpy_helper.from_array
    shape = (4, 3) if trans_b else (3, 4)
    weight = np.arange(12, dtype=np.int8).reshape(shape)
    channels = shape[axis]
    constants = [
        const(np.float32(0.1), "sx"),
        const(np.uint8(7), "zx"),
        const(weight, "w8"),
        const(np.linspace(0.1, 1, channels, dtype=np.float32), "sw"),
        const(np.zeros(channels, np.int8), "zw"),
        const(np.linspace(-1, 1, 4, dtype=np.float32), "c"),
    ]
    nodes = [
        make("QuantizeLinear", ["x", "sx", "zx"], ["x8"]),
        make("DequantizeLinear", ["x8", "sx", "zx"], ["xf"]),
        make("DequantizeLinear", ["w8", "sw", "zw"], ["wf"], axis=axis),
        make("Gemm", ["xf", "wf", *(["c"] if bias else [])], ["y"], transB=trans_b, alpha=alpha),
    ]
    return _model(nodes, constants, [2, 4])


def evaluate(model, x: np.ndarray) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("trans_b", "axis"), [(1, 0), (0, 1), (1, 1)])
def test_a_split_gemm_computes_the_same(trans_b, axis, bias):
    model = gemm(trans_b, axis, bias=bias)
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    before = evaluate(model, x)
    assert split_gemms(model.graph) == 1
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert "Gemm" not in kinds
    assert kinds[-1] == ("Add" if bias else "MatMul")
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-6)
    assert split_gemms(model.graph) == 0


def test_a_scaled_gemm_stays():
    model = gemm(1, 0, alpha=2.0)
    assert split_gemms(model.graph) == 0
    assert model.graph.node[-1].op_type == "Gemm"

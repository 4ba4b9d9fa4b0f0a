"""Strided convolutions over colours: the same integers in blocks, and which are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.backends.onnx_strided_images import fold_strides
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.transform import Context, apply
from tests.backends import runtime_cases as cases


def convolution(channels, kernel, stride, pads, size, *, zero=3, groups=1):
    """A quantised convolution of a [2, channels, *size] image to 5 channels."""
    make, const = onnx.helper.make_node, onnx.numpy_helper.from_array
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (5 * groups, channels // groups, *kernel)).astype(np.int8)
    constants = [
        const(np.float32(0.1), "sx"), const(np.uint8(zero), "zx"), const(weight, "w8"),
        const(np.linspace(0.1, 1, len(weight), dtype=np.float32), "sw"),
        const(np.zeros(len(weight), np.int8), "zw"),
    ]  # fmt: skip
    nodes = [
        make("QuantizeLinear", ["x", "sx", "zx"], ["x8"]),
        make("DequantizeLinear", ["x8", "sx", "zx"], ["xf"]),
        make("DequantizeLinear", ["w8", "sw", "zw"], ["wf"], axis=0),
        make("Conv", ["xf", "wf"], ["y"], kernel_shape=kernel, strides=[stride] * 2, pads=pads,
             group=groups),
    ]  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", onnx.TensorProto.FLOAT, [2, channels, *size])],
        [value("y", onnx.TensorProto.FLOAT, None)], constants,
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def evaluate(model) -> np.ndarray:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings)
    shape = session.get_inputs()[0].shape
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return session.run(None, {"x": x})[0]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(2, 4),
    st.tuples(*[st.integers(0, 3)] * 4), st.tuples(st.integers(2, 5), st.integers(2, 5)),
)  # fmt: skip
def test_it_is_the_same_convolution(channels, kernel, stride, pads, blocks):
    """Any kernel, padding and image: sums of integers differ by float rounding alone."""
    size = [stride * number for number in blocks]
    fits = zip(kernel, size, pads[:2], pads[2:], strict=True)
    assume(all(k <= image + ahead + behind for k, image, ahead, behind in fits))
    model = convolution(channels, kernel, stride, pads, size)
    before = evaluate(model)
    if fold_strides(model.graph):
        onnx.checker.check_model(model)
        kinds = [node.op_type for node in model.graph.node]
        assert kinds == ["QuantizeLinear", "SpaceToDepth", *["DequantizeLinear"] * 2, "Conv"]
        np.testing.assert_allclose(evaluate(model), before, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "size", "groups"),
    [(3, 3, 1, 8, 1), (8, 3, 2, 8, 1), (3, 3, 2, 9, 1), (3, 16, 16, 32, 1), (3, 11, 4, 32, 1),
     (3, 3, 2, 8, 3)],
)  # fmt: skip
def test_left_alone(channels, kernel, stride, size, groups):
    """Stride 1, many channels, a size that does not divide, large blocks, many zeros, groups."""
    model = convolution(
        channels, (kernel, kernel), stride, [1, 1, 1, 1], [size, size], groups=groups
    )
    assert fold_strides(model.graph) == 0


@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (4, 0)])
def test_the_artifact_is_verified(kernel, padding, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 16, kernel, 2, padding), nn.ReLU(), nn.Conv2d(16, 16, 3))
    program = capture(net.eval(), (x[:2],))
    context = Context(data=TensorData((x,), batch_size=4))
    program = apply(InsertFakeQuant(target="onnx"), program, context).program
    artifact = cases.built(program, "onnx", tmp_path / "out")
    assert artifact.certificate.audit_summary()["conv"] == {"int8": 2}
    kinds = [node.op_type for node in onnx.load(tmp_path / "out/model.onnx").graph.node]
    assert kinds.count("SpaceToDepth") == 1

"""The shared ONNX export: names, integer weights, ranges, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.onnx_coverage import onnx_unsupported
from pruna_ir.onnx_export import export_onnx
from pruna_ir.onnx_splits import with_plain_splits
from pruna_ir.program import Program


class QuantizedLinear(torch.nn.Module):
    """A linear layer with a quantised input and a quantised weight."""

    def __init__(self, qmin: int = -127, qmax: int = 127, axis: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(6, 5)
        self.axis, self.grid = axis, (qmin, qmax)
        channels = self.linear.weight.shape[axis]
        self.register_buffer("scale", torch.rand(channels) * 0.004 + 0.001)
        self.register_buffer("zero", torch.zeros(channels, dtype=torch.int32))
        self.register_buffer("x_scale", torch.tensor(0.04))
        self.register_buffer("x_zero", torch.tensor(7, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = fake_quant(x, self.x_scale, self.x_zero, None, 0, 255)
        weight = fake_quant(self.linear.weight, self.scale, self.zero, self.axis, *self.grid)
        return torch.nn.functional.linear(x, weight, self.linear.bias)


def run(model: Any, *inputs: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in model.graph.input]
    feeds = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    results: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return results


def expected(program: Program, *inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.asarray(program(*inputs)[0])


def quantized(rank3: bool = False, **options: int) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(4)
    x = torch.randn((3, 2, 6) if rank3 else (3, 6))
    return capture(QuantizedLinear(**options), (x,)), x


def initializers(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_names_come_from_the_program() -> None:
    class Two(torch.nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"total": left + right, "same": left + right, "left": left}

    program = capture(Two(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    model = export_onnx(program)
    assert [value.name for value in model.graph.input] == ["left", "right"]
    assert [value.name for value in model.graph.output] == ["total", "same", "left_output"]
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert (sizes[0].dim_param, sizes[1].dim_value) == ("batch", 3)
    left, right = torch.ones(5, 3), torch.full((5, 3), 2.0)
    for actual, wanted in zip(run(model, left, right), program(left, right), strict=True):
        np.testing.assert_array_equal(actual, wanted.numpy())


@pytest.mark.parametrize("rank3", [False, True])
@pytest.mark.parametrize("int8_weights", [False, True])
@pytest.mark.parametrize(("qmin", "qmax"), [(-127, 127), (-128, 127), (-8, 7)])
def test_quantized_linear_computes_what_the_program_does(
    rank3: bool, int8_weights: bool, qmin: int, qmax: int
) -> None:
    program, x = quantized(rank3, qmin=qmin, qmax=qmax)
    (actual,) = run(export_onnx(program, int8_weights=int8_weights), x)
    np.testing.assert_allclose(actual, expected(program, x), rtol=0, atol=1e-6)


def test_weights_become_integers_that_feed_the_matmul() -> None:
    program, _ = quantized(rank3=True)
    model = export_onnx(program)
    assert "Transpose" not in [node.op_type for node in model.graph.node]
    stored = [a for a in initializers(model).values() if a.dtype == np.int8 and a.ndim == 2]
    assert [a.shape for a in stored] == [(6, 5)]
    assert not [a for a in initializers(model).values() if a.dtype == np.float32 and a.ndim == 2]


def test_negative_axis() -> None:
    program, x = quantized(axis=-1)
    (actual,) = run(export_onnx(program), x)
    np.testing.assert_allclose(actual, expected(program, x), rtol=0, atol=1e-6)


def test_each_dequantize_of_a_weight_owns_its_constants() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantized = QuantizedLinear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.quantized(x[:, 0]) + self.quantized(x).sum(1)

    model = export_onnx(capture(Twice(), (torch.zeros(2, 3, 6),)))
    weights = {name for name, a in initializers(model).items() if a.dtype == np.int8}
    points = [
        node.input[2]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    ]
    assert len(points) == len(set(points)) == 2


def test_no_clip_between_quantize_and_dequantize() -> None:
    class Narrow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.3))
            self.register_buffer("zero", torch.tensor(2, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fake_quant(x, self.scale, self.zero, None, -7, 8)

    x = torch.linspace(-9, 9, 77).reshape(7, 11)
    program = capture(Narrow(), (x,))
    model = export_onnx(program)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[:3] == ["Clip", "QuantizeLinear", "DequantizeLinear"]
    np.testing.assert_array_equal(run(model, x)[0], expected(program, x))


@settings(deadline=None, max_examples=60)
@given(st.integers(-600, 600), st.sampled_from([0.5, 0.125, 3.0]))
def test_integers_round_half_to_even(halves: int, scale: float) -> None:
    """Multiples of half a step: where the rounding rules differ."""
    from pruna_ir.onnx_export import _Quantizer

    zero = np.zeros((), np.int8)
    quantizer = _Quantizer("x", "y", np.float32(scale).reshape(()), zero, None, -127, 127)
    x = np.float32(halves * 0.5 * scale).reshape(1)
    origin = torch.tensor(0, dtype=torch.int32)
    wanted = fake_quant(torch.from_numpy(x), torch.tensor(scale), origin, None, -127, 127)
    assert quantizer.quantize(x).astype(np.float32) * np.float32(scale) == wanted.numpy()


def test_a_grid_that_is_computed_becomes_plain_arithmetic() -> None:
    class Dynamic(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros((), dtype=torch.int32)
            return fake_quant(x, x.abs().amax((0, 1)) / 127, zero, None, -128, 127)

    program, x = capture(Dynamic(), (torch.ones(2, 3),)), torch.randn(4, 3)
    np.testing.assert_allclose(run(export_onnx(program), x)[0], expected(program, x), rtol=1e-6)


def test_refuses_a_range_beyond_8_bits() -> None:
    program, _ = quantized(qmin=-2048, qmax=2047)
    with pytest.raises(LoweringError, match=r"range \[-2048, 2047\]"):
        export_onnx(program)


@torch.library.custom_op("pruna_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody translates."""
    return x + 1


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_lists_every_node_that_cannot_be_translated() -> None:
    class Opaque(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return opaque(opaque(x).relu())

    program = capture(Opaque(), (torch.zeros(2, 3),))
    offenders = onnx_unsupported(program)
    assert [o.operator for o in offenders] == ["pruna_test.opaque.default"] * 2
    assert all("test_onnx_export.py" in o.source for o in offenders)
    with pytest.raises(LoweringError, match="translating node %opaque"):
        export_onnx(program)
    assert onnx_unsupported(capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))) == []


def test_classes_become_one_hot_rows() -> None:
    class Classes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x, 5).permute(0, 2, 1)

    x = torch.tensor([[0, 4, 2], [1, 1, 3]])
    program = capture(Classes(), (x,))
    assert onnx_unsupported(program) == []
    model = export_onnx(program)
    assert "OneHot" in [node.op_type for node in model.graph.node]
    one_row = torch.tensor([[2, 0, 4]])
    for ids in (x, one_row):
        np.testing.assert_array_equal(run(model, ids)[0], expected(program, ids))


def test_a_tensor_may_be_clamped_more_than_once_by_tensors() -> None:
    class Clamped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in {"low": -0.5, "high": 0.25, "lower": -2.0, "higher": 1.5}.items():
                self.register_buffer(name, torch.tensor(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            near = torch.clamp(x, self.low, self.high)
            far = torch.clamp(x, self.lower, self.higher)
            return near * far + torch.clamp(x, self.lower, self.high)

    x = torch.linspace(-3, 3, 15).reshape(3, 5)
    program = capture(Clamped(), (x,))
    np.testing.assert_array_equal(run(export_onnx(program), x)[0], expected(program, x))


def test_the_model_is_valid_onnx_of_the_asked_version() -> None:
    program, x = quantized()
    model = export_onnx(program, opset=21)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, x)[0], expected(program, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(), (3,), (3, 2)])
def test_attention_of_any_rank_is_translated(heads: tuple[int, ...], masked: bool) -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            mask = x[..., :1] + y.transpose(-1, -2)[..., :1, :] if masked else None
            return torch.nn.functional.scaled_dot_product_attention(x, y, y * 2, mask)

    x, y = (torch.randn(2, *heads, tokens, 4) for tokens in (5, 7))
    program = capture(Attention(), (x, y))
    session = onnxruntime.InferenceSession(export_onnx(program).SerializeToString())
    (actual,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), program(x, y)[0])


def pair(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    first, second = torch.chunk(torch.cat([x, y]), 2, dim=0)
    return first - second


def last_pair_of_three(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parts = torch.split(torch.cat([x, y, x * y]), x.shape[0])
    return parts[1] - parts[-1]


def doubled_first(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    twice, once, rest = torch.split(torch.cat([x, y, x * y, y]), [2 * rows, rows, rows])
    return twice[rows:] * once - rest


def first_and_others(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    tall = torch.cat([x, y]).transpose(0, 2)
    first, others = torch.split(tall, [1, tall.shape[-1] - 1], dim=-1)
    return (others - first).transpose(0, 2)


@pytest.mark.parametrize("split", [pair, last_pair_of_three, doubled_first, first_and_others])
def test_splits_along_the_batch_follow_its_size(split: Callable[..., torch.Tensor]) -> None:
    class Split(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return split(self.linear(x), self.linear(y)).tanh()

    torch.manual_seed(5)
    program = capture(Split(), (torch.randn(2, 3, 5), torch.randn(2, 3, 5)))
    model = export_onnx(program)
    for batch in (1, 2, 3):
        x, y = torch.randn(batch, 3, 5), torch.randn(batch, 3, 5)
        actual = run(model, x, y)[0]
        np.testing.assert_allclose(actual, expected(program, x, y), rtol=1e-5, atol=1e-6)


def test_splits_along_a_static_dimension_stay_splits() -> None:
    class Split(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.split([2, 5], dim=1)
            return b[:, :2] * a

    program = capture(Split(), (torch.randn(2, 7),))
    assert with_plain_splits(program) is program
    assert "Split" in [node.op_type for node in export_onnx(program).graph.node]

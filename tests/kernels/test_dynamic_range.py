"""Dynamic ranges: the formulas, ONNX's own operator, and what a range may be."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.kernels.dynamic_range import (
    dynamic_scale,
    dynamic_scale_reference,
    dynamic_zero_point,
    dynamic_zero_point_reference,
)
from pruna_ir.kernels.fake_quant import fake_quant
from tests.kernels.poison import poisoned

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def session() -> onnxruntime.InferenceSession:
    helper, kinds = onnx.helper, onnx.TensorProto
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("q", kinds.UINT8, ["n"]),
            helper.make_tensor_value_info("s", kinds.FLOAT, []),
            helper.make_tensor_value_info("z", kinds.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


SESSION = session()


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = dynamic_scale(x, 0, 255)
    zero = dynamic_zero_point(x, scale, 0, 255)
    return fake_quant(x, scale, zero, None, 0, 255), scale, zero


@settings(max_examples=100)
@given(st.lists(floats, min_size=1, max_size=9))
def test_it_is_what_onnx_states(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    q, scale, zero = SESSION.run(None, {"x": x})
    y, own_scale, own_zero = rounded(torch.from_numpy(x))
    if np.ptp(np.append(x, 0)) / 255 < np.finfo(np.float32).tiny:
        return
    assert own_scale.item() == scale
    assert own_zero.item() == zero
    wanted = (q.astype(np.float32) - np.float32(zero)) * scale
    # Ties fall as the division falls in float32; ONNX Runtime may multiply by a reciprocal.
    assert np.abs(y.numpy() - wanted).max() <= scale * 1.0001
    assert np.mean(y.numpy() != wanted) <= 0.5 or len(values) < 3


@settings(max_examples=60)
@given(st.lists(floats, min_size=1, max_size=9))
def test_nothing_is_clipped_and_zero_is_exact(values: list[float]) -> None:
    x = torch.tensor([*values, 0.0])
    y, scale, zero = rounded(x)
    assert 0 <= int(zero) <= 255
    assert y[-1] == 0
    assert bool(((y - x).abs() <= 1.01 * scale + 1e-6 * x.abs()).all())


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-42, -1e-43]])
def test_a_range_of_nothing_has_the_scale_1(values: list[float]) -> None:
    _, scale, zero = rounded(torch.tensor(values))
    assert (float(scale), int(zero)) == (1.0, 0)


def test_nan_stays_nan() -> None:
    assert dynamic_scale(torch.tensor([1.0, torch.nan]), 0, 255).isnan()


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), max_size=4), st.sampled_from([(0, 255), (-128, 127)]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(shape: list[int], grid: tuple[int, int], seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    expected = dynamic_scale_reference(x, *grid)
    with poisoned():
        scale = dynamic_scale(x, *grid)
        zero = dynamic_zero_point(x, scale, *grid)
    assert torch.equal(scale, expected)
    assert torch.equal(zero, dynamic_zero_point_reference(x, scale, *grid))


def test_the_operators_are_their_references_and_can_be_traced() -> None:
    x = torch.randn(3, 4)
    scale = dynamic_scale(x, -128, 127)
    assert torch.equal(scale, dynamic_scale_reference(x, -128, 127))
    zero = dynamic_zero_point(x, scale, -128, 127)
    assert torch.equal(zero, dynamic_zero_point_reference(x, scale, -128, 127))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(dynamic_scale, (x, 0, 255), test_utils=tests)
    torch.library.opcheck(dynamic_zero_point, (x, scale, 0, 255), test_utils=tests)

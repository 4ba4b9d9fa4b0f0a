"""Layouts of weights, and what TensorRT and cuSPARSELt take as 2:4, checked against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.sparse.semi_structured import (
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pruna_ir import capture
from pruna_ir.errors import UsageError
from pruna_ir.passes.sparsity_patterns import Grouped, kept
from pruna_ir.sparse_layouts import Layout, holds, refusals, shape_refusals, weights

LINEAR, ADDMM = Layout("linear", 0, 1), Layout("linear", 1, 0)
CONV = Layout("conv", 0, 1)


def two_of_four(shape: tuple[int, ...], layout: Layout, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    value = torch.randn(shape)
    (keep,) = kept([value.abs()], [layout], Grouped(2, 4), 0.5, "layer")
    return value * keep


def tensorrt_accepts(weight: torch.Tensor) -> bool:
    """TensorRT's rule for [K, C, R, S], by loops."""
    k, c, r, s = weight.shape
    if c % 4:
        return False
    for a in range(k):
        for b in range(0, c, 4):
            for y in range(r):
                for x in range(s):
                    if sum(float(v) != 0 for v in weight[a, b : b + 4, y, x]) > 2:
                        return False
    return True


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2)),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_the_tensorrt_rule_for_convolutions(
    shape: tuple[int, ...], spoil: bool, seed: int
) -> None:
    value = two_of_four(shape, CONV, seed)
    if spoil:
        value.flatten()[seed % value.numel()] = 7.0
    assert (not refusals(value, CONV, "tensorrt")) == tensorrt_accepts(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shape"), [(LINEAR, (32, 64)), (ADDMM, (128, 96))])
def test_what_is_accepted_round_trips_through_torch_s_packing(
    layout: Layout, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    value = two_of_four(shape, layout).to(dtype)
    assert refusals(value, layout, "cusparselt", dtype) == []
    matrix = (value if layout is LINEAR else value.t()).contiguous()
    packed, meta = sparse_semi_structured_from_dense_cutlass(matrix)
    assert packed.shape == (matrix.shape[0], matrix.shape[1] // 2)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), matrix)


def test_what_is_refused_does_not_round_trip() -> None:
    value = two_of_four((32, 64), LINEAR).half()
    value[3, 4:7] = 1.0
    assert refusals(value, LINEAR, "cusparselt") == [
        "some 4 consecutive inputs have more than 2 non-zeros"
    ]
    packed, meta = sparse_semi_structured_from_dense_cutlass(value)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), value)


def test_zeros_along_the_outputs_are_refused() -> None:
    value = two_of_four((32, 64), ADDMM)
    assert holds(value, ADDMM)
    assert not holds(value, LINEAR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32])
@pytest.mark.parametrize("rows", [16, 24, 32, 64])
@pytest.mark.parametrize("columns", [16, 32, 36, 64])
def test_shapes_agree_with_torch_s_table(dtype: torch.dtype, rows: int, columns: int) -> None:
    table = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    ours = not shape_refusals((rows, columns), LINEAR, "cusparselt", dtype)
    limits = table.get(dtype)
    theirs = (
        limits is not None
        and rows % limits.sparse_min_rows == 0
        and columns % limits.sparse_min_cols == 0
    )
    assert ours == theirs


def test_cutlass_takes_no_shape_that_cusparselt_refuses() -> None:
    for dtype, limits in SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS.items():
        shape = (2 * limits.sparse_min_rows, limits.sparse_min_cols)
        refused = shape_refusals(shape, LINEAR, "cusparselt", dtype)
        assert bool(refused) == (dtype not in (torch.float16, torch.bfloat16, torch.int8))


@pytest.mark.parametrize(
    ("shape", "layout", "library", "reasons"),
    [
        ((8, 6), LINEAR, "tensorrt", ["6 inputs are no multiple of 4"]),
        ((8, 8, 3), Layout("transposed", 1, 0), "tensorrt", ["a transposed convolution"]),
        ((16, 16, 1, 1), CONV, "cusparselt",
         ["a convolution; cuSPARSELt multiplies matrices only"]),
        ((1000, 512), LINEAR, "cusparselt", ["1000 outputs are no multiple of 16"]),
        ((24, 40), ADDMM, "cusparselt",
         ["40 outputs are no multiple of 16", "24 inputs are no multiple of 16"]),
    ],
)  # fmt: skip
def test_reasons(shape: tuple[int, ...], layout: Layout, library: str, reasons: list[str]) -> None:
    assert refusals(torch.zeros(shape), layout, library) == reasons  # type: ignore[arg-type]


def test_unknown_libraries_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown library 'cutlass'"):
        refusals(torch.zeros(4, 4), LINEAR, "cutlass")  # type: ignore[arg-type]


def test_the_weights_of_a_program() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
            self.table = torch.nn.Embedding(5, 4)
            self.fc = torch.nn.Linear(6, 6)
            self.shape = torch.nn.Parameter(torch.randn(3, 6, 2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.up(self.table(ids).transpose(1, 2)).transpose(1, 2)
            return self.fc(self.fc(x))[:, :3].unsqueeze(2) @ self.shape

    program = capture(Net(), (torch.zeros(2, 5, dtype=torch.int64),))
    found = {w.name: w.layout for w in weights(program)}
    assert found == {"up.weight": Layout("transposed", 1, 0, 2), "fc.weight": LINEAR}

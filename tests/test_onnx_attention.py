"""Attention, its projections and GELU in ONNX: the program's values, in forms that ORT fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.onnx_export import export_onnx
from pruna_ir.onnx_projections import with_split_projections
from pruna_ir.program import Program
from pruna_ir.verify import verify

aten = torch.ops.aten
attention = nn.functional.scaled_dot_product_attention


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def run(program: Program, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(export_onnx(program).SerializeToString())
    given = {spec.name: x.numpy() for spec, x in zip(program.inputs, inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


def optimised(program: Program, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime is left with."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(export_onnx(program).SerializeToString(), options)
    return kinds(onnx.load(folder / "optimised.onnx").graph)


def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attention(x, y, y * 2)


def scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attention(x, y, y * 2, scale=0.3)


def causal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attention(x, y, y * 2, is_causal=True)


def biased(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attention(x, y, y * 2, x[..., :1] + y.transpose(-1, -2)[..., :1, :])


def masked(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return attention(x, y, y * 2, x[..., :1] > y.transpose(-1, -2)[..., :1, :])


@pytest.mark.parametrize("function", [plain, scaled, causal, biased, masked])
@pytest.mark.parametrize("heads", [(), (3,), (3, 2)])
def test_attention_computes_what_the_program_does(
    function: Callable[..., torch.Tensor], heads: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(2, *heads, tokens, 4) for tokens in (5, 7))
    program = capture(Calls(function), (x, y))
    for batch in (1, 2, 3):
        inputs = torch.randn(batch, *heads, 5, 4), torch.randn(batch, *heads, 7, 4)
        torch.testing.assert_close(run(program, *inputs), program(*inputs)[0])


def test_a_row_that_is_masked_wholly_gives_zeros() -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    x[:, :, 2, 0] = -100.0  # below every key: all hidden
    program = capture(Calls(masked), (x, y))
    assert bool((program(x, y)[0][:, :, 2] == 0).all())
    torch.testing.assert_close(run(program, x, y), program(x, y)[0])


def test_the_key_is_transposed_inside_of_the_product(tmp_path: Path) -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    found = optimised(capture(Calls(plain), (x, y)), tmp_path)
    assert found["FusedMatMul"]
    assert not found["Transpose"]
    assert not found["Shape"]


class Projection(nn.Module):
    """Queries, keys and values as timm writes them; ``at`` is where the three stand."""

    def __init__(self, at: int = 2, *, whole: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.at, self.whole = at, whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        sizes = [rows, tokens, 2, 6]
        sizes.insert(self.at, 3)
        order = [k for k in range(5) if k != self.at]
        order[1], order[2] = order[2], order[1]
        moved = self.qkv(x).reshape(sizes).permute(self.at, *order)
        q, k, v = moved.unbind(0)
        out = attention(q, k, v)
        return out + moved.sum(0) if self.whole else out


@pytest.mark.parametrize(("at", "whole", "split"), [(2, False, 3), (2, True, 0), (3, False, 0)])
def test_projections_are_cut_where_each_part_is_one_slice(
    at: int, whole: bool, split: int
) -> None:
    torch.manual_seed(1)
    program = capture(Projection(at, whole=whole), (torch.randn(2, 5, 12),))
    cut = with_split_projections(program)
    verify(cut)
    assert len(list(cut.calls(aten.slice.Tensor))) == split
    assert (cut is program) == (split == 0)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(cut(x)[0], program(x)[0])
    torch.testing.assert_close(run(program, x), program(x)[0])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_one_kernel_and_exact(approximate: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(approximate), nn.Linear(9, 4))
    x = torch.randn(3, 5, 6) * 3
    program = capture(model, (x,))
    torch.testing.assert_close(run(program, x), program(x)[0], rtol=1e-5, atol=1e-6)
    found = optimised(program, tmp_path)
    assert sum(found[kind] for kind in ("Gelu", "BiasGelu", "FastGelu")) == 1

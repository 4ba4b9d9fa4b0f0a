"""The sparsity of programs: patterns read off zeros, bytes, and what targets make of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.kernels.ffn import KERNEL as FFN
from pruna_ir.passes.fold_constants import FoldConstants
from pruna_ir.passes.mask_weights import MaskWeights
from pruna_ir.passes.sparsity_patterns import kept, parse_pattern
from pruna_ir.program import Program
from pruna_ir.registry import find_backend
from pruna_ir.report import Report, Size, plain_text, tables
from pruna_ir.sparse_layouts import Layout
from pruna_ir.sparsity import compressed_bytes, pattern_of, sparsity, uses
from pruna_ir.transform import apply

LINEAR, CONV = Layout("linear", 0, 1), Layout("conv", 0, 1)
SHAPES = {"linear": ((48, 64), LINEAR), "addmm": ((64, 48), Layout("linear", 1, 0)),
          "conv": ((48, 64, 3, 1), CONV),
          "transposed": ((64, 48, 2), Layout("transposed", 1, 0, 2))}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "pattern", ["unstructured", "1:4", "2:4", "4:8", "4x4", "8x8", "16x16", "32x32"]
)
def test_the_pattern_of_a_mask_is_found_again(pattern: str, kind: str) -> None:
    shape, layout = SHAPES[kind]
    torch.manual_seed(0)
    value = torch.randn(shape)
    (mask,) = kept([value.abs()], [layout], parse_pattern(pattern), 0.5, "layer")
    assert pattern_of(value * mask, layout) == pattern


def test_one_entry_decides_the_pattern() -> None:
    torch.manual_seed(0)
    value = torch.randn(32, 32)
    (mask,) = kept([value.abs()], [LINEAR], parse_pattern("16x16"), 0.5, "layer")
    blocks = value * mask
    blocks[mask.nonzero()[0][0], mask.nonzero()[0][1]] = 0.0
    assert pattern_of(blocks, LINEAR) == "unstructured"


def test_bytes_of_compressed_forms() -> None:
    value = torch.ones(16, 16)
    value[:, :8] = 0.0
    # 128 values; half a value for 8 positions; 4 blocks and their bits; one bit an entry.
    assert compressed_bytes(value, LINEAR, "4:8") == 128 * 4 + 128 * 3 // 8
    assert compressed_bytes(value, LINEAR, "8x8") == 128 * 4 + 1
    assert compressed_bytes(value, LINEAR, "unstructured") == 128 * 4 + 256 // 8


class Net(nn.Module):
    """A convolution and a linear layer that cuSPARSELt takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(16, 32, 3), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.conv(x).mean((2, 3)))
        return y


def masked(pattern: str) -> Program:
    torch.manual_seed(0)
    program = capture(Net().eval(), (torch.randn(2, 16, 5, 5),))
    return apply(MaskWeights(pattern=pattern), program).program


def test_dense_programs_have_no_rows() -> None:
    assert sparsity({"": capture(Net().eval(), (torch.randn(2, 16, 5, 5),))}) == ()


@pytest.mark.parametrize("folded", [False, True])
def test_masks_count_whether_folded_or_not(folded: bool) -> None:
    program = masked("2:4")
    if folded:
        program = apply(FoldConstants(), program).program
    conv, fc = sparsity({"onnx": program, "tensorrt": program})
    assert (conv.weight, conv.pattern, conv.zeros, conv.entries) == (
        "conv.weight", "2:4", 2304, 4608,
    )  # fmt: skip
    assert conv.cusparselt == "a convolution; cuSPARSELt multiplies matrices only"
    assert (fc.weight, fc.pattern, fc.cusparselt) == ("fc.weight", "2:4", "accepted")
    assert (fc.bytes, fc.compressed_bytes) == (2048, 1024 + 64)
    assert fc.targets["onnx"].startswith("dense speed")
    assert fc.targets["tensorrt"].startswith("allowed on the sparse tensor cores")


def test_tensorrt_has_no_use_for_other_patterns() -> None:
    for row in sparsity({"tensorrt": masked("unstructured")}):
        assert row.targets["tensorrt"].startswith("dense speed: only 2:4")


def test_weights_of_fused_operators_count() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
            with torch.no_grad():
                self.a.weight[:, ::2] = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = FFN.op(
                x, self.a.weight, self.a.bias, self.b.weight, self.b.bias, None, None, "relu"
            )
            return y

    (row,) = sparsity({"": capture(Fused().eval(), (torch.randn(2, 8),))})
    assert (row.weight, row.zeros, row.entries) == ("a.weight", 64, 128)


@pytest.mark.parametrize("name", ["eager", "onnx", "openvino", "tvm", "tensorrt"])
def test_every_backend_of_ours_says_what_it_does(name: str) -> None:
    assert "dense speed" in find_backend(name).zeros[""]  # type: ignore[attr-defined]


def report(**options: object) -> Report:
    rows = sparsity({"onnx": masked("2:4"), "tensorrt": masked("2:4")})
    return Report("net", "", Size(1, 1, 1), (), (), (), {}, 0, 1, sparsity=rows, **options)  # type: ignore[arg-type]


def test_the_report_shows_weights_and_targets() -> None:
    found = {title.split(" (")[0]: rows for title, _, rows in tables(report())}
    assert found["sparsity"][1] == ["fc.weight", "2:4", "50.0%", "2.05kB", "1.09kB", "accepted"]
    assert [row[:3] for row in found["zeros on the targets"]] == [
        ["onnx", "2:4", "2"], ["tensorrt", "2:4", "2"],
    ]  # fmt: skip
    assert list(uses(())) == []
    text = plain_text(report())
    assert "zeros on the targets:" in text
    plain = json.loads(json.dumps(report().to_json()))["sparsity"]
    assert plain[1]["targets"]["onnx"].startswith("dense speed")


def test_the_command_reports_sparsity(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(32, 16), (torch.randn(2, 32),)\n"
    )
    command = [sys.executable, "-m", "pruna_ir", "run", f"{tmp_path / 'net.py'}:make", "--json",
               "-p", "mask-weights{pattern=2:4}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)["sparsity"]
    assert (row["weight"], row["pattern"], row["zeros"]) == ("weight", "2:4", 256)

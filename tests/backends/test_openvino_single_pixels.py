"""Int8 convolutions whose result is one pixel a channel: right at a dynamic batch of 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.backends.to_openvino import convert
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.lowering import Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context

PUT = "single_pixel"


class Residual(nn.Module):
    """conv(x) -> between -> + other(x) -> conv; ``conv`` without a bias."""

    def __init__(self, between: nn.Module, other: nn.Module, *, dims: int = 2) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = kind(24, 24, 3, padding=1, bias=False)
        self.between, self.other, self.last = between, other, kind(24, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.between(self.conv(x)) + self.other(x)))


def norm() -> nn.Module:
    """A batch norm that cannot be folded, for the ReLU before it."""
    layer = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(24))
    with torch.no_grad():
        for value in (layer[1].weight, layer[1].bias, layer[1].running_mean):
            value.uniform_(0.5, 1.5)
    return layer


def quantised(module: nn.Module, *sizes: int, static: bool = False) -> tuple[Program, TensorData]:
    """The int8 program of a module that reads [batch, 24, *sizes]."""
    x = torch.randn(6, 24, *sizes)
    program = capture(module.eval(), (x[:2],), dynamic_batch=not static)
    data = TensorData((x,), batch_size=2)
    text = (
        "canonicalize,fold-constants,fold-batch-norm,fuse-conv-bn-relu,insert-fake-quant,"
        "eliminate-dead-code"
    )
    return Pipeline.parse(text).run(program, Context(data=data, target="openvino")).program, data


def pools(program: Program) -> list[str]:
    """What the added max pools stand before."""
    return [
        next(iter(op.output(0).get_target_inputs())).get_node().get_type_name()
        for op in convert(program).get_ordered_ops()
        if op.get_friendly_name().endswith(PUT)
    ]


CASES = {
    "identity": lambda: Residual(nn.Identity(), nn.Identity()),
    "projection": lambda: Residual(nn.Identity(), nn.Conv2d(24, 24, 1)),
    "activation": lambda: Residual(nn.Hardswish(), nn.Conv2d(24, 24, 1, bias=False)),
    "norm": lambda: Residual(norm(), nn.Conv2d(24, 24, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_single_pixels_are_right_at_batch_one(name, tmp_path):
    torch.manual_seed(0)
    program, data = quantised(CASES[name](), 1, 1)
    assert pools(program)
    certificate = build(program, "openvino", tmp_path / "out", Context(data=data)).certificate
    assert certificate.verdict is Verdict.PASSED
    assert 1 in {comparison.sizes[0][0] for comparison in certificate.comparisons}
    assert {"int8"} == set(certificate.audit_summary()["conv"])


@pytest.mark.parametrize("dims", [1, 3])
def test_single_points_and_voxels_too(dims, tmp_path):
    torch.manual_seed(0)
    program, data = quantised(Residual(nn.Identity(), nn.Identity(), dims=dims), *[1] * dims)
    assert pools(program) == ["Add"]
    build(program, "openvino", tmp_path / "out", Context(data=data))


def test_the_pool_stands_behind_the_convolution():
    torch.manual_seed(0)
    assert pools(quantised(CASES["identity"](), 1, 1)[0]) == ["Add"]
    assert sorted(pools(quantised(CASES["norm"](), 1, 1)[0])) == ["Add", "Relu"]


class Gate(nn.Module):
    """Squeeze and excite: single pixels whose functions need no constants per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.squeeze(x.mean((2, 3), keepdim=True)).relu()
        return x * torch.sigmoid(self.excite(gate))


def test_gates_keep_their_fusions(tmp_path):
    torch.manual_seed(0)
    program, data = quantised(Gate(), 5, 3)
    assert pools(program) == []
    build(program, "openvino", tmp_path / "out", Context(data=data))


@pytest.mark.parametrize(
    ("sizes", "static"), [((3, 1), False), ((5, 5), False), ((1, 1), True)]
)
def test_other_sizes_keep_their_fusions(sizes, static):
    torch.manual_seed(0)
    assert pools(quantised(CASES["identity"](), *sizes, static=static)[0]) == []


def test_float_convolutions_keep_their_fusions():
    torch.manual_seed(0)
    program = capture(CASES["identity"]().eval(), (torch.randn(2, 24, 1, 1),))
    assert pools(program) == []

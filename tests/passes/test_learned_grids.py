"""The graph that trains: activations that a grid makes superfluous are left out, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.losses import return_features
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.learned_grids import LearnedGrids, Method
from pruna_ir.program import Program
from pruna_ir.training import trainable
from pruna_ir.transform import Context, apply

aten = torch.ops.aten
ACTIVATIONS = (aten.relu.default, aten.hardtanh.default)


class Net(nn.Module):
    """Two ReLUs and a ReLU6, each read by one grid."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second, third, last = self.convs
        y = torch.relu(third(nn.functional.relu6(second(torch.relu(first(x))))))
        return last(y), y


def quantised(target: str) -> Program:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6) * 4
    program = apply(Canonicalize(), capture(Net().eval(), (x[:2],))).program
    context = Context(data=TensorData((x,)), target=target)
    return apply(InsertFakeQuant(ranges="minmax"), program, context).program


def left(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.target in ACTIVATIONS]


@pytest.mark.parametrize(
    ("target", "method", "count"),
    [("onnx", "lsq", 0), ("onnx", "fixed", 0), ("onnx", "pact", 1), ("tensorrt", "lsq", 3)],
)
def test_what_a_grid_does_itself_is_left_out(target: str, method: Method, count: int) -> None:
    """Not where the grid goes below 0, nor a relu6 whose bound PACT would learn."""
    program = quantised(target)
    module = trainable(program, train=False)
    assert len(left(module)) == 3
    LearnedGrids(program, module, method)
    assert len(left(module)) == count


def test_what_is_read_elsewhere_stays() -> None:
    program = quantised("onnx")
    module = trainable(program, train=False)
    feature = next(n.name for n in module.graph.nodes if n.target is aten.relu.default)
    return_features(module.graph, [feature])
    LearnedGrids(program, module, "lsq")
    assert left(module) == ["aten.relu.default"]


@pytest.mark.parametrize("target", ["onnx", "openvino", "tensorrt"])
def test_values_and_gradients_stay(target: str) -> None:
    """Those of the program's own operators, with the scales as parameters."""
    program = quantised(target)
    module, plain = trainable(program, train=False), trainable(program, train=False)
    grids = LearnedGrids(program, module, "lsq")
    own = {name: scale.detach().clone().requires_grad_() for name, scale in grids.scales.items()}
    for node in list(plain.graph.nodes):
        if node.target is torch.ops.pruna.fake_quant.default:
            name = str(node.args[1].target)
            node.target = lambda x, _, *rest, name=name: fake_quant(x, own[name], *rest)
    plain.recompile()
    x = torch.randn(4, 3, 6, 6) * 4
    found, expected = module(x), plain(x)
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)
    for outputs in (found, expected):
        sum(y.square().sum() for y in outputs).backward()
    trained = dict(module.named_parameters())
    for name, mine in plain.named_parameters():
        torch.testing.assert_close(trained[name].grad, mine.grad)
    for name, scale in own.items():
        # One factor for all of its channels: the paper's gradient scale.
        factor = grids.scales[name].grad / scale.grad
        torch.testing.assert_close(factor, factor.mean().expand_as(factor))

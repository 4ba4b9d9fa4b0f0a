"""Layer times: matched by the runtime's names, with FLOPs and what did not speed up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.layer_latency import ROUNDS, RUNS, compare_layers, profile
from pruna_ir.lowering import KernelRow, LoadOptions, ProfiledRunner
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.report import OTHER, layer_table
from pruna_ir.transform import Context

LAYERS = ("first", "second", "head")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.second, self.head = nn.Conv2d(32, 48, 3), nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def pair() -> tuple[Program, Program]:
    torch.manual_seed(0)
    program = capture(Net().eval(), (torch.randn(2, 3, 15, 13),))
    text = "canonicalize,prune-channels{ratio=0.5}"
    return program, Pipeline.parse(text).run(program, check_each=False).program


def test_times_meet_flops_by_path_and_by_node_and_slow_layers_are_named(
    pair: tuple[Program, Program],
) -> None:
    second = [node.name for node in pair[0].calls() if "conv" in node.name][1]
    relu = next(node.name for node in pair[0].calls() if "relu" in node.name)
    times = {"first/conv/Convolution": 3.0, f"x/{second}": 2.0, "head/x/MatMul": 1.0,
             "reorder": 0.5}  # fmt: skip
    new = {"first/conv/Convolution": 1.0, f"{second}/Convolution": 1.9, "head/x/MatMul": 0.25,
           f"{relu}/Relu": 0.5, "other": 0.25}  # fmt: skip
    rows = {row.layer: row for row in compare_layers(*pair, times, new)}
    assert list(rows) == [*LAYERS, OTHER]
    # The activation behind it, through the norm, is the first layer's.
    assert (rows["first"].time, rows["first"].new_time) == (3.0, 1.5)
    assert (rows["second"].time, rows["second"].new_time) == (2.0, 1.9)
    assert rows["second"].flops == 4 * rows["second"].new_flops
    assert [row.slow for row in rows.values()] == [False, True, False, False]
    assert (rows[OTHER].time, rows[OTHER].new_time) == (0.5, 0.25)
    _, _, cells = layer_table("onnx", list(rows.values()))
    assert [cell[0] for cell in cells] == ["second", "first", "head", OTHER]
    assert [cell[-1] for cell in cells] == ["did not speed up", "", "", ""]


class Block(nn.Module):
    """A residual block whose one ReLU is called twice, with norms that were trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 9)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.bias, 0.5, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(y)))
        return self.down(nn.functional.gelu(self.up(x.mean((2, 3)))))


PIPELINES = {
    "norms": "canonicalize,prune-channels{ratio=0.5}",
    "fused": "canonicalize,prune-channels{ratio=0.5},fold-batch-norm,fuse-conv-bn-relu,fuse-ffn",
    "int8": "canonicalize,prune-channels{ratio=0.5},fold-batch-norm,fuse-conv-bn-relu,"
    "insert-fake-quant",
}


@pytest.mark.parametrize("target", ["eager", "onnx", "openvino"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_profilers_of_runtimes_name_every_layer(
    name: str, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 15, 13)
    before = capture(Block().eval(), (x,))
    context = Context(data=TensorData((x,), batch_size=2), target=target)
    after = Pipeline.parse(PIPELINES[name]).run(before, context, check_each=False).program
    runners = []
    for number, program in enumerate((before, after)):
        artifact = build(program, target, tmp_path / str(number), context, verify=False)
        runner = artifact.load(LoadOptions(threads=1, profile=True))
        assert isinstance(runner, ProfiledRunner)
        runners.append(runner)
    times = profile(runners, [[np.ones((1, 3, 15, 13), np.float32)]] * 2, budget_s=0.0)
    assert all(spent >= 0 for taken in times for spent in taken.values())
    rows = {row.layer: row for row in compare_layers(before, after, *times)}
    # A fused operator is compared with all that it was made from.
    ends = ["up + down"] if name == "fused" else ["up", "down"]
    assert set(rows) == {"stem", "conv1", "conv2", *ends, OTHER}
    assert all(row.new_flops < row.flops for row in rows.values() if row.layer != OTHER)
    assert rows["conv1"].flops == rows["conv2"].flops == 2 * 13 * 11 * 32 * 32 * 9
    assert sum(row.time for row in rows.values()) == pytest.approx(sum(times[0].values()))
    assert sum(row.new_time for row in rows.values()) == pytest.approx(sum(times[1].values()))


class Counted:
    """A runner of one layer that takes 1, 2, 3... ms and tells when it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, int]]) -> None:
        self._name, self._asked, self._spent = name, asked, 0

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(inputs)

    def audit(self) -> list[KernelRow]:
        return []

    def layer_times(self, inputs: Sequence[np.ndarray], runs: int) -> dict[str, float]:
        assert len(inputs) == 1
        self._asked.append((self._name, runs))
        self._spent += 1
        return {self._name: float(self._spent)}


def test_runners_take_turns_and_the_first_round_warms_up() -> None:
    asked: list[tuple[str, int]] = []
    runners = [Counted("a", asked), Counted("b", asked)]
    inputs = [[np.zeros(1)], [np.zeros(1)]]
    assert profile(runners, inputs, budget_s=1e9) == [{"a": 4.0}, {"b": 4.0}]
    assert asked == [("a", 1), ("b", 1)] + [("a", RUNS), ("b", RUNS)] * ROUNDS


def test_no_round_starts_after_the_budget_but_one_is_measured() -> None:
    asked: list[tuple[str, int]] = []
    ticks = iter(range(100))
    found = profile([Counted("a", asked)], [[np.zeros(1)]], budget_s=0.5,
                    clock=lambda: float(next(ticks)))  # fmt: skip
    assert (found, asked) == ([{"a": 2.0}], [("a", 1), ("a", RUNS)])

"""Layer times: matched by the runtime's names, with FLOPs and what did not speed up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.layer_latency import OTHER, compare_layers, layer_table
from pruna_ir.lowering import LoadOptions, ProfiledRunner
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program

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
    times = {"first/conv/Convolution": 3.0, f"{second}_nchwc": 2.0, "head/x/MatMul": 1.0,
             "reorder": 0.5}  # fmt: skip
    new = {"first/conv/Convolution": 1.0, f"node_{second}": 1.9, "head/x/MatMul": 0.25,
           f"{relu}_nchwc": 0.5, "other": 0.25}  # fmt: skip
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


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_profilers_of_runtimes_name_every_layer(
    pair: tuple[Program, Program], target: str, tmp_path: Path
) -> None:
    profiles = []
    for number, program in enumerate(pair):
        artifact = build(program, target, tmp_path / str(number), verify=False)
        runner = artifact.load(LoadOptions(threads=1, profile=True))
        assert isinstance(runner, ProfiledRunner)
        profiles.append(runner.layer_times([np.ones((1, 3, 15, 13), np.float32)], 4))
    assert all(spent >= 0 for profile in profiles for spent in profile.values())
    rows = {row.layer: row for row in compare_layers(*pair, *profiles)}
    assert set(rows) == {*LAYERS, OTHER}
    assert rows["second"].time > 0
    assert sum(row.time for row in rows.values()) == pytest.approx(sum(profiles[0].values()))

"""Planted bugs: caught by the pass's own check, named with pass and node, and replayed.

The passes stand in `tests.planted_passes` and are registered the way a plugin's are. A mended
twin of each (the real pass) passes the same pipeline, so that the checks do not just refuse.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruna_ir.bisect import Explain, bisect
from pruna_ir.capture import capture
from pruna_ir.errors import VerificationError
from pruna_ir.pipeline import Pipeline
from pruna_ir.reproducer import WriteReproducer, replay
from tests.networks import seeded
from tests.planted import registered
from tests.planted_passes import Branches

PASSES = {
    "fold-with-wrong-epsilon": "tests.planted_passes:WrongEpsilon",
    "fuse-and-drop-relu": "tests.planted_passes:DroppedRelu",
    "relu6-as-relu": "tests.planted_passes:Relu6AsRelu",
    "prune-off-by-one": "tests.planted_passes:OffByOne",
}

# name, the right pipeline up to and with its twin, nodes of which the first to differ is one
BUGS = [
    ("fold-with-wrong-epsilon", "canonicalize,fold-batch-norm", {"batch_norm", "batch_norm_1"}),
    ("fuse-and-drop-relu", "canonicalize,fold-batch-norm,fuse-conv-bn-relu", {"relu", "relu_1"}),
    ("relu6-as-relu", "canonicalize,eliminate-dead-code", {"hardtanh", "relu6"}),
    ("prune-off-by-one", "canonicalize,fold-batch-norm,prune-channels{ratio=0.5}", {"cat",
                                                                                   "conv2d_2"}),
]  # fmt: skip


def program():
    return capture(seeded(Branches), (torch.randn(2, 3, 9, 9),))


def planted(name: str, right: str) -> str:
    """The right pipeline with its last pass replaced by the planted one."""
    *before, last = right.split(",")
    return ",".join([*before, last.replace(last.split("{")[0], name)])


@pytest.mark.parametrize(("name", "right", "nodes"), BUGS)
def test_the_bug_is_caught_named_and_replayed(tmp_path, name, right, nodes):
    folder = tmp_path / "reproducer"
    with registered(tmp_path, PASSES):
        with pytest.raises(VerificationError) as caught:
            Pipeline.parse(planted(name, right)).run(
                program(), instruments=[Explain(), WriteReproducer(folder)]
            )
        message = str(caught.value)
        assert message.startswith(f"{name}: its promise does not hold")
        assert first_node(message) in nodes
        assert "model source: tests/planted_passes.py:" in message
        outcome = replay(folder)
    assert outcome.repeated
    assert str(outcome.error).splitlines()[0] == message.splitlines()[0]


def first_node(message: str) -> str:
    """The original name of the node that the message calls the first to diverge."""
    return message.split("first diverging node: ")[1].split("(was ")[1].split(")")[0]


@pytest.mark.parametrize(("name", "right", "nodes"), BUGS)
def test_the_right_pass_keeps_its_promise(name, right, nodes):
    result = Pipeline.parse(right).run(program(), instruments=[Explain()])
    checks = [step.check for step in result.steps if step.check is not None]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(("name", "right", "nodes"), BUGS)
def test_bisection_finds_the_pass_when_checks_were_off(tmp_path, name, right, nodes):
    with registered(tmp_path, PASSES):
        pipeline = Pipeline.parse(planted(name, right) + ",eliminate-dead-code")
        assert pipeline.run(program(), check_each=False).steps
        culprit = bisect(pipeline, program())
    assert culprit.text.startswith(name)
    assert culprit.position == right.count(",") + 1
    assert culprit.divergence.original in nodes


def test_the_command_line_replays(tmp_path):
    name, right, _ = BUGS[0]
    folder = tmp_path / "reproducer"
    with registered(tmp_path, PASSES), pytest.raises(VerificationError):
        Pipeline.parse(planted(name, right)).run(
            program(), instruments=[WriteReproducer(folder)]
        )
    root = Path(__file__).resolve().parents[1]
    again = subprocess.run(
        [sys.executable, "-m", "pruna_ir", "replay", str(folder)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
    )  # fmt: skip
    assert again.returncode == 1, again.stderr
    assert f"{name}: its promise does not hold" in again.stdout + again.stderr

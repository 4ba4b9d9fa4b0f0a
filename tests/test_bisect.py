"""From a wrong pipeline to the culprit pass and the first wrong node; reproducers repeat it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pruna_ir.bisect import bisect, first_divergence
from pruna_ir.data import TensorData
from pruna_ir.errors import CaptureError, VerificationError
from pruna_ir.pipeline import Pipeline, Scope
from pruna_ir.reproducer import WriteReproducer, replay
from pruna_ir.transform import Context, apply
from tests.networks import DropRelu, Identity, ScaleHead, conv_net
from tests.planted import registered

HALF_MORE = ScaleHead(factor=1.5)
PLANTED = {
    "drop-relu": "tests.networks:DropRelu",
    "identity": "tests.networks:Identity",
    "scale-head": "tests.networks:ScaleHead",
}


def test_names_the_pass_and_the_node():
    pipeline = Pipeline((Identity(), DropRelu(), ScaleHead(factor=2.0)))
    culprit = bisect(pipeline, conv_net())
    assert (culprit.position, culprit.text) == (2, "drop-relu")
    assert "aten.add" in culprit.divergence.text or "aten.mean" in culprit.divergence.text
    assert culprit.divergence.source.startswith("tests/networks.py:")


def test_the_first_node_is_named_and_not_the_last():
    program = conv_net()
    found = first_divergence(program, apply(ScaleHead(factor=2.0), program).program, Context())
    assert found.node == "linear"
    assert found.error == pytest.approx(1.0, rel=0.5)


def test_equal_programs_have_no_divergence():
    program = conv_net()
    assert first_divergence(program, apply(Identity(), program).program, Context()) is None


def test_a_pipeline_that_keeps_its_promises_has_no_culprit():
    assert bisect(Pipeline((Identity(),)), conv_net()) is None


def fail(tmp_path, context=None, item=HALF_MORE):
    with pytest.raises(VerificationError) as caught:
        Pipeline((item,)).run(
            conv_net(), context, instruments=[WriteReproducer(tmp_path / "reproducer")]
        )
    return str(caught.value), tmp_path / "reproducer"


def test_a_failure_leaves_a_folder_that_replay_repeats(tmp_path):
    message, folder = fail(tmp_path)
    assert f"reproducer: pruna-opt replay {folder}" in message
    assert sorted(p.name for p in folder.iterdir()) == ["program.pt2", "reproducer.json"]
    with registered(tmp_path, PLANTED):
        outcome = replay(folder)
    assert outcome.repeated
    assert str(outcome.error).splitlines()[0] == message.splitlines()[0]
    assert outcome.record.pipeline == "scale-head{factor=1.5}"


def test_scopes_and_data_are_part_of_the_reproducer(tmp_path):
    data = TensorData((torch.randn(5, 3, 9, 9),), torch.arange(5), batch_size=2)
    scoped = Scope("submodule", "head", (HALF_MORE,))
    _, folder = fail(tmp_path, Context(data=data, seed=3, target="onnx"), scoped)
    record = json.loads((folder / "reproducer.json").read_text())
    assert record["pipeline"] == "submodule<head>(scale-head{factor=1.5})"
    assert (record["seed"], record["target"], record["batch_size"]) == (3, "onnx", 2)
    with np.load(folder / "data.npz") as saved:
        assert np.array_equal(saved["x"], data.inputs[0].numpy())
        assert np.array_equal(saved["labels"], np.arange(5))
    with registered(tmp_path, PLANTED):
        assert replay(folder).repeated


def test_a_mended_pass_no_longer_repeats(tmp_path):
    _, folder = fail(tmp_path)
    record = json.loads((folder / "reproducer.json").read_text())
    record["pipeline"] = "identity"
    (folder / "reproducer.json").write_text(json.dumps(record))
    with registered(tmp_path, PLANTED):
        outcome = replay(folder)
    assert not outcome.repeated
    assert outcome.error is None


@pytest.mark.parametrize("damage", ["missing", "truncated", "program"])
def test_a_damaged_reproducer_is_refused(tmp_path, damage):
    _, folder = fail(tmp_path)
    file = folder / ("program.pt2" if damage == "program" else "reproducer.json")
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError):
        replay(folder)

"""Artifacts on disk: manifests, checksums, folders that are whole or absent; and re-export."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError, UsageError
from pruna_ir.lowering import (
    MANIFEST,
    Lowered,
    Manifest,
    Offender,
    make_manifest,
    sha256,
    whole_folder,
    write_json,
)
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import module_path
from pruna_ir.reexport import example_inputs, origins, reexport
from pruna_ir.transform import Context, Rewrite
from tests import networks

aten = torch.ops.aten
conv_net = cache(networks.conv_net)


# -- folders -----------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep/out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep/out/a").read_text() == "1"


def test_an_error_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "out/a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path):
    for name in ("a", "b"):
        with whole_folder(tmp_path / "out") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path / "out") == ["b"]
    assert names(tmp_path) == ["out"]


def test_a_destination_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LoweringError, match="cannot be written: .*; give a folder"),
        whole_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block must not run")


# -- manifests ---------------------------------------------------------------------------------


def written(folder: Path, **fields) -> Manifest:
    (folder / "sub").mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "sub/extra").write_bytes(b"")
    lowered = Lowered("model.bin", {"tool": "1.0"}, **fields)
    manifest = make_manifest("eager", conv_net(), folder, lowered)
    write_json(folder / MANIFEST, manifest)
    return manifest


def test_a_manifest_reads_back(tmp_path):
    manifest = written(tmp_path, facts={"opset": 18}, warnings=("careful",))
    assert Manifest.read(tmp_path) == manifest
    assert manifest.files == {
        "model.bin": sha256(tmp_path / "model.bin"),
        "sub/extra": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert manifest.dims == {"batch": [1, None]}
    assert manifest.outputs == [{"name": "output", "dtype": "float32", "shape": ["batch", 5]}]


def test_a_fixed_dimension_is_a_number(tmp_path):
    manifest = written(tmp_path, fixed={"batch": 4})
    assert manifest.inputs[0]["shape"] == [4, 3, 9, 9]
    assert manifest.outputs[0]["shape"] == [4, 5]
    assert manifest.dims == {}


def test_a_changed_file_is_named(tmp_path):
    written(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"weighta")
    with pytest.raises(LoweringError, match=r"model\.bin is missing or differs"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"backend": "x"}'])
def test_half_a_manifest_is_no_artifact(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(LoweringError, match="holds no whole artifact"):
        Manifest.read(tmp_path)


def test_a_missing_manifest_is_no_artifact(tmp_path):
    with pytest.raises(LoweringError, match="holds no whole artifact"):
        Manifest.read(tmp_path)


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"error": float("nan")})
    write_json(tmp_path / "y.json", {"error": 0.5})
    assert json.loads((tmp_path / "y.json").read_text()) == {"error": 0.5}


def test_an_offender_shows_the_users_line():
    node = next(conv_net().calls(aten.linear.default))
    text = str(Offender.of(node, "no rule"))
    assert text.startswith(f"{node.name}: aten.linear.default (tests/networks.py:")
    assert text.endswith("): no rule")


# -- re-export ---------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (ids * mask).sum(1)


def two_inputs():
    dims = {"ids": {1: "length"}, "mask": {1: "length"}}
    example = (torch.arange(5)[None], torch.ones(1, 5, dtype=torch.int64))
    return capture(TwoInputs(), example, dynamic_dims=dims)


def test_names_order_and_ranges_are_kept():
    exported = reexport(two_inputs())
    assert exported.graph_signature.user_inputs == ("ids", "mask")
    assert sorted(str(r) for r in exported.range_constraints.values()) == ["VR[1, int_oo]"] * 2


def test_it_computes_the_same():
    program = conv_net()
    module = reexport(program).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 9)
        with torch.no_grad():
            assert torch.equal(module(x)[0], program(x)[0])


def test_a_fixed_batch_is_static_and_the_rest_open():
    exported = reexport(two_inputs(), fixed_batch=1)
    (ids, _), _ = exported.example_inputs
    assert ids.shape == (1, 5)
    (batch, length) = next(iter(exported.graph.find_nodes(op="placeholder"))).meta["val"].shape
    assert batch == 1
    assert isinstance(length, torch.SymInt)


def test_every_dimension_can_be_fixed():
    exported = reexport(two_inputs(), fixed={"batch": 2, "length": 7})
    assert [list(t.shape) for t in exported.example_inputs[0]] == [[2, 7]] * 2
    assert dict(exported.range_constraints) == {}


def test_an_unknown_dimension_is_refused():
    with pytest.raises(UsageError, match="no dynamic dimension is named 'width'; the program has"):
        reexport(two_inputs(), fixed={"width": 3})
    with pytest.raises(UsageError, match="dimension batch cannot be 0"):
        reexport(two_inputs(), fixed_batch=0)


def test_examples_repeat_real_values():
    ids, mask = example_inputs(two_inputs(), {"length": 7})
    assert ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]] * 2
    assert mask.unique().tolist() == [1]


def test_the_program_is_left_alone():
    program = conv_net()
    before = program.hash()
    reexport(program, fixed_batch=1)
    assert program.hash() == before


def test_origins_lead_through_a_rewrite_and_a_decomposition():
    rw = Rewrite(conv_net(), "test", Context())
    program = rw.finish()
    graph = reexport(program).run_decompositions().graph
    found = origins(program, graph)
    convolutions = [n for n in graph.nodes if n.target is aten.convolution.default]
    assert [found[n.name].target for n in convolutions] == [aten.conv2d.default] * 2


class Shortcut(nn.Module):
    """Two convolutions before a sum: fused, they change places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.main, self.short = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x).relu()
        return (self.main(x) + self.short(x)).relu()


def test_origins_never_confuse_calls_that_were_numbered_anew():
    program = capture(Shortcut(), (torch.randn(2, 3, 5, 4),))
    fused = Pipeline.parse("canonicalize,fuse-conv-bn-relu").run(program).program
    graph = reexport(fused).run_decompositions().graph
    found = origins(fused, graph)
    nodes = {node.name: node for node in graph.nodes}
    assert {module_path(node) for node in found.values()} >= {"short"}
    for name, origin in found.items():
        assert module_path(nodes[name]) == module_path(origin)

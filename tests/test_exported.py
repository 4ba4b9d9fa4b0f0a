"""Archives of torch.export.save are read; whatever in them could run code is refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.errors import CaptureError
from pruna_ir.serialize import load_program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x)).relu()
        y = y.reshape(y.shape[0], 4, y.shape[2] * y.shape[3]).mean(-1)
        return {"logits": self.head(y) + torch.arange(5)}


class Touch:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    net = torch.export.export(Net().eval(), (torch.randn(2, 3, 9, 7),), dynamic_shapes=(dynamic,))
    torch.export.save(net, path, extra_files={"note.txt": "mine"})
    return path


def altered(source: Path, target: Path, edit) -> Path:
    """A copy of an archive whose records went through ``edit(name, content)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, edit(name.split("/", 1)[1], old.read(name)))
    return target


def test_a_plain_export_becomes_a_program(exported: Path) -> None:
    program = load_program(exported)
    x = torch.randn(3, 3, 11, 7)
    expected = torch.export.load(exported).module()(x)["logits"]
    assert torch.equal(program(x)[0], expected)
    assert program.inputs[0].shape[0] == "batch"
    assert program.outputs[0].name == "logits"
    assert isinstance(program.tensor("conv.weight"), nn.Parameter)


def test_an_unaltered_copy_is_read_too(exported: Path, tmp_path: Path) -> None:
    copy = altered(exported, tmp_path / "copy.pt2", lambda _, content: content)
    assert load_program(copy).hash() == load_program(exported).hash()


def test_a_truncated_export_is_refused(exported: Path, tmp_path: Path) -> None:
    content = exported.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(CaptureError, match=r"is not a whole \.pt2 file"):
        load_program(tmp_path / "cut.pt2")


def test_another_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CaptureError, match="neither a program of pruna-opt nor of torch"):
        load_program(tmp_path / "x.pt2")


@pytest.mark.parametrize(
    "record", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/opaque_0"]
)
def test_a_pickle_with_code_never_runs(exported: Path, tmp_path: Path, record: str) -> None:
    bad = tmp_path / "bad.pt2"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            if not name.endswith(record):
                new.writestr(name, old.read(name))
        new.writestr(f"net/{record}", pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(CaptureError, match=r"refused, since data/.* could run code"):
        load_program(bad)
    assert not (tmp_path / "ran").exists()


def test_the_pickle_control_does_run_code_in_torch(exported: Path, tmp_path: Path) -> None:
    def edit(name: str, content: bytes) -> bytes:
        harmful = pickle.dumps(Touch(tmp_path / "ran"))
        return harmful if name == "data/sample_inputs/model.pt" else content

    bad = altered(exported, tmp_path / "bad.pt2", edit)
    with pytest.raises(Exception):  # noqa: B017 - any: it fails after the code has run
        torch.export.load(bad)
    assert (tmp_path / "ran").exists()


def _change(find: str, value: str):
    """Replace every value of a key in the graph's JSON."""

    def walk(node):
        if isinstance(node, dict):
            return {k: value if k == find and isinstance(v, str) else walk(v)
                    for k, v in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    def edit(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        return json.dumps(walk(json.loads(content))).encode()

    return edit


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("expr_str", "__import__('os').mkdir('ran')", "an expression that is no arithmetic"),
        ("expr_str", "s77.func", "an expression that is no arithmetic"),
        ("expr_str", "exec(s77)", "an expression that calls exec"),
        ("target", "torch.os.mkdir", "no operator"),
        ("target", "_operator.methodcaller", "no operator"),
        ("target", "torch.ops.aten.from_file.default", "no operator"),
        ("name", "x = 1; import os", "an odd name"),
        ("parameter_name", "a'); import os; ('", "an odd name"),
        ("in_spec", '[1, {"__enum__": true, "fqn": "os:mkdir"}]', "names a class"),
    ],
)
def test_an_altered_graph_is_refused(
    exported: Path, tmp_path: Path, key: str, value: str, reason: str
) -> None:
    bad = altered(exported, tmp_path / "bad.pt2", _change(key, value))
    with pytest.raises(CaptureError, match=reason):
        load_program(bad)


def test_an_export_of_a_transformer_is_read(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    exported = torch.export.export(layer, (torch.randn(2, 5, 16),))
    torch.export.save(exported, tmp_path / "layer.pt2")
    program = load_program(tmp_path / "layer.pt2")
    x = program.examples[0]
    assert torch.equal(program(x)[0], exported.module()(x))

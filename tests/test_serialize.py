"""Programs survive a round trip through a file; bad files are refused without running anything."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError, LoweringError
from pruna_ir.printer import print_program
from pruna_ir.program import Applied, Program
from pruna_ir.serialize import GRAPH, load_program, save_program


class Tied(nn.Module):
    """Two names of one parameter, a buffer, a constant, dtypes, an infinity, a dynamic length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.randn(6, dtype=torch.bfloat16))

    # The name of a builtin, which torch.fx would avoid.
    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002
        x = self.table(input) * self.scale.to(torch.float32)
        x = x.masked_fill(x > 1, float("-inf")).softmax(-1)
        x = x.reshape(x.shape[0] * x.shape[1], 6).split([2, 4], dim=-1)[1]
        return {"logits": self.head(torch.cat([x, x[:, :2]], 1)), "ids": input + 1}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (2, 5))
    made = capture(Tied(), (ids,), dynamic_dims={"input": {1: "length"}})
    return replace(
        made, history=(Applied("a{b=1}", "00", "11"),), attributes={"quantized-for": "onnx"}
    )


def test_a_round_trip_keeps_everything(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    assert loaded.hash() == program.hash()
    assert print_program(loaded, sources=True) == print_program(program, sources=True)
    assert (loaded.inputs, loaded.outputs) == (program.inputs, program.outputs)
    assert (loaded.dims, loaded.history) == (program.dims, program.history)
    assert loaded.attributes == program.attributes
    assert all(map(torch.equal, loaded.examples, program.examples))
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        assert before.name == after.name
        assert before.meta.get("stack_trace") == after.meta.get("stack_trace")
        paths = [[path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
                 for n in (before, after)]
        assert paths[0] == paths[1]


def test_a_loaded_program_runs_at_other_sizes_and_keeps_tied_tensors(
    program: Program, tmp_path: Path
) -> None:
    save_program(program, tmp_path / "p.pt2")
    loaded = load_program(tmp_path / "p.pt2")
    ids = torch.randint(0, 7, (3, 9))
    for expected, actual in zip(program(ids), loaded(ids), strict=True):
        assert torch.equal(expected, actual)
    assert len({id(t) for t in loaded.tensors().values()}) == len(
        {id(t) for t in program.tensors().values()}
    )
    # Which of its names a tied tensor goes by is up to torch.export.
    name = next(name for name in loaded.tensors() if name.endswith("weight"))
    assert isinstance(loaded.tensor(name), nn.Parameter)
    assert loaded.tensor("scale").dtype is torch.bfloat16


def test_a_second_round_trip_writes_the_same_graph(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "a.pt2")
    save_program(load_program(tmp_path / "a.pt2"), tmp_path / "b.pt2")
    texts = [zipfile.ZipFile(tmp_path / f"{n}.pt2").read(GRAPH) for n in "ab"]
    assert texts[0] == texts[1]


def test_static_programs_and_empty_tensors_survive(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("none", torch.zeros(0, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, self.none])

    made = capture(Empty(), (torch.ones(1, 3),), dynamic_batch=False)
    save_program(made, tmp_path / "p.pt2")
    assert load_program(tmp_path / "p.pt2").hash() == made.hash()


def test_every_truncation_is_refused(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "whole.pt2")
    content = (tmp_path / "whole.pt2").read_bytes()
    for kept in (0, 1, 10, len(content) // 3, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pt2").write_bytes(content[:kept])
        with pytest.raises(CaptureError, match=r"cut\.pt2: is not a whole \.pt2 file"):
            load_program(tmp_path / "cut.pt2")


def test_a_flipped_byte_in_a_weight_is_refused(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    name = next(name for name in program.tensors() if name.endswith("weight"))
    weight = program.tensor(name).detach().numpy().tobytes()
    content = bytearray((tmp_path / "p.pt2").read_bytes())
    at = bytes(content).index(weight)
    content[at + 5] ^= 1
    (tmp_path / "p.pt2").write_bytes(content)
    with pytest.raises(CaptureError, match="CRC"):
        load_program(tmp_path / "p.pt2")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"absent\.pt2: cannot be read: No such file"):
        load_program(tmp_path / "absent.pt2")


def test_an_unwritable_place_is_an_error_and_leaves_nothing(
    program: Program, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoweringError, match="cannot be written"):
        save_program(program, tmp_path / "file" / "p.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_what_stood_there(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "p.pt2")
    before = (tmp_path / "p.pt2").read_bytes()
    bad = program.fork()
    node = next(bad.calls())
    node.kwargs = {"odd": {1, 2}}
    with pytest.raises(Exception, match="has no form in a saved program"):
        save_program(bad, tmp_path / "p.pt2")
    assert (tmp_path / "p.pt2").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.pt2"]


def edited(source: Path, target: Path, edit) -> None:
    """A copy of a saved program whose JSON went through ``edit``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == GRAPH:
                document = json.loads(content)
                edit(document)
                content = json.dumps(document).encode()
            new.writestr(name, content)


def _first_call(document):
    return next(n for n in document["nodes"] if n["op"] == "call_function")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda d: d.update(format=2), "is of format 2, but this version reads 1"),
        (lambda d: _first_call(d).update(target="os.system"), "operator os.system is not known"),
        (lambda d: _first_call(d).update(target="aten::from_file.default"), "is not known here"),
        (lambda d: _first_call(d).update(op="call_module"), "a call_module node is not part"),
        (lambda d: _first_call(d).update(name="x;import os"), "is not a legal name"),
        (lambda d: _first_call(d).update(args=[{"eval": "1"}]), "tagged 'eval'"),
        (lambda d: d["inputs"][0].update(shape=["__import__('os')"] * 2), "is not made of"),
        (lambda d: d["nodes"].pop(), "is not a program"),
        (lambda d: d["outputs"][0].update(dtype="int8"), "output logits"),
        (lambda d: d.pop("dims"), "is not a program that this version reads"),
        (lambda d: d["inputs"].pop(), "differ in number"),
    ],
)
def test_altered_files_are_refused(program: Program, tmp_path: Path, edit, reason: str) -> None:
    save_program(program, tmp_path / "p.pt2")
    edited(tmp_path / "p.pt2", tmp_path / "bad.pt2", edit)
    with pytest.raises(CaptureError, match=reason):
        load_program(tmp_path / "bad.pt2")


def test_the_edit_control_changes_nothing_without_an_edit(
    program: Program, tmp_path: Path
) -> None:
    save_program(program, tmp_path / "p.pt2")
    edited(tmp_path / "p.pt2", tmp_path / "same.pt2", lambda _: None)
    assert load_program(tmp_path / "same.pt2").hash() == program.hash()

"""Verify compares artifacts with programs and with each other; bisect finds the culprit."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pruna_ir.cli.main import main
from tests.cli.conftest import NET, Opt

PASSES = ("-p", "canonicalize,fold-batch-norm")
ONNX_GRID = ("-p", "canonicalize,insert-fake-quant{target=onnx}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a`` (eager, folded), ``b`` (onnx of the same weights), ``c`` (other weights), ``q``."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "net.py").write_text(NET)
    for name, *arguments in (
        ("a", "--target", "eager", *PASSES),
        ("b", "--target", "onnx"),
        ("c", "--target", "eager", "--seed", "1", *PASSES),
        ("q", "--target", "onnx", "--target", "eager", *ONNX_GRID),
    ):
        code = main(["run", f"{folder / 'net.py'}:make", "-o", str(folder / name),
                     "--repeats", "0", *arguments])  # fmt: skip
        assert code == 0
    return folder


@pytest.fixture
def made(built: Path, tmp_path: Path) -> Path:
    """A copy of them for one test."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_an_artifact_against_its_program(opt: Opt, made: Path) -> None:
    ran = opt("verify", "a/eager", "a/program.pt2")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1].startswith("PASSED: ")
    assert "on 'zeros': relative error" in ran.out
    assert opt("verify", "b/onnx", "b/program.pt2", "--json").json()["verdict"] == "PASSED"


def test_an_artifact_against_another_program_fails(opt: Opt, made: Path) -> None:
    ran = opt("verify", "a/eager", "c/program.pt2", "--json")
    assert ran.code == ran.json()["exit_code"] == 1
    assert ran.json()["verdict"] == "FAILED"
    assert "was built from program" in ran.err


def test_artifacts_against_each_other(opt: Opt, made: Path) -> None:
    assert opt("verify", "a/eager", "b/onnx").code == 0
    wrong = opt("verify", "c/eager", "b/onnx")
    assert wrong.code == 1
    assert wrong.out.splitlines()[-1] == "FAILED"


def test_real_inputs(opt: Opt, made: Path) -> None:
    np.savez(made / "data.npz", x=np.random.default_rng(0).random((5, 1, 7, 5), np.float32))
    for reference in ("b/onnx", "a/program.pt2"):
        assert opt("verify", "a/eager", reference, "--data", "data.npz").code == 0


def test_quantised_artifacts_against_each_other(opt: Opt, made: Path) -> None:
    assert opt("verify", "q/onnx", "q/eager").code == 0
    assert opt("verify", "q/onnx", "c/eager").code == 1


def test_a_damaged_artifact_is_refused(opt: Opt, made: Path) -> None:
    file = made / "a" / "eager" / "program.pt2"
    file.write_bytes(file.read_bytes()[:-9])
    ran = opt("verify", "a/eager", "c/program.pt2")
    assert ran.code == 6
    assert "differs from its sha256" in ran.err
    assert opt("verify", "absent", "c/program.pt2").code == 6
    assert opt("verify", "b/onnx", "absent.pt2").code == 3


def test_artifacts_that_cannot_be_compared(opt: Opt, made: Path) -> None:
    (made / "other.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(3, 2), torch.ones(2, 3)\n"
    )
    assert opt("run", "other.py:make", "--target", "eager", "-o", "d", "--repeats", "0").code == 0
    ran = opt("verify", "a/eager", "d/eager")
    assert ran.code == 2
    assert "differ in their inputs" in ran.err
    assert opt("verify", "a/eager", "d/program.pt2").code == 2


def test_what_does_not_run_here(opt: Opt, rascals: object, tmp_path: Path) -> None:
    assert opt("run", "net.py:make", "--target", "elsewhere", "-o", "out").code == 0
    arguments = ("verify", "out/elsewhere", "out/program.pt2")
    ran = opt(*arguments)
    assert (ran.code, ran.out) == (0, "NOT_RUN(no such device here)\n")
    assert opt(*arguments, "--require-verified").code == 8
    assert opt("verify", "out/elsewhere", "out/elsewhere", "--require-verified").code == 8


def test_bisect_finds_the_culprit_and_its_node(opt: Opt, rascals: object) -> None:
    ran = opt("bisect", "net.py:make", "-p", "canonicalize,lie,fold-batch-norm")
    assert ran.code == 1
    assert ran.out.startswith("pass 2, lie: exact does not hold")
    assert "first diverging node" in ran.out
    culprit = opt("bisect", "net.py:make", "-p", "lie", "--json").json()["culprit"]
    assert (culprit["position"], culprit["pass"]) == (1, "lie")


def test_bisect_of_an_innocent_pipeline(opt: Opt) -> None:
    ran = opt("bisect", "net.py:make", "-p", "canonicalize,fold-batch-norm")
    assert (ran.code, ran.out) == (0, "every promise holds\n")
    assert opt("bisect", "net.py:make", "-p", "canonicalize", "--json").json() == {"culprit": None}


def test_replay_of_what_is_no_reproducer(opt: Opt) -> None:
    ran = opt("replay", "nowhere")
    assert ran.code == 3
    assert "holds no reproducer" in ran.err


def test_replay_tells_when_a_failure_is_gone(opt: Opt, rascals: object, tmp_path: Path) -> None:
    assert opt("run", "net.py:make", "-p", "lie").code == 1
    record = tmp_path / "reproducer" / "reproducer.json"
    record.write_text(record.read_text().replace('"lie"', '"canonicalize"'))
    ran = opt("replay", "reproducer", "--json")
    assert ran.code == 0
    assert ran.json()["repeated"] is False

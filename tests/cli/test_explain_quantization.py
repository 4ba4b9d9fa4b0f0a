"""explain-quantization and the report of a run: formats, artifacts, and what they refuse."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pruna_ir.cli.main import main
from tests.cli.conftest import Opt

QUICK = ("--repeats", "0")


@pytest.fixture
def quantised(opt: Opt, tmp_path: Path) -> Path:
    """A folder that a run for two backends left, one layer float; ``data.npz`` beside it."""
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.standard_normal((12, 1, 7, 5)).astype("float32"))
    text = "canonicalize,fold-batch-norm,insert-fake-quant{exclude=head}"
    ran = opt("run", "net.py:make", "-p", text, "--data", "data.npz", "--target", "onnx",
              "--target", "openvino", "-o", "out", *QUICK)  # fmt: skip
    assert ran.code == 0, ran.err
    return tmp_path / "out"


def test_a_run_reports_each_target_with_its_kernels(quantised: Path) -> None:
    plain = json.loads((quantised / "report.json").read_text())
    assert [found["target"] for found in plain["quantization"]] == ["onnx", "openvino"]
    for found in plain["quantization"]:
        assert found["samples"] == 12
        rows = {row["layer"]: row for row in found["layers"]}
        assert rows["conv"]["kernel"] == "int8"
        assert rows["conv"]["own_db"] > 30
        assert {operand["name"] for operand in rows["conv"]["operands"]} == {"input", "weight"}
        (left,) = found["floats"]
        assert (left["layer"], left["reason"]) == ("head", "excluded by 'head'")
        assert left["kernel"] == "float32"
        page = (quantised / f"quantization-{found['target']}.html").read_text()
        assert page.startswith("<!DOCTYPE html>")


def test_a_second_run_may_write_over_the_pages(opt: Opt, quantised: Path) -> None:
    ran = opt("run", "net.py:make", "-p", "canonicalize", "-o", quantised, *QUICK)
    assert ran.code == 0, ran.err


def test_a_float_run_has_no_page(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", "canonicalize", "-o", "plain", "--json", *QUICK)
    assert ran.json()["quantization"] == []
    assert not list((tmp_path / "plain").glob("*.html"))


def test_a_table_the_worst_layer_first(opt: Opt, quantised: Path) -> None:
    ran = opt("explain-quantization", quantised / "program-onnx.pt2", "--data", "data.npz")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "quantised layers for onnx, worst first:"
    assert lines[1].split()[:5] == ["layer", "operator", "operand", "bits", "scales"]
    assert "not audited" in lines[2]
    assert "layers that stayed float:" in lines
    assert "outputs against the program without its fake-quants: output" in lines[-1]


def test_an_artifact_names_the_kernels(opt: Opt, quantised: Path) -> None:
    found = opt("explain-quantization", quantised / "program-openvino.pt2", "--data", "data.npz",
                "--artifact", quantised / "openvino", "--json").json()  # fmt: skip
    kernels = {row["layer"]: row["kernel"] for row in found["layers"]}
    assert kernels["conv"] == "int8"
    assert {row["kernel"] for row in found["floats"]} == {"float32"}


def test_pages_and_json_are_written_whole(opt: Opt, quantised: Path, tmp_path: Path) -> None:
    common = ("explain-quantization", quantised / "program-onnx.pt2", "--data", "data.npz",
              "--samples", "5")  # fmt: skip
    assert opt(*common, "-o", "noise.html").code == 0
    assert (tmp_path / "noise.html").read_text().endswith("</html>\n")
    ran = opt(*common, "-o", "noise.json")
    assert (ran.code, ran.out) == (0, "")
    assert json.loads((tmp_path / "noise.json").read_text()) == opt(*common, "--json").json()
    assert json.loads((tmp_path / "noise.json").read_text())["samples"] == 5


def test_another_float_program_is_refused_and_the_right_one_taken(
    opt: Opt, quantised: Path
) -> None:
    program = quantised / "program-onnx.pt2"
    assert opt("run", "net.py:make", "-p", "canonicalize,fold-batch-norm", "-o", "folded",
               *QUICK).code == 0  # fmt: skip
    assert opt("run", "net.py:make", "-p", "canonicalize", "-o", "float", *QUICK).code == 0
    common = ("explain-quantization", program, "--data", "data.npz", "--reference")
    assert "outputs against the float program" in opt(*common, "folded/program.pt2").out
    ran = opt(*common, "float/program.pt2")
    assert ran.code == 2
    assert "its call batch_norm is none of the quantised program" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--format", "html", "--json"), 2, "--json and --format html contradict each other"),
        (("-o", "."), 2, "is a folder; give a file"),
        (("--artifact", "out/openvino"), 2, "give the program that it was built from"),
        (("--samples", "0"), 2, "must be at least 1"),
        (("-o", "net.py/noise.html"), 6, "cannot be written"),
    ],
)
def test_errors_are_one_screen_and_leave_nothing(
    opt: Opt, quantised: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    program = quantised / "program-onnx.pt2"
    ran = opt("explain-quantization", program, "--data", "data.npz", *arguments)
    assert ran.code == code
    assert said in ran.err
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_float_program_and_wrong_data_are_refused(opt: Opt, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 1, 7, 5), "float32"))
    np.savez(tmp_path / "wrong.npz", x=np.zeros((2, 3), "float32"))
    opt("run", "net.py:make", "-p", "canonicalize", "-o", "float", *QUICK)
    ran = opt("explain-quantization", "float/program.pt2", "--data", "data.npz")
    assert ran.code == 2
    assert "holds no fake-quants" in ran.err
    opt("run", "net.py:make", "-p", "insert-fake-quant", "--target", "eager", "--data",
        "data.npz", "-o", "out", *QUICK)  # fmt: skip
    ran = opt("explain-quantization", "out/program.pt2", "--data", "wrong.npz")
    assert ran.code != 0
    assert "wrong.npz" in ran.err


def test_help_teaches_and_is_quick(opt_process: Opt, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    ran = opt_process("explain-quantization", "--help")
    # Half a second is the promise; a machine at work takes its time.
    assert time.perf_counter() - start < 2
    for word in ("Its own noise", "--artifact", "-o noise.html", "smooth-activations"):
        assert word in ran.out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "explain-quantization" in capsys.readouterr().out

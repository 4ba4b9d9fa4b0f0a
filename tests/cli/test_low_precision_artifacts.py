"""Artifacts in a low precision from the command line: built, verified, not compared blindly."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Opt

PASSES = "canonicalize,fold-batch-norm,cast-floats"
QUICK = ("--repeats", "0")


def test_a_run_certifies_by_the_noise_of_the_dtype(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "--target", "openvino",
              "-o", "out", "--json", *QUICK)  # fmt: skip
    assert ran.code == 0, ran.err
    report = ran.json()
    assert [row["verdict"] for row in report["artifacts"]] == ["PASSED", "PASSED"]
    assert {row["metric"] for row in report["artifacts"]} == {"sqnr dB"}
    assert report["artifacts"][0]["audit"]["conv"] == {"bfloat16": 1}
    assert report["quantization"] == []
    for target in ("eager", "openvino"):
        ran = opt("verify", f"out/{target}", "out/program.pt2")
        assert ran.code == 0, ran.err
        assert "PASSED" in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "eager", "openvino", "program.pt2", "report.json",
    }  # fmt: skip


def test_two_artifacts_are_not_compared_without_a_tolerance(opt: Opt) -> None:
    opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "--target", "openvino",
        "-o", "out", *QUICK)  # fmt: skip
    ran = opt("verify", "out/openvino", "out/eager")
    assert ran.code == 0
    assert "NOT_RUN" in ran.out
    assert "compare each with its own program" in ran.out
    assert opt("verify", "out/openvino", "out/eager", "--require-verified").code == 8


def test_the_wrong_program_fails(opt: Opt) -> None:
    opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "-o", "out", *QUICK)
    other = PASSES.replace("cast-floats", "cast-floats{dtype=float16}")
    opt("run", "net.py:make", "-p", other, "--seed", "1", "-o", "other", *QUICK)
    ran = opt("verify", "out/eager", "other/program.pt2")
    assert ran.code == 1
    assert "FAILED" in ran.out

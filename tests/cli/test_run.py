"""Run: passes, artifacts and the report; bad input ends in one screen and leaves nothing whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pruna_ir.lowering import Manifest
from pruna_ir.serialize import load_program
from tests.cli.conftest import Opt

PASSES = "canonicalize,fold-batch-norm"
QUICK = ("--repeats", "5")


def files(folder: Path) -> set[str]:
    """Everything under a folder, hidden files too."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_an_artifact_a_program_and_a_report(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "-o", "out", *QUICK)
    assert ran.code == 0, ran.err
    assert files(tmp_path / "out") == {
        "eager/certificate.json", "eager/manifest.json", "eager/program.pt2", "program.pt2",
        "report.json",
    }  # fmt: skip
    program = load_program(tmp_path / "out" / "program.pt2")
    assert [entry.text for entry in program.history][-1] == "fold-batch-norm"
    assert Manifest.read(tmp_path / "out" / "eager").program_hash == program.hash()
    assert "\x1b" not in ran.out
    for title in ("passes:", "artifacts:", "verification:", "rounding holds", "PASSED"):
        assert title in ran.out


def test_under_torchrun_one_process_writes_and_reports(opt: Opt, tmp_path: Path) -> None:
    run = ["-m", "pruna_ir", "run", "net.py:make", "-p", PASSES, "--target", "eager", "-o", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *run, *QUICK],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verification:") == 1
    assert "report.json" in files(tmp_path / "out")


def test_the_report_measures_steps_and_artifacts(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "-o", "out", "--json",
              *QUICK)  # fmt: skip
    report = ran.json()
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["pipeline"] == PASSES
    fold = report["steps"][-1]
    assert (fold["text"], fold["changed"]) == ("fold-batch-norm", True)
    assert fold["measured"] <= fold["limit"] == 1e-9
    # The norm's scale and shift are gone, the convolution has a bias.
    assert fold["size"]["parameters"] == report["original"]["parameters"] - 6
    (artifact,) = report["artifacts"]
    assert artifact["verdict"] == "PASSED"
    assert artifact["measured"] <= artifact["limit"]
    latency = artifact["latency"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert latency["original_p50"] > 0
    assert latency["speedup"] > 0
    assert artifact["bytes"] > 0


def test_the_report_of_a_pruned_program_holds_every_layers_flops_and_time(
    opt: Opt, tmp_path: Path
) -> None:
    text = "canonicalize,prune-channels{ratio=0.5},fold-batch-norm"
    ran = opt("run", "net.py:make", "-p", text, "--target", "eager", "--target", "onnx",
              "-o", "out", "--json", *QUICK)  # fmt: skip
    assert ran.code == 0, ran.err
    for artifact in json.loads((tmp_path / "out" / "report.json").read_text())["artifacts"]:
        layers = {row["layer"]: row for row in artifact["layers"]}
        assert list(layers) == ["conv", "head", "(everything else)"]
        # Half of the six channels are gone: outputs of one layer, inputs of the other.
        assert layers["conv"]["flops"] == 2 * layers["conv"]["new_flops"] == 2 * 6 * 9 * 35
        assert layers["head"]["flops"] == 2 * layers["head"]["new_flops"] == 2 * 3 * 6
        assert layers["conv"]["time"] > 0
        assert artifact["slow_layers"] == [name for name, row in layers.items() if row["slow"]]


def test_layers_are_timed_only_where_flops_fell_and_latency_is_measured(opt: Opt) -> None:
    prune = f"{PASSES},prune-channels{{ratio=0.5}}"
    for text, repeats in ((PASSES, "3"), (prune, "0")):
        report = opt("run", "net.py:make", "-p", text, "--target", "eager", "-o", "out", "--json",
                     "--repeats", repeats).json()  # fmt: skip
        assert report["artifacts"][0]["layers"] == []


def test_accuracy_per_step_and_artifact(opt: Opt, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(13, 1, 7, 5)).astype(np.float32)
    opt("run", "net.py:make", "-o", "first")
    program = load_program(tmp_path / "first" / "program.pt2")
    labels = program(torch.from_numpy(x))[0].argmax(1).numpy().copy()
    labels[:4] = (labels[:4] + 1) % 3
    np.savez(tmp_path / "eval.npz", x=x, labels=labels)
    report = opt("run", "net.py:make", "-p", PASSES, "--target", "eager", "-o", "out",
                 "--eval-data", "eval.npz", "--json", *QUICK).json()  # fmt: skip
    assert report["accuracy"] == report["artifacts"][0]["accuracy"] == 9 / 13
    assert report["steps"][-1]["accuracy"] == 9 / 13


def test_a_target_with_options(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "--target", "tvm{cpu=x86-64-v3}", "-o", "out",
              "--repeats", "0")  # fmt: skip
    assert ran.code == 0
    assert "x86-64-v3" in Manifest.read(tmp_path / "out" / "tvm").facts["target"]


def test_quantisation_per_target_and_the_warning_of_synthetic_data(
    opt: Opt, tmp_path: Path
) -> None:
    text = f"{PASSES},insert-fake-quant"
    ran = opt("run", "net.py:make", "-p", text, "--target", "eager", "--target", "onnx",
              "-o", "out", "--json", "--repeats", "0")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "warning: no calibration data was given" in ran.err
    report = ran.json()
    assert any("no calibration data" in note for note in report["notes"])
    targets = [step["target"] for step in report["steps"]]
    assert targets == ["", "", "eager", "onnx"]
    for target in ("eager", "onnx"):
        manifest = Manifest.read(tmp_path / "out" / target)
        assert manifest.attributes["calibration"] == "synthetic"
        assert manifest.attributes["quantized-for"] == target
        program = load_program(tmp_path / "out" / f"program-{target}.pt2")
        assert program.hash() == manifest.program_hash
    assert report["artifacts"][1]["audit"]["conv"] == {"int8": 1}
    assert report["steps"][-1]["size"]["bytes"] < report["steps"][1]["size"]["bytes"]


def test_real_calibration_data_needs_no_warning(opt: Opt, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((9, 1, 7, 5), np.float32) * 0.5)
    ran = opt("run", "net.py:make", "-p", f"{PASSES},insert-fake-quant{{target=eager}}",
              "--data", "data.npz", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json()["notes"] == []
    assert "calibration" not in ran.err


def test_instruments(opt: Opt, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", f"{PASSES},eliminate-dead-code", "--timing", "--remarks",
              "--statistics",
              "--stop-after", "2", "--dump-ir", "changed", "ir", "--no-check",
              "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    steps = ran.json()["steps"]
    assert [step["text"] for step in steps] == PASSES.split(",")
    assert steps[1]["verdict"] == "not checked"
    assert "ms  fold-batch-norm" in ran.err
    assert "fold-batch-norm: applied:" in ran.err
    assert "-1 aten.batch_norm.default" in ran.err
    assert "net.py" in ran.err
    assert "ir/002-fold-batch-norm.diff" in files(tmp_path)
    assert len(ran.json()["notes"]) == 2


def test_a_second_run_replaces_the_first_and_keeps_the_original(
    opt: Opt, tmp_path: Path
) -> None:
    arguments = ("run", "net.py:make", "--target", "eager", "-o", "out", "--repeats", "0")
    assert opt(*arguments, "--seed", "1").code == 0
    before = Manifest.read(tmp_path / "out" / "eager").program_hash
    assert opt(*arguments, "--seed", "2", "--keep-program").code == 0
    assert Manifest.read(tmp_path / "out" / "eager").program_hash != before
    assert (tmp_path / "out" / "original.pt2").is_file()


def test_weights_shapes_and_dynamic_dimensions(opt: Opt, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Linear(4, 3)\n"
    )
    save_file({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    ran = opt("run", "plain.py:make", "--weights", "w.safetensors", "--input-shape",
              "input=2x5x4", "--dynamic", "input:1=length", "-o", "out")  # fmt: skip
    assert ran.code == 0, ran.err
    program = load_program(tmp_path / "out" / "program.pt2")
    assert program.inputs[0].shape == ("batch", "length", 4)
    assert torch.equal(program(torch.ones(1, 2, 4))[0], torch.full((1, 2, 3), 4.0))


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "canonicalise"], "unknown pass 'canonicalise'; did you mean 'canonicalize'?"),
        (["-p", "prune-channels{ratoi=0.5}"], "did you mean 'ratio'?"),
        (["-p", "prune-channels{ratio=half}"], "option ratio must be float, not half"),
        (["-p", "canonicalize,"], "expected the name of a pass or scope"),
        (["--preset", "int9"], "unknown preset 'int9'; did you mean 'int8'?"),
        (["--target", "onx", "-o", "out"], "unknown backend 'onx'; did you mean 'onnx'?"),
        (["--target", "eager"], "give -o FOLDER"),
        (["--target", "eager", "--target", "eager", "-o", "o"], "a target is given twice"),
        (["--dump-ir", "sometimes", "ir"], "IR is dumped 'before', 'after' or 'changed'"),
        (["--input-shape", "x=2,3"], "is not a shape"),
        (["--input-shape", "y=2x3"], "has no input 'y'"),
        (["-p", "x", "--preset", "int8"], "not allowed with argument"),
        (["--batch-size", "0"], "must be at least 1"),
    ],
)
def test_usage_errors(opt: Opt, arguments: list[str], said: str) -> None:
    ran = opt("run", "net.py:make", *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.splitlines()) < 20
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_pipeline_errors_point_at_the_place(opt: Opt) -> None:
    err = opt("run", "net.py:make", "-p", "canonicalize,fold-bach-norm").err
    line = next(n for n, text in enumerate(err.splitlines()) if "^" in text)
    shown, caret = err.splitlines()[line - 1 : line + 1]
    assert shown[caret.index("^") :].startswith("fold-bach-norm")


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Bad weights and data beside ``net.py``."""
    state = {"conv.weight": torch.full((6, 1, 3, 3), torch.nan)}
    save_file(state, tmp_path / "nan.safetensors")
    save_file({"conv.weight": torch.ones(6, 2, 3, 3)}, tmp_path / "misfit.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pt")
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04 cut")
    np.savez(tmp_path / "shape.npz", x=np.zeros((4, 1, 7, 6), np.float32))
    np.savez(tmp_path / "unlabelled.npz", x=np.zeros((4, 1, 7, 5), np.float32))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.py:make"], "absent.py: no such file"),
        (["torchvision:resnet81"], "torchvision has no model 'resnet81'; nearest: resnet18"),
        (["cut.pt2"], "cut.pt2: is not a whole .pt2 file"),
        (["net.py:make", "--weights", "pickle.pt"], "refused: it is a pickle"),
        (["net.py:make", "--weights", "nan.safetensors"], "conv.weight holds NaN"),
        (["net.py:make", "--weights", "misfit.safetensors"], "missing: norm.weight"),
        (["net.py:make", "--input-shape", "2x4x7x5"], "the model cannot be captured"),
        (["net.py:make", "--data", "shape.npz"], "dimension 3 must be 5"),
        (["net.py:make", "--data", "absent.npz"], "cannot be read"),
        (["net.py:make", "--eval-data", "unlabelled.npz"], "has no array named 'labels'"),
    ],
)
def test_input_errors(opt: Opt, bad: Path, arguments: list[str], said: str) -> None:
    ran = opt("run", *arguments, "-p", "canonicalize", "-o", "out")
    assert ran.code == 3
    assert said in ran.err
    assert len(ran.err.splitlines()) < 20
    assert not (bad / "out").exists()


def test_capture_errors_show_the_users_line(opt: Opt, tmp_path: Path) -> None:
    (tmp_path / "branch.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        if x.sum() > 0:\n            return x\n        return -x\n\n"
        "def make():\n    return Net(), torch.ones(2, 3)\n"
    )
    ran = opt("run", "branch.py:make")
    assert ran.code == 3
    assert "branch.py:5" in ran.err
    assert "if x.sum() > 0:" in ran.err


def test_a_pass_that_fails_leaves_a_reproducer(opt: Opt, rascals: object, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "-p", 'canonicalize,refuse{why="too big"}', "-o", "out")
    assert ran.code == 4
    assert "refuse: too big" in ran.err
    assert "net.py" in ran.err
    assert "pruna-opt replay out/reproducer" in ran.err
    again = opt("replay", "out/reproducer")
    assert again.code == 4
    assert "failed again with PassError" in again.out
    assert files(tmp_path / "out") == {"reproducer/program.pt2", "reproducer/reproducer.json"}
    # A second failure does not replace the first one's folder.
    assert "out/reproducer-2" in opt("run", "net.py:make", "-p", "refuse", "-o", "out").err


def test_a_broken_promise_names_pass_and_node(opt: Opt, rascals: object) -> None:
    ran = opt("run", "net.py:make", "-p", "canonicalize,lie")
    assert ran.code == 1
    assert "lie: its promise does not hold" in ran.err
    assert opt("replay", "reproducer").code == 1
    # Unchecked, the lie goes through: the check is what finds it.
    assert opt("run", "net.py:make", "-p", "canonicalize,lie", "--no-check").code == 0


def test_an_invalid_program_is_an_error_of_its_own(opt: Opt, rascals: object) -> None:
    ran = opt("run", "net.py:make", "-p", "damage")
    assert ran.code == 5
    assert "aten.mean.dim does not accept its operands" in ran.err
    assert "failed while attempting" not in ran.err


def test_unsupported_nodes_are_all_named(opt: Opt, rascals: object, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "--target", "picky", "-o", "out")
    assert ran.code == 6
    for operator in ("aten.conv2d", "aten.batch_norm", "aten.relu", "aten.linear"):
        assert operator in ran.err
    assert not (tmp_path / "out" / "picky").exists()


def test_a_wrong_artifact_is_not_left_behind(opt: Opt, rascals: object, tmp_path: Path) -> None:
    ran = opt("run", "net.py:make", "--target", "wrong", "--target", "eager", "-o", "out",
              "--json", "--repeats", "0")  # fmt: skip
    assert ran.code == 1
    assert [row["verdict"] for row in ran.json()["artifacts"]] == ["FAILED", "PASSED"]
    assert not (tmp_path / "out" / "wrong").exists()
    assert (tmp_path / "out" / "eager").exists()


def test_a_broken_plugin_is_exit_code_7(opt: Opt, rascals: object) -> None:
    ran = opt("run", "net.py:make", "-p", "gone")
    assert ran.code == 7
    assert "pass 'gone' of rascals 1.0 cannot be imported" in ran.err


def test_a_missing_toolchain_is_found_before_any_work(opt: Opt, rascals: object) -> None:
    ran = opt("run", "net.py:make", "--target", "absent", "-o", "out")
    assert ran.code == 8
    assert "pip install absent-sdk" in ran.err
    assert "capturing" not in ran.err


def test_not_run_is_0_only_where_verification_is_not_required(
    opt: Opt, rascals: object, tmp_path: Path
) -> None:
    arguments = ("run", "net.py:make", "--target", "elsewhere", "-o", "out", "--json")
    ran = opt(*arguments)
    assert ran.code == 0, ran.err
    row = ran.json()["artifacts"][0]
    assert (row["verdict"], row["verification"]) == ("NOT_RUN", "NOT_RUN(no such device here)")
    assert row["latency"] is None
    assert opt(*arguments, "--require-verified").code == 8
    assert Manifest.read(tmp_path / "out" / "elsewhere").backend == "elsewhere"


@pytest.mark.parametrize("out", ["file/out", "/proc/pruna/out"])
def test_a_place_that_cannot_be_written_is_found_before_any_work(
    opt: Opt, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").write_text("mine")
    ran = opt("run", "net.py:make", "-p", "canonicalize", "-o", out)
    assert ran.code == 6
    assert "cannot be written" in ran.err
    assert "capturing" not in ran.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out/notes.txt", "out/eager/notes.txt"])
def test_the_users_own_files_are_never_replaced(opt: Opt, tmp_path: Path, name: str) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    ran = opt("run", "net.py:make", "--target", "eager", "-o", "out")
    assert ran.code == 2
    assert mine.read_text() == "mine"


def test_the_input_is_never_written_over(opt: Opt, tmp_path: Path) -> None:
    assert opt("run", "net.py:make", "-o", "out").code == 0
    before = (tmp_path / "out" / "program.pt2").read_bytes()
    ran = opt("run", "out/program.pt2", "-p", PASSES, "-o", "out")
    assert ran.code == 2
    assert "would be written over" in ran.err
    assert (tmp_path / "out" / "program.pt2").read_bytes() == before


def test_kill_in_the_middle_of_writing_leaves_nothing_that_looks_whole(
    opt_process: Opt, tmp_path: Path
) -> None:
    arguments = ("run", "net.py:make", "--target", "slow", "-o", "out", "--repeats", "0")
    (tmp_path / "die").write_text("")
    assert opt_process(*arguments).code == -signal.SIGKILL
    assert not (tmp_path / "out" / "slow").exists()
    assert not (tmp_path / "out" / "report.json").exists()
    (tmp_path / "die").unlink()
    assert opt_process(*arguments).code == 0
    assert Manifest.read(tmp_path / "out" / "slow").backend == "slow"
    whole = Manifest.read(tmp_path / "out" / "slow")
    (tmp_path / "die").write_text("")
    assert opt_process(*arguments, "--seed", "3").code == -signal.SIGKILL
    assert Manifest.read(tmp_path / "out" / "slow") == whole

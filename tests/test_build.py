"""Building: whole artifacts or nothing, verified or said why not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pruna_ir.backends.eager import Eager
from pruna_ir.build import Artifact, build, describe_offenders, open_artifact
from pruna_ir.compare import compare_artifacts
from pruna_ir.data import TensorData
from pruna_ir.errors import (
    LoweringError,
    ToolchainError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from pruna_ir.lowering import Availability, LoadOptions, Lowered, Offender, Verdict
from pruna_ir.program import Program
from pruna_ir.transform import API_VERSION, Context, Rewrite, apply
from tests import networks, quantised
from tests.networks import ScaleHead

conv_net = cache(networks.conv_net)
quantised_net = cache(quantised.quantised_net)


@dataclass(frozen=True)
class Wrong(Eager):
    """A backend with a bug: it doubles the head's weight."""

    name: ClassVar[str] = "wrong"

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        return super().lower(apply(ScaleHead(factor=2.0), program).program, folder, context)


@dataclass(frozen=True)
class Device(Eager):
    """A backend whose artifacts need a device that is not there."""

    name: ClassVar[str] = "device"

    def load(self, folder: Path, options: LoadOptions):
        raise ToolchainError("no such device")


@dataclass(frozen=True)
class Compiled(Device):
    """Likewise, but what it compiles from can run."""

    name: ClassVar[str] = "compiled"

    def load_intermediate(self, folder: Path, options: LoadOptions):
        return Eager().load(folder, options)


@dataclass(frozen=True)
class CompiledWrong(Compiled):
    name: ClassVar[str] = "compiled-wrong"

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        return Wrong().lower(program, folder, context)


@dataclass(frozen=True)
class Picky(Eager):
    """A backend that cannot lower anything."""

    name: ClassVar[str] = "picky"

    def unsupported(self, program: Program) -> list[Offender]:
        return [Offender.of(node, "no rule") for node in program.calls()]

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        raise AssertionError("unsupported nodes must be reported before any work")


@dataclass(frozen=True)
class Missing(Eager):
    name: ClassVar[str] = "missing"
    api_version: ClassVar[int] = API_VERSION

    def availability(self) -> Availability:
        return Availability("the package acme is missing: pip install acme", "same")


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what a build leaves -----------------------------------------------------------------------


def test_an_artifact_has_files_manifest_and_certificate(tmp_path):
    artifact = build(conv_net(), "eager", tmp_path / "out")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["certificate.json", "manifest.json", "program.pt2"]
    assert artifact.certificate.verdict is Verdict.PASSED
    assert artifact.size() == (tmp_path / "out/program.pt2").stat().st_size
    again = open_artifact(tmp_path / "out")
    assert again.certificate == artifact.certificate
    assert again.manifest.program_hash == conv_net().hash()
    (inputs,) = again.manifest.inputs
    assert inputs == {
        "name": "x",
        "dtype": "float32",
        "shape": ["batch", 3, 9, 9],
        "example": [2, 3, 9, 9],
    }


def test_it_loads_and_computes(tmp_path):
    artifact = build(conv_net(), "reference", tmp_path / "out")
    x = torch.randn(3, 3, 9, 9)
    (y,) = artifact.load().run([x.numpy()])
    assert torch.equal(torch.from_numpy(y), conv_net()(x)[0])


def test_data_of_the_context_is_a_stimulus(tmp_path):
    torch.manual_seed(0)
    data = TensorData((torch.randn(6, 3, 9, 9),), batch_size=4)
    artifact = build(quantised_net(), "eager", tmp_path / "out", Context(data=data))
    assert {c.stimulus for c in artifact.certificate.comparisons} == {"data"}


def test_integer_inputs_state_their_range(tmp_path):
    from pruna_ir.capture import capture

    program = capture(torch.nn.Embedding(11, 4), (torch.tensor([[1, 2, 3]]),))
    artifact = build(program, "eager", tmp_path / "out")
    assert artifact.manifest.inputs[0]["range"] == [0, 10]


def test_a_second_build_replaces_the_first(tmp_path):
    build(conv_net(), "eager", tmp_path / "out")
    build(quantised_net(), "eager", tmp_path / "out")
    assert open_artifact(tmp_path / "out").manifest.program_hash == quantised_net().hash()
    assert listing(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    build(conv_net(), "eager", tmp_path / "out")
    open_artifact(tmp_path / "out")


# -- what it refuses ---------------------------------------------------------------------------


def test_a_foreign_folder_stays(tmp_path):
    build(conv_net(), "eager", tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no artifact of pruna-ir and will not be replaced"):
        build(conv_net(), "eager", tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_file_stays(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is not a folder"):
        build(conv_net(), "eager", tmp_path / "out")


def test_every_offender_is_named_and_nothing_written(tmp_path):
    with pytest.raises(UnsupportedError) as error:
        build(conv_net(), Picky(), tmp_path / "out")
    assert all(node.name in str(error.value) for node in conv_net().calls())
    assert listing(tmp_path) == []


def test_offenders_fit_one_screen():
    offenders = [Offender(f"n{i}", "aten.x", "no rule", "net.py:4", "") for i in range(45)]
    lines = describe_offenders("picky", offenders).splitlines()
    assert lines[0] == "backend 'picky' cannot lower 45 nodes of the program (1 operators: aten.x)"
    assert lines[1] == "  n0: aten.x (net.py:4): no rule"
    assert lines[-2] == "  ... and 25 more"
    assert len(lines) == 23


def test_a_missing_toolchain_is_named(tmp_path):
    with pytest.raises(ToolchainError, match="'missing' cannot build here: the package acme"):
        build(conv_net(), Missing(), tmp_path / "out")


def test_an_unknown_backend_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        build(conv_net(), "openvin", tmp_path / "out")


# -- verification ------------------------------------------------------------------------------


def test_a_wrong_artifact_is_not_left_behind(tmp_path):
    build(conv_net(), "eager", tmp_path / "out")
    with pytest.raises(VerificationError, match="does not compute what the program computes"):
        build(conv_net(), Wrong(), tmp_path / "out")
    assert open_artifact(tmp_path / "out").manifest.backend == "eager"
    assert listing(tmp_path) == ["out"]


def test_a_wrong_artifact_can_be_kept_for_a_look(tmp_path):
    artifact = build(conv_net(), Wrong(), tmp_path / "out", keep_failed=True)
    assert artifact.certificate.verdict is Verdict.FAILED
    assert open_artifact(tmp_path / "out").certificate.verdict is Verdict.FAILED


def test_what_cannot_run_here_is_not_called_verified(tmp_path):
    certificate = build(conv_net(), Device(), tmp_path / "out").certificate
    assert (certificate.verdict, certificate.level) == (Verdict.NOT_RUN, "built")
    assert certificate.summary() == "NOT_RUN(no such device)"


def test_a_verified_intermediate_is_reported_as_such(tmp_path):
    certificate = build(conv_net(), Compiled(), tmp_path / "out").certificate
    assert (certificate.verdict, certificate.level) == (Verdict.NOT_RUN, "intermediate")
    assert certificate.reason.startswith(
        "no such device; the file that it was built from was verified: output output on"
    )
    assert {c.outcome for c in certificate.comparisons} == {"passed"}


def test_a_wrong_intermediate_fails(tmp_path):
    with pytest.raises(VerificationError):
        build(conv_net(), CompiledWrong(), tmp_path / "out")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("backend", [Device(), Compiled()])
def test_not_run_is_an_error_where_verification_is_required(tmp_path, backend):
    with pytest.raises(ToolchainError, match="cannot be verified here: no such device"):
        build(conv_net(), backend, tmp_path / "out", require_verified=True)
    assert listing(tmp_path) == []


def test_unverified_says_so(tmp_path):
    certificate = build(conv_net(), "eager", tmp_path / "out", verify=False).certificate
    assert certificate.summary() == "NOT_RUN(verification was not asked for)"
    with pytest.raises(UsageError, match="can never hold"):
        build(conv_net(), "eager", tmp_path / "out", verify=False, require_verified=True)


# -- tampering and crashes ---------------------------------------------------------------------


def test_a_changed_file_is_found(tmp_path):
    build(conv_net(), "eager", tmp_path / "out")
    with (tmp_path / "out/program.pt2").open("ab") as file:
        file.write(b"x")
    with pytest.raises(LoweringError, match=r"program\.pt2 is missing or differs from its sha256"):
        open_artifact(tmp_path / "out")


@pytest.mark.parametrize("name", ["manifest.json", "certificate.json", "program.pt2"])
def test_a_missing_file_is_found(tmp_path, name):
    build(conv_net(), "eager", tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(LoweringError):
        open_artifact(tmp_path / "out")


def test_half_a_certificate_is_found(tmp_path):
    build(conv_net(), "eager", tmp_path / "out")
    path = tmp_path / "out/certificate.json"
    value = json.loads(path.read_text())
    del value["comparisons"]
    path.write_text(json.dumps(value))
    with pytest.raises(LoweringError, match="is not a certificate"):
        open_artifact(tmp_path / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from pruna_ir.backends.eager import Eager
from pruna_ir.build import build
from pruna_ir.serialize import load_program

class Killed(Eager):
    def lower(self, program, folder, context):
        super().lower(program, folder, context)
        os.kill(os.getpid(), signal.SIGKILL)

build(load_program(Path(sys.argv[1])), Killed(), Path(sys.argv[2]))
"""


def test_a_kill_leaves_the_old_artifact(tmp_path):
    from pruna_ir.serialize import save_program

    before = build(conv_net(), "eager", tmp_path / "out")
    save_program(conv_net(), tmp_path / "program.pt2")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "program.pt2", tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert open_artifact(tmp_path / "out") == before
    (partial,) = (name for name in listing(tmp_path) if name not in ("out", "program.pt2"))
    assert partial.startswith(".out.")
    assert partial.endswith(".partial")


# -- artifact against artifact -----------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> tuple[Artifact, Artifact]:
    first, second = (build(conv_net(), "eager", tmp_path / name) for name in "ab")
    return first, second


def changed(program: Program, name: str, factor: float) -> Program:
    rw = Rewrite(program, "test", Context())
    rw.set_tensor(name, program.tensor(name).detach() * factor)
    return rw.finish()


def test_artifacts_of_one_program_agree(pair):
    found = compare_artifacts(*pair)
    assert found.verdict is Verdict.PASSED
    assert found.rule == "the sum of both certificates' tolerances"
    assert [d.sizes[0][0] for d in found.differences] == [1, 3]
    assert str(found).startswith("PASSED: output output: relative error 0 (must be <= ")


def test_quantised_artifacts_of_one_program_agree(tmp_path):
    first, second = (build(quantised_net(), "eager", tmp_path / name) for name in "ab")
    found = compare_artifacts(first, second)
    assert (found.verdict, found.metric) == (Verdict.PASSED, "sqnr dB")
    limits = [c.limit for c in first.certificate.comparisons]
    (limit,) = {d.limit for d in found.differences}
    assert limit == pytest.approx(min(limits) - 6.0206, abs=1e-3)


def test_a_changed_artifact_disagrees(pair, tmp_path):
    other = build(changed(conv_net(), "head.weight", 1.001), "eager", tmp_path / "c")
    assert compare_artifacts(other, pair[0], min_sqnr_db=40.0).verdict is Verdict.PASSED
    assert compare_artifacts(other, pair[0], min_sqnr_db=80.0).verdict is Verdict.FAILED


def test_artifacts_of_different_programs_need_a_limit(pair, tmp_path):
    other = build(changed(conv_net(), "head.weight", 1.001), "eager", tmp_path / "c")
    with pytest.raises(UsageError, match="made from different programs"):
        compare_artifacts(pair[0], other)


def test_unverified_artifacts_need_a_limit(pair, tmp_path):
    other = build(conv_net(), "eager", tmp_path / "c", verify=False)
    with pytest.raises(UsageError, match="was never verified"):
        compare_artifacts(pair[0], other)


def test_artifacts_with_other_outputs_are_not_compared(pair, tmp_path):
    from pruna_ir.capture import capture

    other = build(capture(torch.nn.Flatten(), (torch.randn(2, 3, 9, 9),)), "eager", tmp_path / "c")
    with pytest.raises(UsageError, match="differ in their inputs"):
        compare_artifacts(pair[0], other)

"""A GPU target: TVM's own schedules, code generated without a GPU, never a pass without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_gpu import CODE, compiler_missing, gpu_target
from pruna_ir.backends.tvm_runtime import LIBRARY, MODEL
from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError, ToolchainError, UsageError
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.program import Program
from tests.backends.backend_models import Block, SmallCnn, inputs, program

needs_nvcc = pytest.mark.skipif(bool(compiler_missing()), reason="needs nvcc")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU")


def dense() -> Program:
    return capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))


@pytest.fixture(scope="module", params=[SmallCnn, Block])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("cuda") / "a"
    return build(program(request.param), ToTvm(device="cuda", arch="sm_89"), folder)


@needs_no_gpu
def test_code_is_generated_and_not_run(artifact: Artifact) -> None:
    assert artifact.certificate.verdict is Verdict.NOT_RUN
    assert artifact.certificate.reason.startswith("no CUDA device; the code was compiled for")
    assert artifact.certificate.comparisons == ()
    assert artifact.manifest.facts["schedules"] == "TVM's own for GPUs (dlight)"
    assert '"arch": "sm_89"' in artifact.manifest.facts["target"].replace('":"', '": "')
    assert json.loads((artifact.folder / MODEL).read_text())["device"] == "cuda"
    assert b"__global__" in (artifact.folder / LIBRARY).read_bytes()
    with pytest.raises(ToolchainError, match="no CUDA device"):
        ToTvm(device="cuda", arch="sm_89").load(artifact.folder, LoadOptions())


@needs_no_gpu
def test_it_cannot_count_as_verified(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"cannot be verified here: no CUDA device"):
        build(dense(), ToTvm(device="cuda"), tmp_path / "a", require_verified=True)
    assert not (tmp_path / "a").exists()


@needs_gpu
@pytest.mark.parametrize("int8", [False, True])
def test_it_computes_what_the_program_does(int8: bool, tmp_path: Path) -> None:
    artifact = build(program(SmallCnn, int8=int8), ToTvm(device="cuda"), tmp_path / "a")
    assert artifact.certificate.verdict is Verdict.PASSED
    (result,) = artifact.load().run([inputs(SmallCnn, 3).numpy()])
    assert result.shape == (3, 5)


@needs_nvcc
def test_the_kernels_compile_for_the_architecture(artifact: Artifact) -> None:
    machine = (artifact.folder / CODE).read_bytes()[18:20]
    assert int.from_bytes(machine, "little") == 190  # EM_CUDA in an ELF header


@needs_nvcc
def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="TVM cannot compile the program"):
        build(dense(), ToTvm(device="cuda", arch="sm_1"), tmp_path / "a")


def test_a_tvm_without_the_code_generator_is_refused() -> None:
    """The wheels have none for Vulkan."""
    with pytest.raises(ToolchainError, match=r"no code generator for vulkan; .*USE_VULKAN=ON"):
        gpu_target("", host_target(), "vulkan")


def test_kernels_that_were_not_compiled_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert compiler_missing().startswith("tvm: nvcc is not on PATH, so the kernels' CUDA source")


@needs_no_gpu
def test_without_a_device_it_does_not_execute() -> None:
    assert ToTvm(device="cuda").availability().execute.startswith("no CUDA device")
    assert ToTvm().availability().execute == ""


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (ToTvm(arch="sm_80"), "give device=cuda with it"),
        (ToTvm(device="cuda", tune=1.0), "tune and records are for device=cpu"),
        (ToTvm(device="cuda", records="x.json"), "tune and records are for device=cpu"),
    ],
)
def test_options_that_contradict_each_other(
    backend: ToTvm, message: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, ToolchainError), match=message):
        build(dense(), backend, tmp_path / "a")

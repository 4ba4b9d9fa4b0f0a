"""The instruction sets of a target, by Linux's names, are what the loader asks a machine for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_processors import absent_features, needed_features
from pruna_ir.backends.tvm_runtime import MODEL, processor_features
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.errors import ToolchainError
from pruna_ir.lowering import LoadOptions
from pruna_ir.program import Program

V3 = [
    "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "pni", "popcnt", "sse", "sse2",
    "sse4_1", "sse4_2", "ssse3",
]  # fmt: skip
"""The vector and bit instructions of the x86-64 psABI's third level."""


def linear() -> Program:
    return capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))


def target(cpu: str, **more: Any) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, **more})


def test_the_third_level_of_x86_64() -> None:
    assert needed_features(target("x86-64-v3")) == V3


def test_names_that_differ_between_llvm_and_linux() -> None:
    needed = needed_features(target("sapphirerapids"))
    assert {"amx_int8", "avx512_vnni", "avx512_bf16", "avx_vnni", "pclmulqdq"} <= set(needed)
    assert not any(name.startswith(("fast", "slow", "64bit")) for name in needed)


def test_arm_has_names_of_its_own() -> None:
    cpu = target("neoverse-n1", mtriple="aarch64-linux-gnu")
    assert needed_features(cpu) == ["aes", "asimd", "asimddp", "asimdhp"]


def test_this_machine_runs_code_for_itself() -> None:
    assert set(needed_features(host_target())) <= set(processor_features())


def test_what_a_virtual_machine_hides_is_left_out() -> None:
    zen4 = target("znver4")
    shown = [name for name in needed_features(zen4) if name != "avx512_bf16"]
    assert absent_features(zen4, shown) == ["-avx512bf16"]
    narrowed = target("znver4", mattr=["-avx512bf16"])
    assert needed_features(narrowed) == shown
    assert absent_features(narrowed, shown) == []


def test_a_system_that_lists_nothing_hides_nothing() -> None:
    assert absent_features(target("znver4"), []) == []


def test_the_artifact_states_what_its_target_needs(tmp_path: Path) -> None:
    build(linear(), ToTvm(cpu="x86-64-v3"), tmp_path / "a", verify=False)
    assert json.loads((tmp_path / "a" / MODEL).read_text())["processor"] == V3


@pytest.mark.skipif("amx_int8" in processor_features(), reason="asks for a processor without AMX")
def test_code_for_a_better_processor_is_not_run(tmp_path: Path) -> None:
    backend = ToTvm(cpu="sapphirerapids")
    artifact = build(linear(), backend, tmp_path / "a")
    assert artifact.certificate.summary().startswith("NOT_RUN(")
    assert "this processor lacks amx_bf16, amx_int8" in artifact.certificate.reason
    with pytest.raises(ToolchainError, match="lacks amx_bf16"):
        backend.load(tmp_path / "a", LoadOptions())

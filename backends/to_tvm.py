"""The tvm backend: a shared library that runs without torch (Apache TVM, Relax).

Files of an artifact: ``model.so``, ``parameters.npz``, ``model.json`` and ``load.py``, which loads
them with numpy and TVM's runtime alone (it is `pruna_ir.backends.tvm_runtime`); ``kernels.json``
(what the compiler put into the library) and, where tiles were measured, ``tuning.json``.

Dynamic dimensions stay dynamic. Quantised programs store int8 weights. Where the processor has
AVX512-VNNI their layers multiply bytes, and what lies between them is stored in bytes; where it
has not, and where an operand has a zero point for each channel or a weight one other than 0, they
compute in float32 between quantize and dequantize. Products and convolutions in bfloat16 multiply
pairs of it where the processor has AVX512-BF16; all else of such programs, and these elsewhere,
compute in float32. The audit tells which.

Limits: linking needs a C or C++ compiler; code is compiled for one processor, this machine's
unless ``cpu`` names another as LLVM does (``x86-64-v3``, ``znver4``), or for a GPU with TVM's own
schedules.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from pruna_ir.backends import (
    tvm_build,
    tvm_gpu,
    tvm_import,
    tvm_runtime,
    tvm_tiles,
    tvm_tuning,
)
from pruna_ir.backends.tvm_bfloat16 import multiplies_bfloat16
from pruna_ir.backends.tvm_dot import BFLOAT16
from pruna_ir.errors import LoweringError, ToolchainError, UsageError
from pruna_ir.lowering import Availability, KernelRow, LoadOptions, Lowered, Offender
from pruna_ir.program import Program
from pruna_ir.quantization import U8_ASYMMETRIC, QuantScheme, fake_quant_op
from pruna_ir.transform import API_VERSION, Context

NO_DEVICE = "no CUDA device; the artifact runs on an NVIDIA GPU with its driver"
_SHOWN = 8
_FLOATS = (
    "tvm: quantised layers multiply float32: {cpu} has no AVX512-VNNI, which multiplies bytes"
)
_WIDE = (
    "tvm: products and convolutions in bfloat16 multiply float32: {cpu} has no AVX512-BF16, which "
    "multiplies pairs of bfloat16"
)
_COMPILERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")


class _Runner:
    """A loaded artifact with the compiler's list of its kernels."""

    def __init__(self, runner: tvm_runtime.TvmRunner, kernels: list[KernelRow]) -> None:
        self._runner = runner
        self._kernels = kernels

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input.

        Raises:
            UsageError: an input has another dtype or shape than the artifact was built for.
        """
        return self._runner.run(inputs)

    def audit(self) -> list[KernelRow]:
        """The compiled functions that a run calls, in order, with their precision."""
        return self._kernels


@dataclass(frozen=True)
class ToTvm:
    """Lower to a shared library with TVM.

    Attributes:
        cpu: the processor to compile for, as LLVM names it; empty for this machine's.
        device: ``cpu``, or ``cuda`` for a GPU of NVIDIA's.
        arch: the GPU's architecture, such as ``sm_89``; empty for the device at hand, and for
            sm_80 without one.
        tune: seconds to spend on measuring which register tiles are the fastest here; 0 takes
            the rule's.
        records: a ``tuning.json`` whose tiles are used; what it does not hold is by rule, or
            measured where ``tune`` is given.
    """

    cpu: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    arch: str = ""
    tune: float = 0.0
    records: str = ""

    name: ClassVar[str] = "tvm"
    api_version: ClassVar[int] = API_VERSION
    variants: ClassVar[tuple[str, ...]] = ("device=cuda",)
    zeros: ClassVar[Mapping[str, str]] = {"": "dense speed: zeros are multiplied like any number"}
    # The identity of a residual add is read from memory: as bytes it is a quarter. What only
    # average pools and float operators read stays float, and max pools carry bytes by themselves.
    scheme: ClassVar[QuantScheme] = QuantScheme(
        U8_ASYMMETRIC, residual="identity", average_pool=False, layer_outputs=False,
        repeat_behind_movers=False,
    )

    def availability(self) -> Availability:
        """Whether TVM is installed and, for building, a compiler that can link."""
        if find_spec("tvm") is None:
            missing = "TVM is not installed; pip install 'pruna-ir[tvm]'"
            return Availability(build=missing, execute=missing)
        runs = self.device == "cpu" or torch.cuda.is_available()
        return Availability(build=_linker_missing(), execute="" if runs else NO_DEVICE)

    def unsupported(self, program: Program) -> list[Offender]:
        """Every node that TVM's importer cannot translate, after decomposition to core ATen."""
        return tvm_import.unsupported(program)

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Compile the program and write the artifact's files.

        Raises:
            ToolchainError: there is no compiler to link with.
            UnsupportedError: TVM has no translation of some nodes.
            LoweringError: TVM cannot import or compile the program.
        """
        if missing := self.availability().build:
            raise ToolchainError(missing)
        tvm_runtime.prepare_threads()  # tuning and the folding of constants run code
        target = self._target()
        context.progress("tvm: import", 0, 2)
        imported = tvm_import.import_program(program)
        tiles = self._tiles(imported, target, folder, context)
        context.progress("tvm: compile", 1, 2)
        unscheduled = tvm_build.build(imported, program, folder, target, tiles)
        context.progress("tvm: compile", 2, 2)
        told = _without_schedules(unscheduled, str(target))
        if self.device == "cuda":
            missing = tvm_gpu.compiler_missing()
            told += (missing,) if missing else ()
        else:
            told += _without_dots(program, target)
        for text in told:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        own = tvm_build.SCHEDULES if self.device == "cpu" else tvm_gpu.SCHEDULES
        return Lowered(
            main=tvm_runtime.MODEL,
            tool_versions={"apache-tvm": version("apache-tvm"), "torch": version("torch")},
            facts={
                "schedules": own,
                "tvm-default-schedules": list(unscheduled),
                "tiles": tiles.counts(),
                "target": str(target),
                "stored-parameter-bytes": sum(p.nbytes for p in imported.parameters.values()),
            },
            warnings=told,
        )

    def _target(self) -> Any:
        """What to compile for."""
        host = tvm_build.host_target(self.cpu)
        if self.device == "cpu":
            if self.arch:
                raise UsageError("tvm: arch names a GPU's architecture; give device=cuda with it")
            return host
        if self.tune or self.records:
            raise UsageError("tvm: tune and records are for device=cpu; TVM schedules GPUs itself")
        return tvm_gpu.gpu_target(self.arch, host)

    def _tiles(
        self, imported: tvm_import.Imported, target: Any, folder: Path, context: Context
    ) -> tvm_tiles.Tiles:
        """The register tiles: measured, recorded or by rule."""
        known = (
            tvm_tiles.read_records(Path(self.records), str(target)) if self.records else []
        )
        if self.tune > 0:
            asked = tvm_tiles.Tiles(known)
            tvm_build.optimized(imported, target, asked)
            known = [*known, *tvm_tuning.tune(asked, target, self.tune, context.progress)]
        tiles = tvm_tiles.Tiles(known)
        if known:
            tvm_tiles.write_records(folder / tvm_tiles.RECORDS, known, str(target))
        return tiles

    def load(self, folder: Path, options: LoadOptions) -> _Runner:
        """Load an artifact to run it.

        Raises:
            ToolchainError: TVM is missing, or the processor lacks instructions that the code uses.
            LoweringError: a file is missing, damaged or refused.
        """
        runner = tvm_runtime.load_tvm(folder, options.threads)
        listed = folder / tvm_build.KERNELS
        try:
            rows = json.loads(listed.read_text(encoding="utf-8"))
            kernels = [KernelRow(**row) for row in rows]
        except (OSError, ValueError, TypeError) as error:
            raise LoweringError(f"{listed}: cannot be read: {error}") from error
        return _Runner(runner, kernels)


def _is_quantised(program: Program) -> bool:
    return any(node.target is fake_quant_op() for node in program.calls())


def _without_dots(program: Program, target: Any) -> tuple[str, ...]:
    """A line for each narrow type of a program that the processor cannot multiply."""
    cpu, lines = target.attrs["mcpu"], []
    if _is_quantised(program) and not tvm_build.has_dots(target):
        lines.append(_FLOATS.format(cpu=cpu))
    if multiplies_bfloat16(program) and not tvm_build.has_dots(target, BFLOAT16):
        lines.append(_WIDE.format(cpu=cpu))
    return tuple(lines)


def _without_schedules(functions: Mapping[str, str], target: str) -> tuple[str, ...]:
    """A line for every reason why compiled functions keep TVM's own loops, which are slow."""
    lines = []
    for reason in sorted(set(functions.values())):
        names = [name for name, why in functions.items() if why == reason]
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        lines.append(
            f"tvm: {len(names)} of the compiled functions keep TVM's own loops, which are slow: "
            f"{reason} ({shown}; target {target})"
        )
    return tuple(lines)


def _linker_missing() -> str:
    """Why no library can be linked here; empty where one can."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    if any(shutil.which(name) for name in ([named] if named else _COMPILERS)):
        return ""
    looked = f"the compiler that CXX or CC names ({named})" if named else "any of g++, clang++, cc"
    return (
        f"linking a TVM library needs a C++ compiler, and {looked} is not on PATH; install one "
        "(apt-get install g++) or point CXX to it"
    )

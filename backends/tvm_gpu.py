"""GPU targets: TVM's own schedules (dlight), and what is missing to generate code for one.

    legalize -> lift weight preparation -> fuse -> dlight: matmul, GEMV, reduction, fallback

Generating code needs no GPU. Where there is none, TVM puts the kernels' CUDA source into the
library, which NVRTC compiles when the artifact is loaded beside a GPU. Where nvcc is installed, it
compiles the source at build time too, so that source which does not compile is no artifact;
``kernels.cubin`` holds the result for a look. A TVM without a code generator is refused.

Limits: float32 and the grids of quantised programs as TVM's operators compute them; no schedule of
ours, no tensor cores, no cuDNN.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruna_ir.backends.tvm_fusion import fused_loops
from pruna_ir.errors import ToolchainError

CODE = "kernels.cubin"
SCHEDULES = "TVM's own for GPUs (dlight)"
ARCH = "sm_80"
"""The architecture to compile for where none is given and there is no device."""
_ATTRIBUTES: Mapping[str, int] = {
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
"""Limits that every CUDA device since SM30 has, without asking a device."""


def gpu_target(arch: str, host: Any, kind: str = "cuda") -> Any:
    """A GPU as a target.

    Args:
        arch: such as ``sm_89``; empty for the device at hand, and for `ARCH` without one.
        host: the LLVM target of the code around the kernels.
        kind: TVM's name of the code generator.

    Raises:
        ToolchainError: the installed TVM has no such code generator.
    """
    import tvm

    if tvm.get_global_func(f"target.build.{kind}", allow_missing=True) is None:
        raise ToolchainError(
            f"the installed TVM has no code generator for {kind}; install a TVM that was built "
            f"with USE_{kind.upper()}=ON (for cuda, apache-tvm on PyPI for Linux is one)"
        )
    device = tvm.device(kind, 0)
    if not arch:
        present = device.compute_version if device.exist else ""
        arch = f"sm_{present.replace('.', '')}" if present else ARCH
    return tvm.target.Target({"kind": kind, "arch": arch, **_ATTRIBUTES}, host=host)


def scheduled(module: Any, target: Any) -> Any:
    """The module with TVM's own schedules for a GPU."""
    import tvm
    from tvm.s_tir import dlight

    steps = tvm.transform.Sequential(
        [
            *fused_loops(),
            dlight.ApplyDefaultSchedule(
                dlight.gpu.Matmul(),
                dlight.gpu.GEMV(),
                _Lowerable(dlight.gpu.Reduction()),
                _Lowerable(dlight.gpu.GeneralReduction()),
                dlight.gpu.Fallback(),
            ),
        ]
    )
    with target:
        return steps(module)


def compiler_missing() -> str:
    """Why the kernels' source cannot be compiled while building; empty where it can."""
    if shutil.which("nvcc"):
        return ""
    return (
        "tvm: nvcc is not on PATH, so the kernels' CUDA source was not compiled here; it is "
        "compiled when the artifact is loaded beside a GPU"
    )


def machine_code(executable: Any, target: Any) -> bytes:
    """What nvcc makes of the kernels of a compiled module for the target's architecture.

    Raises:
        RuntimeError: nvcc refuses the source or the architecture.
    """
    from tvm.support import nvcc

    with target:
        parts = [
            nvcc.compile_cuda(source, target_format="cubin", compiler="nvcc")
            for source in _sources(executable.mod)
        ]
    return b"".join(bytes(part) for part in parts)


def _sources(module: Any) -> Iterator[str]:
    """The CUDA source of a runtime module and what it imports."""
    if module.kind == "cuda":
        yield str(module.inspect_source("cuda"))
    for imported in module.imports:
        yield from _sources(imported)


@dataclass(frozen=True)
class _Lowerable:
    """A rule of TVM's, where what it makes can be lowered; elsewhere the next rule is asked.

    ``Reduction`` takes a grouped convolution with an epilogue, and TVM then refuses its loops
    ("reduction-related loops ... are not the deepest").
    """

    rule: Any

    def apply(self, function: Any, target: Any, tunable: bool) -> Any:
        """The schedule, or None."""
        import tvm
        from tvm import s_tir

        made = self.rule.apply(function, target, tunable)
        if made is None:
            return None
        t = s_tir.transform
        steps = tvm.transform.Sequential([t.CanonicalizeLoop(), t.LowerCrossThreadReduction()])
        for schedule in made if isinstance(made, list) else [made]:
            try:
                steps(schedule.mod)
            except ValueError:
                return None
        return made


__all__: Sequence[str] = (
    "ARCH", "CODE", "SCHEDULES", "compiler_missing", "gpu_target", "machine_code", "scheduled",
)  # fmt: skip

"""GPU targets: TVM's own schedules (dlight), and what is missing to generate code for one.

    legalize -> lift weight preparation -> fuse -> dlight: matmul, GEMV, reduction, fallback

Code for CUDA is generated with NVRTC or nvcc, which need no GPU; running it needs one. What the
installed TVM has no code generator for is refused, with what would bring one.

Limits: float32 and the grids of quantised programs as TVM's operators compute them; no schedule of
ours, no tensor cores, no cuDNN.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from pruna_ir.backends.tvm_runtime import ENTRY, TRANSFORM

SCHEDULES = "TVM's own for GPUs (dlight)"
ARCH = "sm_80"
"""The architecture to compile for where none is given and there is no device."""
_ATTRIBUTES: Mapping[str, int] = {
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "thread_warp_size": 32,
}
"""Limits that every CUDA device since SM30 has, without asking a device."""


def gpu_target(arch: str, host: Any) -> Any:
    """A CUDA target.

    Args:
        arch: such as ``sm_89``; empty for the device at hand, and for `ARCH` without one.
        host: the LLVM target of the code around the kernels.
    """
    import tvm

    device = tvm.cuda(0)
    if not arch:
        present = device.compute_version if device.exist else ""
        arch = f"sm_{present.replace('.', '')}" if present else ARCH
    return tvm.target.Target({"kind": "cuda", "arch": arch, **_ATTRIBUTES}, host=host)


def generator_missing() -> str:
    """Why no CUDA code can be generated here; empty where it can.

    TVM compiles with NVRTC through cuda-bindings, or with nvcc where TVM_CUDA_COMPILE_MODE says
    so; whether its library holds the generator at all is known only when it is loaded.
    """
    if os.environ.get("TVM_CUDA_COMPILE_MODE", "nvrtc").lower() == "nvcc":
        found = shutil.which("nvcc") is not None
        return "" if found else "TVM_CUDA_COMPILE_MODE is nvcc, and nvcc is not on PATH"
    if find_spec("cuda") is not None and find_spec("cuda.bindings") is not None:
        return ""
    return (
        "compiling CUDA code needs NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc, or install "
        "the CUDA toolkit and set TVM_CUDA_COMPILE_MODE=nvcc"
    )


def has_generator() -> bool:
    """Whether the installed TVM library holds a CUDA code generator."""
    import tvm

    return tvm.get_global_func("target.build.cuda", allow_missing=True) is not None


def scheduled(module: Any, target: Any) -> Any:
    """The module with TVM's own schedules for a GPU."""
    import tvm
    from tvm import relax
    from tvm.s_tir import dlight

    t = relax.transform
    entries = [ENTRY, TRANSFORM]
    steps = tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            t.DecomposeOpsForInference(),
            t.CanonicalizeBindings(),
            t.LegalizeOps(),
            t.LiftTransformParams(),
            t.DeadCodeElimination(entries),
            t.AnnotateTIROpPattern(),
            t.FoldConstant(),
            t.FuseOps(),
            t.FuseTIR(),
            t.DeadCodeElimination(entries),
            dlight.ApplyDefaultSchedule(
                dlight.gpu.Matmul(),
                dlight.gpu.GEMV(),
                dlight.gpu.Reduction(),
                dlight.gpu.GeneralReduction(),
                dlight.gpu.Fallback(),
            ),
        ]
    )
    with target:
        return steps(module)


__all__: Sequence[str] = (
    "ARCH", "SCHEDULES", "generator_missing", "gpu_target", "has_generator", "scheduled",
)  # fmt: skip

"""Which instruction sets compiled code may use, by the names that Linux gives them.

A target names a processor (``znver4``, ``x86-64-v3``), from which LLVM knows the instruction sets
that its code may hold. A machine without one of them would end such code with an illegal
instruction, so that the loader compares them with what the system lists. LLVM's names differ from
those of Linux here and there; LLVM also lists what concerns its own choices (``fast-lzcnt``) or
the operating system, and neither matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAME = (
    "adx", "aes", "avx", "avx2", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512ifma",
    "avx512vbmi", "avx512vl", "bf16", "bmi2", "f16c", "fma", "fma4", "gfni", "i8mm", "movbe",
    "popcnt", "sse", "sse2", "sse4a", "ssse3", "sve", "sve2", "vaes", "vpclmulqdq", "xop",
)  # fmt: skip
_LINUX_NAMES: Mapping[str, str] = {name: name for name in _SAME} | {
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "lzcnt": "abm",
    "neon": "asimd",
    "pclmul": "pclmulqdq",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}
"""LLVM's name of an instruction set, and that in ``/proc/cpuinfo``."""


def needed_features(target: Any) -> list[str]:
    """The instruction sets, by Linux's names, that code for an LLVM target may use."""
    import tvm

    known = tvm.target.codegen.llvm_get_cpu_features(target)
    return sorted(_LINUX_NAMES[name] for name in known if name in _LINUX_NAMES)


def absent_features(target: Any, present: Sequence[str]) -> list[str]:
    """What code for a target must not use on a machine, as LLVM takes it: ``-avx512bf16``.

    A virtual machine may hide instruction sets that its processor's name stands for.

    Args:
        target: an LLVM target.
        present: the machine's instruction sets by Linux's names; empty where it does not say.
    """
    import tvm

    known = tvm.target.codegen.llvm_get_cpu_features(target)
    hidden = [name for name in known if _LINUX_NAMES.get(name, "") not in ("", *present)]
    return sorted(f"-{name}" for name in hidden) if present else []


__all__: Sequence[str] = ("absent_features", "needed_features")

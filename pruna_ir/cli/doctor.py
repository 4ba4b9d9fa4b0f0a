"""``pruna-opt doctor``: what is installed, what each backend lacks, and how to get it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pruna_ir import __version__, registry
from pruna_ir.cli.console import Console
from pruna_ir.errors import PrunaError
from pruna_ir.options import make_backend

_PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "numpy", "safetensors", "onnx",
    "onnxruntime", "onnxscript", "onnx-graphsurgeon", "openvino", "apache-tvm",
    "tensorrt-rtx-cu13", "tensorrt",
)  # fmt: skip
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")
_COMPILERS = ("cc", "gcc", "clang", "g++", "clang++")


def execute(_args: argparse.Namespace, out: Console) -> int:
    """Look and tell; always 0, since a missing backend is no failure."""
    found = diagnosis()
    if out.as_json:
        out.json(found)
        return 0
    out.data(_text(found))
    return 0


def diagnosis() -> dict[str, Any]:
    """Everything that doctor shows, as plain values."""
    return {
        "pruna-ir": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "compilers": {name: path for name in _COMPILERS if (path := shutil.which(name))},
        "gpu": _gpu(),
        "backends": {
            text: state
            for entry in registry.entries(registry.BACKENDS)
            for text, state in _backends(entry).items()
        },
        "problems": [str(problem) for problem in registry.problems(importing=True)],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    flags = set(re.findall(r"\w+", "".join(re.findall(r"(?:flags|Features)\s*:(.*)", text)[:1])))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "model": model[1] if model else platform.processor() or "unknown",
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "features": [name for name in _FEATURES if name in flags],
    }


def _gpu() -> list[str]:
    """The NVIDIA GPUs that the driver lists; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _backends(entry: registry.Entry) -> dict[str, dict[str, str]]:
    """What a backend lacks, and what it lacks with options that need other tools, by text."""
    try:
        variants = getattr(registry.find_backend(entry.name), "variants", ())
    except PrunaError as error:
        return {entry.name: {"build": str(error), "execute": str(error)}}
    texts = (entry.name, *(f"{entry.name}{{{options}}}" for options in variants))
    return {text: asdict(make_backend(text).availability()) for text in texts}


def _text(found: dict[str, Any]) -> str:
    cpu = found["cpu"]
    lines = [
        f"pruna-ir {found['pruna-ir']}, Python {found['python']}, {found['system']}",
        f"CPU: {cpu['model']}, {cpu['cores']} cores: {' '.join(cpu['features']) or 'none known'}",
        f"GPU: {'; '.join(found['gpu']) or 'none (nvidia-smi lists no device)'}",
        f"compilers: {', '.join(found['compilers'].values()) or 'none; install gcc or clang'}",
        "packages:",
        *(f"  {name:<18} {number or 'not installed'}"
          for name, number in found["packages"].items()),
        "backends:",
    ]  # fmt: skip
    for name, state in found["backends"].items():
        lines.append(f"  {name:<10} build:   {state['build'] or 'yes'}")
        lines.append(f"  {'':<{max(len(name), 10)}} execute: {state['execute'] or 'yes'}")
    lines += [f"problem: {problem}" for problem in found["problems"]]
    return "\n".join(lines)

"""The Triton kernels beside what torch has: cuDNN, cuBLAS and torch.compile, on one NVIDIA GPU.

    python tests/benchmarks/triton_speed.py
    python tests/benchmarks/triton_speed.py --kernel ffn --dtype float32 --rounds 50

For each shape, in one process, rounds in turn: torch's separate operators, torch.compile of the
same function, and our operator. Medians in milliseconds, rates, and ratios over torch's own time;
each result is first compared with the reference at float64. Without a GPU that the kernels run on
it prints NOT_RUN with the reason, and nothing is claimed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from pruna_ir.kernels import conv_act, ffn, int8_linear

LARGEST_ERROR = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Relative to the result's largest value; float32 may be multiplied in TF32."""


@dataclass(frozen=True)
class Case:
    """One shape: our operator, its reference, and the number of floating operations."""

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: tuple[Any, ...]
    operations: float


def reason() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return ""


def convolutions(dtype: torch.dtype) -> Iterator[Case]:
    """Those of ResNet-50, batch 32, channels last: 3x3 and 1x1 with residual and relu."""
    for ins, outs, size, kernel, stride in (
        (64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1),
        (256, 64, 56, 1, 1), (256, 512, 56, 1, 2), (3, 64, 224, 7, 2),
    ):  # fmt: skip
        make = partial(torch.randn, device="cuda", dtype=dtype)
        x, weight = make(32, ins, size, size), make(outs, ins, kernel, kernel) / (ins * kernel**2)
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        pair, padding = [stride, stride], [kernel // 2] * 2
        out = (size + 2 * (kernel // 2) - kernel) // stride + 1
        residual = make(32, outs, out, out).to(memory_format=torch.channels_last)
        options = (pair, padding, [1, 1], 1, "relu", [])
        work = 2.0 * 32 * out * out * outs * ins * kernel**2
        yield Case(
            f"conv {ins}->{outs} {size}x{size} k{kernel} s{stride}",
            lambda *t, o=options: conv_act.conv_act(*t, *o),
            lambda *t, o=options: conv_act.conv_act_reference(*t, *o),
            (x, weight, make(outs), residual), work,
        )  # fmt: skip


def blocks(dtype: torch.dtype) -> Iterator[Case]:
    """BERT's, GPT-2's and Llama's."""
    for name, rows, width, hidden, activation, gated in (
        ("BERT base", 32 * 128, 768, 3072, "gelu", False),
        ("GPT-2 medium", 8 * 1024, 1024, 4096, "gelu_tanh", False),
        ("Llama 7B", 2048, 4096, 11008, "silu", True),
        ("Llama 7B, one token", 16, 4096, 11008, "silu", True),
    ):
        make = partial(torch.randn, device="cuda", dtype=dtype)
        gate = make(hidden, width) / width if gated else None
        b1, b2 = (None if gated else make(n) for n in (hidden, width))
        w1, w2 = make(hidden, width) / width, make(width, hidden) / hidden
        tensors = (make(rows, width), w1, b1, w2, b2, gate, None)
        yield Case(
            f"ffn {name}", lambda *t, a=activation: ffn.ffn(*t, a),
            lambda *t, a=activation: ffn.ffn_reference(*t, a), tensors,
            2.0 * rows * width * hidden * (3 if gated else 2),
        )  # fmt: skip


def integers(_dtype: torch.dtype) -> Iterator[Case]:
    """The same layers on int8; torch's product of integers is cuBLAS's."""
    for rows, width, out in ((4096, 768, 3072), (2048, 4096, 11008), (2048, 4096, 4096)):
        x, weight = (
            torch.randint(-128, 128, size, device="cuda", dtype=torch.int8)
            for size in ((rows, width), (out, width))
        )
        scales = (torch.rand(n, device="cuda") for n in (rows, out))
        tensors = (x, weight, *scales, None)
        yield Case(
            f"int8 {rows}x{width}x{out}", int8_linear.int8_linear, _integers_of_torch, tensors,
            2.0 * rows * width * out,
        )  # fmt: skip


def _integers_of_torch(x: Any, weight: Any, x_scale: Any, weight_scale: Any, _bias: Any) -> Any:
    return torch._int_mm(x, weight.t()).float() * (x_scale[:, None] * weight_scale)


KERNELS = {"conv": convolutions, "ffn": blocks, "int8": integers}


def error(case: Case) -> float:
    """How far our result is from the reference at float64, relative to its largest value."""
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in case.tensors]
    truth = case.reference(*wide).double()
    return float((case.ours(*case.tensors).double() - truth).abs().max() / truth.abs().max())


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, rounds in turn, a cold second-level cache before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 5):
        for name, call in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if number >= 5:
                taken[name].append(start.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Print a line for each shape, or why there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if why := reason():
        print(f"NOT_RUN: {why}")
        return
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    wrong = False
    with torch.no_grad():
        for case in (case for name in arguments.kernel for case in KERNELS[name](dtype)):
            found = error(case)
            wrong |= not found <= LARGEST_ERROR[dtype]
            compiled = torch.compile(case.reference)
            times = measure(
                {
                    "torch": lambda c=case: c.reference(*c.tensors),
                    "torch.compile": lambda c=case, f=compiled: f(*c.tensors),
                    "ours": lambda c=case: c.ours(*c.tensors),
                },
                arguments.rounds,
            )
            columns = "  ".join(
                f"{name} {ms:.3f} ms ({case.operations / ms / 1e9:.0f} TFLOP/s, "
                f"{times['torch'] / ms:.2f}x)"
                for name, ms in times.items()
            )
            print(f"{case.name:<28} {columns}  error {found:.1e}", flush=True)
    sys.exit("an error is above its bound" if wrong else 0)


if __name__ == "__main__":
    main()

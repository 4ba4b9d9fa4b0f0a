"""Speed of TVM artifacts in float32 beside the vendors' runtimes, and how far from the roofline.

    python tests/benchmarks/kernel_speed.py                             # all networks, two cores
    python tests/benchmarks/kernel_speed.py --threads 1 --models resnet18 --without compile
    python tests/benchmarks/kernel_speed.py --precision int8 --models resnet18 resnet50
    python tests/benchmarks/kernel_speed.py --precision bf16 --models resnet18 resnet50

Networks as in ``quantized_speed.py``, batch 1, random weights. For each one table of six: our TVM
artifact, OpenVINO with ``INFERENCE_PRECISION_HINT=f32``, ONNX Runtime, torch eager, torch.compile
and TVM's own schedules. All but the last run in turns in one process, each twice untimed before it
is timed, since the others have driven its weights from the caches and their threads spin for a
while; times are medians, and a ratio to OpenVINO is the median over rounds. TVM's own schedules
take seconds a call on ResNets: they follow in `SLOW_ROUNDS` rounds in turns with OpenVINO alone.
The roofline is the network's FLOPs (torch's counter) over the peak that a float32 product of
1536 x 1536 matrices reaches on the same threads. Exits 1 where ours takes more than ``BOUNDS``
times as long as OpenVINO, or ResNet-50 compiles in 60 s or more.

With ``--precision int8`` our TVM artifacts of the float32 and of the quantised program, and those
of OpenVINO and ONNX Runtime, each quantised for its target, in turns; ratios are to our float32.
With ``--precision bf16`` our float32 and bfloat16 artifacts, OpenVINO's in its own default
precision, which is bfloat16 where the processor multiplies it, and the module in torch, converted.
Exits 1 where ours gains less than ``GAINS``.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quantized_speed import MODELS, Network, network, quantised
from torch.utils.flop_counter import FlopCounterMode

from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_import import import_program
from pruna_ir.build import build
from pruna_ir.latency import Latency, measure
from pruna_ir.lowering import LoadOptions
from pruna_ir.pipeline import Pipeline

NETWORKS = (MODELS[0], "resnet50", *MODELS[1:])
BOUNDS = {"resnet18": 1.25, "resnet50": 1.25}
"""The longest time of ours, in OpenVINO's."""
BOUND = 1.5
GAINS = {
    "int8": {"resnet18": 2.5, "resnet50": 2.5},
    "bf16": {"resnet18": 1.5, "resnet50": 1.5},
}
"""The least ratio of a precision to float32 on TVM; 1 for other networks."""
CAST = "cast-floats{dtype=bfloat16}"
COMPILE_BOUND_S = 60.0
SLOW_ROUNDS = 3
_SIDE = 1536


def peak(threads: int) -> float:
    """Float32 operations a second of a large matrix product, the best of some."""
    torch.set_num_threads(threads)
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def operations(net: Network) -> float:
    """The additions and multiplications of one call."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net.module(**_arguments(net)) if net.text else net.module(net.data.inputs[0][:1])
    return float(counter.get_total_flops())


def _arguments(net: Network) -> dict[str, torch.Tensor]:
    return {net.program.inputs[0].name: torch.from_numpy(net.inputs[0])}


# -- candidates -----------------------------------------------------------------------------------


def _artifact(
    net: Network, target: str, folder: Path, threads: int, *, strict: bool = True
) -> Callable[[], object]:
    artifact = build(net.program, target, folder / target, verify=False)
    runner = artifact.load(LoadOptions(threads=threads, strict_precision=strict))
    return lambda: runner.run(net.inputs)


def _eager(
    net: Network, *, compiled: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """The module in torch, as it came, compiled or converted."""
    module: Any = torch.compile(net.module) if compiled else net.module
    if dtype is not torch.float32:
        module = copy.deepcopy(net.module).to(dtype)
    named = _arguments(net) if net.text else {}
    given = () if net.text else (torch.from_numpy(net.inputs[0]).to(dtype),)

    def run() -> object:
        with torch.no_grad():
            return module(*given, **named)

    return run


def _default(net: Network, threads: int) -> Callable[[], object]:
    """TVM's own pipeline and schedules."""
    import tvm
    from tvm import relax

    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    imported = import_program(net.program)
    executable = tvm.compile(imported.module, target=host_target())
    machine = relax.VirtualMachine(executable, tvm.cpu())
    given = [*net.inputs, *imported.parameters.values()]
    tensors = [tvm.runtime.tensor(array) for array in given]
    return lambda: machine["main"](*tensors)


def candidates(
    net: Network, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], object]], float]:
    """What is timed, OpenVINO first, and the seconds that our artifact took to build."""
    calls = {"openvino": _artifact(net, "openvino", folder, arguments.threads)}
    start = time.perf_counter()
    calls["ours (tvm)"] = _artifact(net, "tvm", folder, arguments.threads)
    seconds = time.perf_counter() - start
    calls["onnxruntime"] = _artifact(net, "onnx", folder, arguments.threads)
    calls["torch eager"] = _eager(net)
    if "compile" not in arguments.without:
        calls["torch.compile"] = _eager(net, compiled=True)
    return calls, seconds


def quantised_candidates(
    net: Network, folder: Path, threads: int
) -> dict[str, Callable[[], object]]:
    """Our float32 artifact first, then every target's int8 one beside its float32 one."""
    calls = {}
    for target in ("tvm", "openvino", "onnx"):
        calls[f"{target} float32"] = _artifact(net, target, folder, threads)
        small = replace(net, program=quantised(net, target, ""))
        calls[f"{target} int8"] = _artifact(small, target, folder / "int8", threads)
    return calls


def cast_candidates(
    net: Network, folder: Path, threads: int
) -> dict[str, Callable[[], object]]:
    """Our float32 artifact first, then ours and others in bfloat16."""
    program = Pipeline.parse(CAST).run(net.program, check_each=False).program
    small = replace(net, program=program)
    return {
        "tvm float32": _artifact(net, "tvm", folder, threads),
        "tvm bf16": _artifact(small, "tvm", folder / "bf16", threads),
        "openvino default": _artifact(net, "openvino", folder, threads, strict=False),
        "torch bf16": _eager(net, dtype=torch.bfloat16),
    }


# -- measuring ------------------------------------------------------------------------------------


def compare(name: str, arguments: argparse.Namespace) -> list[str]:
    """Print one network's rows; which bounds it does not hold."""
    net = network(name, 8)
    work, highest = operations(net), peak(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        calls, seconds = candidates(net, Path(folder), arguments)
        found = measure(calls, repeats=arguments.rounds, budget_s=arguments.budget, warmup=3,
                        settle=2)  # fmt: skip
        if "default" not in arguments.without:
            slow = {"openvino": calls["openvino"], "tvm default": _default(net, arguments.threads)}
            again = measure(slow, repeats=SLOW_ROUNDS, warmup=1)
            found["tvm default"] = again["tvm default"]
    print(
        f"{name}: {work / 1e9:.2f} GFLOP, peak {highest / 1e9:.0f} GFLOP/s, roofline "
        f"{work / highest * 1e3:.2f} ms, batch 1, {arguments.threads} threads; compiled in "
        f"{seconds:.1f} s"
    )
    for engine, taken in found.items():
        print(_row(engine, taken, work, highest), flush=True)
    ratio, bound = 1 / found["ours (tvm)"].speedup, BOUNDS.get(name, BOUND)
    missed = [f"{name}: {ratio:.2f}x of OpenVINO's time, bound {bound}"] if ratio > bound else []
    if name == "resnet50" and seconds >= COMPILE_BOUND_S:
        missed.append(f"{name}: compiled in {seconds:.0f} s, bound {COMPILE_BOUND_S:.0f} s")
    return missed


def compare_narrow(name: str, arguments: argparse.Namespace) -> list[str]:
    """Print one network's rows in int8 or bf16; whether ours gains too little."""
    net, precision = network(name, 8), arguments.precision
    made = quantised_candidates if precision == "int8" else cast_candidates
    with tempfile.TemporaryDirectory() as folder:
        calls = made(net, Path(folder), arguments.threads)
        found = measure(calls, repeats=arguments.rounds, budget_s=arguments.budget, warmup=3,
                        settle=2)  # fmt: skip
    print(f"{name}: batch 1, {arguments.threads} threads; ratios to our float32")
    for engine, taken in found.items():
        print(f"  {engine:<17} {taken.p50:8.2f} ms  {taken.speedup:5.2f}x  "
              f"({taken.rounds} rounds)", flush=True)  # fmt: skip
    gain, least = found[f"tvm {precision}"].speedup, GAINS[precision].get(name, 1.0)
    return [f"{name}: {precision} gains {gain:.2f}x, at least {least}x"] if gain < least else []


def _row(engine: str, taken: Latency, work: float, highest: float) -> str:
    rate = work / (taken.p50 / 1e3)
    return (
        f"  {engine:<14} {taken.p50:9.2f} ms  {1 / taken.speedup:6.2f}x OpenVINO  "
        f"{rate / 1e9:6.0f} GFLOP/s  {rate / highest:5.0%} of peak  ({taken.rounds} rounds)"
    )


def main() -> None:
    """Print a table a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a network")
    parser.add_argument("--without", nargs="*", default=[], choices=("compile", "default"),
                        help="leave out torch.compile or TVM's own schedules")  # fmt: skip
    parser.add_argument("--precision", default="float32", choices=["float32", *GAINS])
    arguments = parser.parse_args()
    compared = compare_narrow if arguments.precision in GAINS else compare
    missed = [line for name in arguments.models for line in compared(name, arguments)]
    for line in missed:
        print(f"missed: {line}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

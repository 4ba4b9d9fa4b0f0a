"""Speed of eager artifacts beside torch itself: plain, channels-last, and torch.compile.

    python tests/benchmarks/eager_speed.py                              # all networks, two cores
    python tests/benchmarks/eager_speed.py --threads 1 --models resnet50 --compile
    python tests/benchmarks/eager_speed.py --models resnet50 --bfloat16 --int8

Networks as in ``quantized_speed.py``, batch 1, random weights. Each is captured with a dynamic
batch, optimised, and built into an ``eager`` artifact, which is certified against the program.
What is compared runs in turns in one process, each twice untimed before it is timed; times are
medians, and a ratio to plain torch is the median over rounds. ``--bfloat16`` adds an artifact of
the program cast by cast-floats, ``--int8`` one quantised by insert-fake-quant. Exits 1 where an
artifact fails its certificate or gives other bits in a second run, where one in float32 is farther
from the unfused network in float64 than that allows for its own rounding, or where ResNet-50 in
float32 is less than 1.3 times as fast as plain torch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantized_speed import MODELS, Network, network

from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.certify import FLOAT_FACTOR, FLOOR_EPS
from pruna_ir.equivalence import relative_error, run_float64, run_native
from pruna_ir.latency import Latency, measure
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context

NETWORKS = (MODELS[0], "resnet50", *MODELS[1:])
LEAST = {"resnet50": 1.3}
"""How many times as fast as plain torch an artifact in float32 must be."""
FLOAT = (
    "canonicalize,fold-constants,fold-batch-norm,fuse-conv-bn-relu,fuse-ffn,fuse-attention,"
    "fuse-attention-blocks,fuse-pooled-heads"
)
BFLOAT16 = "canonicalize,fold-constants,fold-batch-norm,cast-floats"
INT8 = "canonicalize,fold-constants,fold-batch-norm,insert-fake-quant,eliminate-dead-code"


def optimised(net: Network, pipeline: str) -> Program:
    """The network with a dynamic batch, as a pipeline makes it."""
    data = net.data.inputs[0][:2]
    args, kwargs = ((), {net.program.inputs[0].name: data}) if net.text else ((data,), {})
    context = Context(data=net.data, target="eager")
    program = capture(net.module, args, kwargs)
    return Pipeline.parse(pipeline).run(program, context, check_each=False).program


# -- candidates -----------------------------------------------------------------------------------


def torch_call(net: Network, *, channels_last: bool, compiled: bool) -> Callable[[], object]:
    """The module as it came, in another memory format, or compiled."""
    x = net.data.inputs[0][:1]
    module: Any = net.module
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    if compiled:
        module = torch.compile(module)
    name = net.program.inputs[0].name

    def call() -> object:
        with torch.no_grad():
            return module(**{name: x}) if net.text else module(x)

    return call


def artifact_call(
    artifact: Artifact, net: Network, threads: int
) -> tuple[Callable[[], object], bool]:
    """An artifact's run, and whether two runs of two loads give the same bits."""
    runner, other = (artifact.load(LoadOptions(threads=threads)) for _ in range(2))
    runs = [runner.run(net.inputs), runner.run(net.inputs), other.run(net.inputs)]
    same = all(np.array_equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    return lambda: runner.run(net.inputs), same


def rounding(artifact: Artifact, net: Network, threads: int) -> tuple[float, float]:
    """Relative errors to the unfused network in float64: of an artifact, and its limit.

    The limit is that of certificates, for the network's own error in float32.
    """
    x = torch.from_numpy(np.asarray(net.inputs[0]))
    unfused = run_float64(net.program, (x,))[0]
    own = relative_error(run_native(net.program, (x,))[0], unfused)
    (found, *_) = artifact.load(LoadOptions(threads=threads)).run(net.inputs)
    floor = FLOOR_EPS * torch.finfo(torch.float32).eps
    return relative_error(torch.from_numpy(found), unfused), FLOAT_FACTOR * max(own, floor)


def compare(name: str, arguments: argparse.Namespace) -> bool:
    """Print one network; whether all is as it must be."""
    torch.set_num_threads(arguments.threads)
    net = network(name, arguments.samples)
    pipelines = {"ours": FLOAT}
    pipelines |= {"ours bfloat16": BFLOAT16} if arguments.bfloat16 else {}
    pipelines |= {"ours int8": INT8} if arguments.int8 else {}
    calls = {"torch": torch_call(net, channels_last=False, compiled=False)}
    facts, fine = {}, True
    with tempfile.TemporaryDirectory() as folder:
        for label, pipeline in pipelines.items():
            artifact = build(
                optimised(net, pipeline), "eager", Path(folder) / label, keep_failed=True,
                verify=not arguments.unverified, options=LoadOptions(threads=arguments.threads),
            )  # fmt: skip
            calls[label], same = artifact_call(artifact, net, arguments.threads)
            bits = "same bits" if same else "OTHER BITS"
            facts[label] = f"{bits}, {artifact.certificate.summary()}"
            if label == "ours":
                error, limit = rounding(artifact, net, arguments.threads)
                facts[label] += f", error {error:.1e} (limit {limit:.1e}) to the unfused network"
                fine &= error <= limit
            fine &= same and artifact.certificate.verdict is not Verdict.FAILED
    if arguments.compile:
        calls["torch.compile"] = torch_call(net, channels_last=False, compiled=True)
    found = measure(calls, repeats=arguments.rounds, budget_s=arguments.budget, settle=2)
    # The module itself changes its memory format, so this comes last, beside the artifact.
    last = {
        "torch channels-last": torch_call(net, channels_last=True, compiled=False),
        "ours": calls["ours"],
    }
    again = measure(last, repeats=arguments.rounds, budget_s=arguments.budget, settle=2)
    _print(name, found, facts)
    print(f"{'':<14} ours over torch channels-last: {again['ours'].speedup:.2f}x "
          f"({again['torch channels-last'].p50:.2f} ms)", flush=True)  # fmt: skip
    return fine and found["ours"].speedup >= LEAST.get(name, 0.0)


def _print(name: str, found: dict[str, Latency], facts: dict[str, str]) -> None:
    for label, latency in found.items():
        print(f"{name:<14} {label:<14} {latency.p50:8.2f} ms {latency.speedup:5.2f}x  "
              f"{facts.get(label, '')}", flush=True)  # fmt: skip


def main() -> None:
    """Print some lines a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a comparison")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on")
    parser.add_argument("--unverified", action="store_true",
                        help="without certificates, which take minutes")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--bfloat16", action="store_true", help="a bfloat16 artifact, too")
    parser.add_argument("--int8", action="store_true", help="an int8 artifact, too")
    arguments = parser.parse_args()
    fine = [compare(name, arguments) for name in arguments.models]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()

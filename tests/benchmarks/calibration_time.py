"""Calibration of a ResNet-50: time and peak memory, next to NNCF's on the same images.

    python tests/benchmarks/calibration_time.py                 # 512 images of 224 x 224
    python tests/benchmarks/calibration_time.py --samples 64

Each contender runs in a process of its own, bound to ``--threads`` processors, on the same random
images in the same batches:

    ours             insert-fake-quant{target=openvino} after canonicalize and fold-batch-norm
    ours minmax      the same with ranges=minmax: like NNCF's defaults, without histograms
    nncf             nncf.quantize of the OpenVINO model, bias correction off
    nncf as it comes with its fast bias correction
    nncf torch       nncf.quantize of the torch module, bias correction off

What is timed starts with a float program (model) in memory and ends with a quantised one. Memory
is the peak of the process above its resident memory just before, next to the bytes of all
activations of one batch. Exits with 1 where ours takes more than three times those bytes, or more
time than the fastest of NNCF's without bias correction, which ours has not either.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pruna_ir.calibration import Method

MEMORY_FACTOR = 3.0
"""Peak memory may be this many times the activations of one batch."""
OURS: dict[str, Method] = {"ours": "mse", "ours minmax": "minmax"}
CONTENDERS = ("ours", "ours minmax", "nncf", "nncf as it comes", "nncf torch")
PLAIN = ("nncf", "nncf torch")
"""Those of NNCF's that do what ours does."""


@dataclass(frozen=True)
class Measured:
    """Seconds on the clock and of the processors, and mebibytes above what was held before."""

    seconds: float
    processor: float
    mebibytes: float


@dataclass(frozen=True)
class Setting:
    """What every contender gets."""

    samples: int
    batch: int
    size: int
    threads: int

    def images(self) -> torch.Tensor:
        """The images, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.samples, 3, self.size, self.size, generator=generator)


def resnet50() -> torch.nn.Module:
    """The network, seeded, with batch norms that have seen something."""
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval()


def measured(work: Callable[[], object]) -> Measured:
    """Run once; time and peak memory (Linux with glibc: the high-water mark is reset before)."""
    gc.collect()
    # What was freed goes back to the system, or the work would run in it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base, start, busy = _status("VmRSS"), time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return Measured(seconds, busy, (_status("VmHWM") - base) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def folded(setting: Setting) -> Any:
    """The program that ours starts from."""
    from pruna_ir.capture import capture
    from pruna_ir.pipeline import Pipeline

    program = capture(resnet50(), (torch.randn(2, 3, setting.size, setting.size),))
    return Pipeline.parse("canonicalize,fold-batch-norm").run(program, check_each=False).program


def ours(setting: Setting, ranges: Method) -> Measured:
    """insert-fake-quant with these ranges."""
    from pruna_ir.data import TensorData
    from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
    from pruna_ir.transform import Context, apply

    program = folded(setting)
    context = Context(data=TensorData((setting.images(),), batch_size=setting.batch))
    pass_ = InsertFakeQuant(target="openvino", ranges=ranges, samples=setting.samples)
    return measured(lambda: apply(pass_, program, context))


def nncf(setting: Setting, *, bias: bool, in_torch: bool) -> Measured:
    """NNCF's post-training quantisation with its default ranges."""
    import nncf as theirs
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

    images = setting.images()
    batches = list(images.split(setting.batch))
    if in_torch:
        model: Any = resnet50()
        data = theirs.Dataset(batches)
    else:
        import openvino

        model = openvino.convert_model(resnet50(), example_input=batches[0])
        data = theirs.Dataset([batch.numpy() for batch in batches])
    advanced = AdvancedQuantizationParameters(disable_bias_correction=not bias)
    return measured(
        lambda: theirs.quantize(
            model, data, subset_size=len(batches), advanced_parameters=advanced
        )
    )


def run_one(name: str, setting: Setting) -> Measured:
    """One contender, in this process."""
    if name in OURS:
        return ours(setting, OURS[name])
    return nncf(setting, bias=name == "nncf as it comes", in_torch=name == "nncf torch")


def activation_mebibytes(setting: Setting) -> float:
    """All activations of one batch: every storage that a node of the program makes, once."""
    program = folded(setting)
    bytes_of: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, torch.Tensor):
                kept.append(value)
                storage = value.untyped_storage()
                bytes_of[storage.data_ptr()] = storage.nbytes()
            return value

    with torch.no_grad():
        Watcher(program.module).run(setting.images()[:2])
    return sum(bytes_of.values()) / 2 * setting.batch / 2**20


def in_own_process(name: str, setting: Setting) -> Measured:
    """One contender in a fresh process that has ``setting.threads`` processors."""
    allowed = sorted(os.sched_getaffinity(0))[: setting.threads]
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads)}
    command = [
        sys.executable, __file__, "--only", name, "--samples", str(setting.samples),
        "--batch", str(setting.batch), "--size", str(setting.size),
        "--threads", str(setting.threads),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = Setting(args.samples, args.batch, args.size, args.threads)
    if args.only:
        print(json.dumps(asdict(run_one(args.only, setting))))
        return 0
    activations = activation_mebibytes(setting)
    print(f"{setting}; activations of one batch: {activations:.0f} MiB", flush=True)
    found: dict[str, Measured] = {}
    for name in args.contenders:
        found[name] = in_own_process(name, setting)
        one = found[name]
        print(
            f"{name:18} {one.seconds:8.1f} s ({one.processor:.1f} s of processors)"
            f"   {one.mebibytes:8.0f} MiB"
            f"   {one.mebibytes / activations:5.2f} x the activations",
            flush=True,
        )
    return verdict(found, activations)


def verdict(found: dict[str, Measured], activations: float) -> int:
    """1 where a bound does not hold, and what it is."""
    failed = 0
    theirs = min((found[name].seconds for name in PLAIN if name in found), default=None)
    for name, mine in ((name, found[name]) for name in OURS if name in found):
        if mine.mebibytes > MEMORY_FACTOR * activations:
            print(f"{name}: more than {MEMORY_FACTOR:g} times the activations of one batch")
            failed = 1
        if theirs is not None:
            print(f"{name}: {theirs / mine.seconds:.2f} times as fast as NNCF")
            failed |= mine.seconds > theirs
    return failed


if __name__ == "__main__":
    sys.exit(main())

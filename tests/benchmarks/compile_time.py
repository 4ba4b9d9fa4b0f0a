"""Compile time: capture and every pass, against the size of the graph.

    python tests/benchmarks/compile_time.py                   # ResNet-50; 100 to 10,000 nodes
    python tests/benchmarks/compile_time.py --nodes 100 1000

Checks are off: this measures the compiler. The table prints, per pass and graph size, seconds,
microseconds per node (flat means linear) and the peak of resident memory above the start of the
pass. ``torch.export`` and a plain ``torch.fx`` retrace of the same graph stand beside it as peers.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.registry import kernels
from pruna_ir.transform import Context

PASSES = (
    "canonicalize",
    "eliminate-dead-code",
    "fold-constants",
    "fold-batch-norm",
    "prune-channels{ratio=0.5}",
    "fuse-conv-bn-relu",
    "fuse-ffn",
    "insert-fake-quant{ranges=minmax}",
)


class Block(nn.Module):
    """A residual block with two conv-bn pairs: eight graph nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def deep_net(nodes: int, width: int = 8) -> nn.Module:
    """A net of about this many calls."""
    blocks = max(1, nodes // 7)
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *(Block(width) for _ in range(blocks)))


@dataclass(frozen=True)
class Measured:
    """One measurement: seconds and MiB of peak resident memory above the start."""

    seconds: float
    mebibytes: float


def measure(work: Callable[[], object]) -> tuple[object, Measured]:
    """Run once; time and peak memory (Linux: the high-water mark is reset before)."""
    gc.collect()
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    reset.write_text("5")
    base = _status(status, "VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, Measured(seconds, (_status(status, "VmHWM") - base) / 1024)


def _status(path: Path, key: str) -> float:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return float(line.split()[1])


def run_passes(program: Program, data: TensorData) -> dict[str, tuple[int, Measured]]:
    """Every pass in order, unchecked: nodes before it and what it took."""
    rows = {}
    context = Context(data=data, target="onnx")
    for text in PASSES:
        nodes = len(list(program.calls()))
        pipeline = Pipeline.parse(text)

        def work(pipeline: Pipeline = pipeline, program: Program = program) -> Program:
            run = pipeline.run(program, context, check_each=False, verify_each=False)
            return run.program

        result, measured = measure(work)
        assert isinstance(result, Program)
        program = result
        rows[text.split("{")[0]] = (nodes, measured)
    return rows


def resnet50() -> None:
    """Capture plus every pass of ResNet-50."""
    import torchvision

    module = torchvision.models.resnet50(weights=None).eval()
    x = torch.randn(2, 3, 224, 224)
    export, peer = measure(lambda: torch.export.export(module, (x,)))
    del export
    program, captured = measure(lambda: capture(module, (x,)))
    assert isinstance(program, Program)
    rows = run_passes(program, TensorData((torch.randn(1, 3, 224, 224),), batch_size=1))
    total = captured.seconds + sum(m.seconds for _, m in rows.values())
    print("ResNet-50, 224x224, checks off")
    print(f"  {'torch.export (peer)':<22} {peer.seconds:7.3f} s")
    print(f"  {'capture':<22} {captured.seconds:7.3f} s")
    for name, (nodes, m) in rows.items():
        print(f"  {name:<22} {m.seconds:7.3f} s {nodes:5d} nodes, peak {m.mebibytes:.1f} MiB")
    ratio = total / peer.seconds
    print(f"  {'capture + passes':<22} {total:7.3f} s = {ratio:.1f} x torch.export")


def table(sizes: list[int]) -> None:
    """Time and memory per pass against graph size."""
    print("\nDeep residual net; per pass: seconds, microseconds per node, peak MiB")
    for size in sizes:
        program, captured = measure(
            lambda size=size: capture(deep_net(size), (torch.randn(2, 3, 8, 8),))
        )
        assert isinstance(program, Program)
        nodes = len(list(program.calls()))
        _, peer = measure(lambda program=program: fx.Tracer().trace(program.module))
        print(f"\n{nodes} calls: capture {captured.seconds:.2f} s, "
              f"fx retrace (peer) {peer.seconds:.3f} s")  # fmt: skip
        data = TensorData((torch.randn(4, 3, 8, 8),), batch_size=4)
        for name, (count, m) in run_passes(program, data).items():
            per_node = m.seconds / count * 1e6
            ratio = m.seconds / peer.seconds
            print(f"  {name:<22} {m.seconds:8.3f} s {per_node:8.1f} us/node "
                  f"{m.mebibytes:8.1f} MiB {ratio:7.2f} x retrace")  # fmt: skip


def main() -> None:
    """Print both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--skip-resnet50", action="store_true")
    arguments = parser.parse_args()
    kernels()
    if not arguments.skip_resnet50:
        resnet50()
    table(arguments.nodes)


if __name__ == "__main__":
    main()

"""The whole compiler, from Python, on the trained digits network.

    python examples/digits/compile.py --out digits-artifacts

    captured -> canonicalised -> half of the channels pruned -> recovered by a short training
             -> batch norms folded -> convolutions fused with their activations
             -> quantised for each target -> artifacts, each compared with its program

After each step: size, FLOPs, accuracy on the 400 test images, and the check of the pass's promise.
For each artifact the same, with latency and speed-up over the captured, unoptimised float network
lowered by the same backend and timed in turns with it. Nothing is chosen by the test images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from model import accuracy, calibration, factory, test_set, validation_set
from train import fit

from pruna_ir import Context, Program, capture
from pruna_ir.build import Artifact, build
from pruna_ir.certify import audit_summary
from pruna_ir.cost import cost
from pruna_ir.errors import ToolchainError
from pruna_ir.latency import Latency, measure
from pruna_ir.lowering import Runner
from pruna_ir.pipeline import Pipeline
from pruna_ir.report import integers
from pruna_ir.training import trainable, with_state

TARGETS = ("onnx", "openvino", "tvm", "tensorrt")
PREPARE = "canonicalize,fold-constants"
FUSE = "fold-batch-norm,fuse-conv-bn-relu"
QUANTISE = "insert-fake-quant"
RECOVERY_RATE = 0.03
"""The peak learning rate after pruning, below the 0.1 of the first training."""


class AsModule(torch.nn.Module):
    """A program's or runner's first output as a module's, to hand to `accuracy`."""

    def __init__(self, run: Program | Runner) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(self._run, Program):
            return self._run(images)[0]
        return torch.from_numpy(self._run.run([images.numpy()])[0])


def show_step(name: str, program: Program, checks: Sequence[str] = ()) -> None:
    """One line about a program, and one for each promise that was checked."""
    total = cost(program)
    right = accuracy(AsModule(program), test_set())
    print(
        f"{name:<12} {len(program.graph.nodes):>4} nodes  {total.parameters:>7} parameters  "
        f"{total.bytes / 1024:>6.1f} KiB  {total.flops / 1e6:>6.2f} MFLOP  accuracy {right:.2%}"
    )
    for check in checks:
        print(f"    {check}")


def apply(text: str, program: Program, context: Context, name: str) -> Program:
    """Run pipeline text; each pass that changes something has its promise checked."""
    result = Pipeline.parse(text).run(program, context)
    checks = [f"{step.text}: {step.check}" for step in result.steps if step.check is not None]
    show_step(name, result.program, checks)
    return result.program


def recover(program: Program, epochs: int) -> Program:
    """The program after a short training of its own, batch norms included."""
    module = trainable(program)
    for _ in fit(lambda x: module(x)[0], module.parameters(), epochs, peak=RECOVERY_RATE):
        pass
    trained = with_state(program, module)
    print(f"{'':12} validation {accuracy(AsModule(trained), validation_set()):.2%}")
    return trained


def artifacts(
    captured: Program, fused: Program, targets: Sequence[str], out: Path
) -> Iterator[tuple[str, Artifact, Artifact]]:
    """For each target, the captured network as it is and the compressed one, quantised for it."""
    for target in targets:
        context = Context(calibration(), target=target)
        quantised = apply(QUANTISE, fused, context, f"for {target}")
        original = build(captured, target, out / f"{target}-original", context)
        yield target, original, build(quantised, target, out / target, context)


def timed(original: Artifact, small: Artifact, batch: int) -> Latency | None:
    """The small artifact's latency, in turns with the original's; None where it cannot run."""
    images = next(iter(test_set(batch))).inputs[0].numpy()
    try:
        runners = {"original": original.load(), "small": small.load()}
    except ToolchainError:
        return None
    return measure({name: partial(r.run, [images]) for name, r in runners.items()})["small"]


def show_artifact(target: str, original: Artifact, small: Artifact) -> None:
    """One artifact's facts: sizes, verdict, and, where it can run, accuracy and latency."""
    kib = (original.size() / 1024, small.size() / 1024)
    print(f"{target}: {kib[0]:.1f} KiB -> {kib[1]:.1f} KiB")
    print(f"    {small.certificate.summary()}")
    fixed = small.manifest.inputs[0]["shape"][0]
    batch = fixed if isinstance(fixed, int) else 8
    latency = timed(original, small, batch)
    if latency is None:
        return
    right = accuracy(AsModule(small.load()), test_set(batch))
    print(f"    accuracy {right:.2%}; batch {batch}: {latency}")
    on_integers = integers(audit_summary(small.certificate.audit))
    print(f"    layers that the runtime executes on integers: {on_integers}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the digits network for each target.")
    parser.add_argument(
        "--out", type=Path, default=Path("digits-artifacts"), help="the folder for the artifacts"
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all four")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels to prune")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of recovery")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)

    model, inputs = factory()
    context = Context(calibration())
    captured = capture(model, inputs)
    show_step("captured", captured)
    program = apply(PREPARE, captured, context, "canonical")
    pruned = apply(f"prune-channels{{ratio={options.ratio}}}", program, context, "pruned")
    if options.epochs:
        pruned = recover(pruned, options.epochs)
        show_step("recovered", pruned)
    fused = apply(FUSE, pruned, context, "fused")
    for target, original, small in artifacts(
        captured, fused, options.target or TARGETS, options.out
    ):
        show_artifact(target, original, small)


if __name__ == "__main__":
    main()

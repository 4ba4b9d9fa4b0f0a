"""Accuracy of quantised CIFAR-10 ResNets: ours on every runtime, beside NNCF's and torchao's.

    python tests/benchmarks/quantize_accuracy.py --data FOLDER --w4a4 w4a4.pt2    # everything
    python tests/benchmarks/quantize_accuracy.py --data FOLDER --images 500 --nets resnet20 \\
        --backends eager onnx --methods w8a8 peers                                # a quick look

FOLDER holds a ``load.py`` with ``cifar10(part)``, ``normalise(images)`` and
``cifar_resnet(depth)`` (trained). Calibration: 512 images of ``train_1``, drawn by the seed; every
tool gets the same ones. Accuracy: all images of the test part, which nothing else looks at.

Ours, each quantised for the runtime that executes it:

    W8A8   round to nearest, for every backend of ``--backends``, scales powers of two; with
           the method ``any-scales`` also with finer ones, whose artifacts differ in rounding
           from torch (and torch in float32 from torch in float64)
    W4A8   equalised, learned rounding (AdaRound), biases corrected; for ``--few-bits-target``
    W4A4   with ``--w4a4 FILE``, ResNet-20: the program of FILE, or, where there is no such file
           yet, one trained here (LSQ, towards the float network's scores, ``--epochs`` over the
           five training parts, 8 bits in the first and the last layer), which is written to it;
           a training that was stopped goes on from ``FILE.checkpoint``

``= sim`` is the share of images on which the artifact and the program run by torch choose the same
class; ``integers`` how many convolutions and linear layers the runtime says run in integers ("-"
where floats on integer grids stand for them). ``--floor`` adds, to rows of ours, how often the
program in float64 agrees with itself in float32, and with the artifact.

Exits 1 where W8A8 loses more than 0.1 points or agrees with the simulation on less than 99.9% of
the images, where W4A8 or W4A4 lose more than 1.0 points, or where an artifact fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qat_accuracy import float_program, loader, quantised, training_data
from quantize_peers import Peer, Scores, Unsupported, integers, peers

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.cli.console import Console
from pruna_ir.data import TensorData
from pruna_ir.equivalence import run_float64
from pruna_ir.lowering import LoadOptions
from pruna_ir.passes.train_quantized import TrainQuantized
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import Context, apply

CALIBRATION = 512
IMAGES = 10_000
BATCH = 100
BACKENDS = ("eager", "onnx", "openvino", "tvm")
METHODS = ("w8a8", "any-scales", "w4a8", "w4a4", "peers")
W8A8 = (
    "canonicalize,fold-batch-norm,insert-fake-quant{samples=512,scales=SCALES},round-biases,"
    "eliminate-dead-code"
)
SCALES = {"w8a8": "powers-of-two", "any-scales": "any"}
W4A8 = (
    "canonicalize,fold-batch-norm,equalize-layers,insert-fake-quant{bits=[w4a8],samples=512,"
    "sqnr_db=0},round-weights{iterations=ITERATIONS},correct-bias,round-biases,eliminate-dead-code"
)
LOSS = {"W8A8": 0.1, "W4A8": 1.0, "W4A4": 1.0}
"""The most points that ours may lose."""
AGREEMENT = 99.9
"""The least share of images, in percent, that W8A8 and its simulation classify alike."""
TRAINED = "trained"
"""The attribute of a W4A4 program that says on how much it was trained."""


@dataclass(frozen=True)
class Row:
    """One quantised network.

    Attributes:
        right: the images that it classifies as labelled; None where it could not be made.
        lost: points below the float network.
        agreement: percent of the images that it classifies as its simulation does.
        fault: which bound it breaks; empty where none is broken.
    """

    network: str
    tool: str
    method: str
    bits: str
    runs_on: str
    accuracy: float | None = None
    lost: float = 0.0
    agreement: float | None = None
    integers: str = ""
    seconds: float = 0.0
    remark: str = ""
    fault: str = ""

    def __str__(self) -> str:
        head = (
            f"{self.network:<9} {self.bits:<8} {self.tool:<8} {self.method:<54} {self.runs_on:<9}"
        )
        if self.accuracy is None:
            return f"{head} NOT SUPPORTED: {self.remark}"
        same = "-" if self.agreement is None else f"{self.agreement:.2f}%"
        return (
            f"{head} {self.accuracy:6.2f}% {self.lost:+7.2f} {same:>8} {self.integers or '-':>9} "
            f"{self.seconds:6.0f}  {'; '.join(filter(None, (self.fault, self.remark)))}"
        ).rstrip()

    @staticmethod
    def heading() -> str:
        """The titles of the columns."""
        return (
            f"{'network':<9} {'bits':<8} {'tool':<8} {'method':<54} {'runs on':<9} "
            f"{'top-1':>7} {'lost':>7} {'= sim':>8} {'integers':>9} {'s':>6}"
        )


def judged(row: Row) -> Row:
    """The row with the bound that it breaks; bounds are for ours.

    >>> row = Row("net", "ours", "", "W8A8", "onnx", 91.0, lost=0.1, agreement=99.9)
    >>> judged(row).fault, judged(replace(row, lost=0.11)).fault
    ('', 'LOSES MORE THAN 0.1')
    >>> judged(replace(row, agreement=99.89)).fault
    'AGREES ON LESS THAN 99.9%'
    >>> judged(replace(row, tool="NNCF", lost=5.0)).fault
    ''
    """
    if row.tool != "ours":
        return row
    # Differences of percentages are multiples of 0.01, or of 100 / images, up to float rounding.
    if row.bits in LOSS and not row.lost <= LOSS[row.bits] + 1e-9:
        return replace(row, fault=f"LOSES MORE THAN {LOSS[row.bits]:g}")
    if row.bits == "W8A8" and row.agreement is not None and not row.agreement >= AGREEMENT - 1e-9:
        return replace(row, fault=f"AGREES ON LESS THAN {AGREEMENT:g}%")
    return row


class Bench:
    """The data, and the predictions of whatever is called on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.load = loader(arguments.data)
        self.console = Console(sys.stdout, as_json=False, terminal=False)
        images, labels = self.load.cifar10("train_1")
        chosen = np.random.default_rng(arguments.seed).permutation(len(images))[:CALIBRATION]
        self.calibration = TensorData(
            (self.load.normalise(images[chosen]),), torch.from_numpy(labels[chosen]).long(),
            batch_size=128,
        )  # fmt: skip
        images, labels = self.load.cifar10("test")
        self._images = images[: arguments.images]
        self.labels = labels[: arguments.images].astype(np.int64)

    def context(self, target: str) -> Context:
        """What passes are given."""
        return Context(
            data=self.calibration, target=target, seed=self.arguments.seed,
            progress=self.console.progress,
        )  # fmt: skip

    def classes(self, scores: Scores, what: str) -> np.ndarray[Any, Any]:
        """The class that is chosen for every test image, int64[n]; the progress bar says what."""
        count = len(self._images)
        found = []
        for start in range(0, count, BATCH):
            self.console.progress(what, start, count)
            x = self.load.normalise(self._images[start : start + BATCH]).numpy()
            found.append(_finite(scores(np.ascontiguousarray(x)), what).argmax(1))
        self.console.hide_progress()
        return np.concatenate(found)

    def percent(self, same: np.ndarray[Any, Any]) -> float:
        """The share of the test images that an array of truth values picks."""
        return 100.0 * int(same.sum()) / len(self.labels)


def _finite(scores: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
    if not np.isfinite(scores).all():
        raise SystemExit(f"{what}: scores are not finite")
    return scores


class Net:
    """One network: its module, its captured program, and what it scores in float."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.name, self.bench = name, bench
        self.depth = int(name.removeprefix("resnet"))
        self.module = bench.load.cifar_resnet(self.depth)
        self.program = capture(self.module, (torch.zeros(2, 3, 32, 32),))
        start = time.perf_counter()
        found = bench.classes(simulation(self.program), f"{name}, float")
        self.accuracy = bench.percent(found == bench.labels)
        self._seconds = time.perf_counter() - start

    def float_row(self) -> Row:
        """The float network, run by torch."""
        return Row(
            self.name, "torch", "as trained", "float32", "eager", self.accuracy,
            seconds=self._seconds,
        )  # fmt: skip

    def row(
        self,
        row: Row,
        found: np.ndarray[Any, Any],
        simulated: np.ndarray[Any, Any] | None,
        since: float,
    ) -> Row:
        """A row with what its predictions say, and the seconds since the clock stood at a time."""
        accuracy = self.bench.percent(found == self.bench.labels)
        agreement = None if simulated is None else self.bench.percent(found == simulated)
        return judged(
            replace(
                row, accuracy=accuracy, lost=self.accuracy - accuracy, agreement=agreement,
                seconds=time.perf_counter() - since,
            )
        )  # fmt: skip


def simulation(program: Program) -> Scores:
    """The program itself, run by torch."""

    def scores(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return program(torch.from_numpy(x))[0].numpy()

    return scores


# -- ours -----------------------------------------------------------------------------------------


def ours(net: Net, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every row of ours that was asked for."""
    few = arguments.few_bits_target
    for scales in (s for name, s in SCALES.items() if name in arguments.methods):
        for target in arguments.backends:
            start = time.perf_counter()
            program = compiled(net, W8A8.replace("SCALES", scales), target)
            yield from executed(net, program, (target,), f"scales: {scales}", "W8A8", start)
    if "w4a8" in arguments.methods:
        start = time.perf_counter()
        text = W4A8.replace("ITERATIONS", str(arguments.iterations))
        program = compiled(net, text, few)
        method = "equalised, AdaRound, bias correction"
        yield from executed(net, program, ("eager", few), method, "W4A8", start)
    if "w4a4" in arguments.methods and arguments.w4a4 is not None and net.depth == 20:
        start = time.perf_counter()
        program = trained(net, arguments)
        method = f"LSQ, distilled, {program.attributes.get(TRAINED, 'training unknown')}"
        target = program.attributes["quantized-for"]
        yield from executed(net, program, ("eager", target), method, "W4A4", start)


def compiled(net: Net, text: str, target: str) -> Program:
    """The network through a pipeline, every promise of every pass checked."""
    program = Pipeline.parse(text).run(net.program, net.bench.context(target)).program
    net.bench.console.hide_progress()
    return program


def executed(
    net: Net, program: Program, runtimes: tuple[str, ...], method: str, bits: str, start: float
) -> Iterator[Row]:
    """A quantised program on some runtimes, each compared with its simulation."""
    what = f"{net.name}, {bits}"
    simulated = None
    if any(target != "eager" for target in runtimes):
        simulated = net.bench.classes(simulation(program), f"{what}, simulation")
    for target in dict.fromkeys(runtimes):
        row = Row(net.name, "ours", method, bits, target)
        with tempfile.TemporaryDirectory() as folder:
            artifact = build(
                program, target, Path(folder) / "artifact", net.bench.context(""), verify=False
            )
            net.bench.console.hide_progress()
            runner = artifact.load(LoadOptions(threads=net.bench.arguments.threads))
            found = net.bench.classes(lambda x, r=runner: r.run([x])[0], f"{what}, {target}")
            if target != "eager":
                row = replace(row, integers=integers(runner))
        # Eager is the simulation itself.
        row = net.row(row, found, None if target == "eager" else simulated, start)
        if net.bench.arguments.floor and target != "eager":
            assert simulated is not None
            row = replace(row, remark=floor(net.bench, program, simulated, found))
        yield row
        start = time.perf_counter()


def floor(
    bench: Bench,
    program: Program,
    simulated: np.ndarray[Any, Any],
    found: np.ndarray[Any, Any],
) -> str:
    """How far the program in float64 agrees with the one in float32, and with the artifact.

    Rounding is a staircase: where arithmetic differs by one part in 10^7, some values fall to the
    other side, and deep networks amplify it. The first figure is what that alone does.
    """
    exact = bench.classes(
        lambda x: run_float64(program, (torch.from_numpy(x),))[0].numpy(), "float64"
    )
    same = bench.percent(exact == simulated), bench.percent(exact == found)
    return f"in float64: = sim {same[0]:.2f}%, = artifact {same[1]:.2f}%"


def trained(net: Net, arguments: argparse.Namespace) -> Program:
    """The W4A4 program of the file, trained and written there where the file is missing."""
    if arguments.w4a4.exists():
        return load_program(arguments.w4a4)
    load, seed = net.bench.load, arguments.seed
    before = quantised(
        float_program(load, net.depth), load, arguments.few_bits_target, (4, 4), seed
    )
    options = TrainQuantized(
        epochs=arguments.epochs, batch_size=128, temperature=4.0, warmup=100,
        checkpoint=f"{arguments.w4a4}.checkpoint", checkpoint_every=100,
    )  # fmt: skip
    data = training_data(load, 5, seed)
    program = apply(
        options, before, Context(data=data, seed=seed, progress=net.bench.console.progress)
    ).program
    net.bench.console.hide_progress()
    budget = f"{arguments.epochs} epochs of {data.count} images"
    program = replace(program, attributes={**program.attributes, TRAINED: budget})
    save_program(program, arguments.w4a4)
    return program


# -- theirs ---------------------------------------------------------------------------------------


def theirs(net: Net, peer: Peer) -> Row:
    """A peer's row, or why there is none."""
    row = Row(net.name, peer.tool, peer.method, peer.bits, peer.runs_on)
    start = time.perf_counter()
    try:
        made = peer.quantised(net.module, net.bench.calibration.inputs[0])
    except Unsupported as reason:
        return replace(row, remark=str(reason)[:110])
    found = net.bench.classes(made.scores, f"{net.name}, {peer.tool}, {peer.method}")
    return net.row(replace(row, integers=made.integers), found, None, start)


# -- the table ------------------------------------------------------------------------------------


def rows(arguments: argparse.Namespace, bench: Bench) -> Iterator[Row]:
    """The whole table, row by row as each is known."""
    for name in arguments.nets:
        net = Net(bench, name)
        yield net.float_row()
        yield from ours(net, arguments)
        if "peers" in arguments.methods:
            for peer in peers(arguments.threads):
                yield theirs(net, peer)


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with load.py")
    parser.add_argument("--nets", nargs="+", default=["resnet20", "resnet56"],
                        choices=["resnet20", "resnet32", "resnet44", "resnet56"])  # fmt: skip
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=IMAGES, help="test images, the first ones")
    parser.add_argument("--iterations", type=int, default=300, help="of learned rounding, W4A8")
    parser.add_argument("--few-bits-target", default="openvino", choices=BACKENDS)
    parser.add_argument("--w4a4", type=Path, default=None, help="the file of the W4A4 program")
    parser.add_argument("--epochs", type=int, default=2, help="of training, W4A4")
    parser.add_argument("--floor", action="store_true", help="see float64 agree, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    bench = Bench(arguments)
    print(f"{len(bench.labels)} of {IMAGES} test images, {CALIBRATION} calibration images")
    print(Row.heading(), flush=True)
    faults = []
    for row in rows(arguments, bench):
        print(row, flush=True)
        faults += [row] if row.fault else []
    print(f"{len(faults)} bounds broken, {time.perf_counter() - start:.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()

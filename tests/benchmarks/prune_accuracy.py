"""Accuracy against FLOPs without training: ours beside Torch-Pruning's, from the same weights.

    python tests/benchmarks/prune_accuracy.py --data FOLDER                    # everything; hours
    python tests/benchmarks/prune_accuracy.py --data FOLDER --screen 1000      # see below
    python tests/benchmarks/prune_accuracy.py --data FOLDER --images 500 --targets 50 \\
        --criteria l2 obs --theirs l2 taylor                                   # a quick look

FOLDER holds a ``load.py`` with ``cifar10(part)``, ``normalise(images)`` and
``cifar_resnet(depth)`` (a trained CIFAR-10 ResNet-56 here). Calibration: 512 images of the
training part ``train_1``, drawn by the seed; both tools get the same images and labels. Accuracy:
the test part, or with ``--split train_5`` images that neither calibration nor test holds: that is
where settings are to be chosen.

Ours: every criterion under a global ranking of the blocks' inner channels, with and without least
squares; then the orders of ``--best`` under ``ranking=sensitivity``, over the inner channels and
over all, with every compensation. At least the target is removed. Theirs: every importance, global
and local, over all layers and over the inner channels alone; of all ratios the one whose FLOPs are
nearest to the target, above or below. FLOPs count convolutions and linear layers, for both.

``--screen N`` runs every row on the first N images and then, at each target, the best of theirs
and of ours (``--finalists``, 2 each) on all images.

Ends with whether our best curve lies above theirs at every target; exits 1 where it does not.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.cost import cost
from pruna_ir.coupling import Coupling, couple, remove
from pruna_ir.coupling.kinds import kinds_of
from pruna_ir.data import TensorData
from pruna_ir.errors import PrunaError
from pruna_ir.passes.budgets import Counted
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.fold_removed_means import FoldRemovedMeans
from pruna_ir.passes.importance import CRITERIA, scores
from pruna_ir.passes.reconstruct_consumers import ReconstructConsumers
from pruna_ir.passes.reestimate_batch_norm import ReestimateBatchNorm
from pruna_ir.passes.removal_plans import without
from pruna_ir.passes.scored_members import Candidates
from pruna_ir.passes.selection import Candidate, Limits, Selector
from pruna_ir.passes.sensitivity import sensitivities
from pruna_ir.program import Origin, Program
from pruna_ir.transform import Context, Pass, Rewrite, apply

TARGETS = (10, 20, 30, 40, 50, 60)  # percent of the FLOPs that go
CALIBRATION = 512
BATCH = 100  # with channels last, the quickest of 50 to 500 on one thread
MEANS, BN = FoldRemovedMeans(), ReestimateBatchNorm(relative=True)
LEAST_SQUARES = ReconstructConsumers()
ALL_LAYERS = ReconstructConsumers(every=True)
COMPENSATIONS: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "means": (MEANS,),
    "bn": (BN,),
    "least squares": (LEAST_SQUARES,),
    "least squares + bn": (LEAST_SQUARES, BN),
    "least squares, all layers": (ALL_LAYERS,),
    "least squares, all layers + bn": (ALL_LAYERS, BN),
}
THEIRS = ("random", "l1", "l2", "lamp", "fpgm", "bn-scale", "taylor", "hessian", "obd-c")


@dataclass(frozen=True)
class Row:
    """One pruned network: what made it, and how much is left."""

    tool: str
    method: str
    target: int
    removed: float
    accuracy: float
    images: int
    program: Program

    def __str__(self) -> str:
        return (
            f"{self.tool:<7} {self.method:<66} {self.target:>3}%  removed {self.removed:5.1f}%  "
            f"top-1 {self.accuracy:6.2f}%  ({self.images} images)"
        )


class Bench:
    """The trained network, its data, and what both tools are given."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        spec = importlib.util.spec_from_file_location("load", arguments.data / "load.py")
        assert spec is not None
        assert spec.loader is not None
        self._load = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._load)
        self.seed = arguments.seed
        self.model: nn.Module = self._load.cifar_resnet(56)
        images, labels = self._load.cifar10("train_1")
        chosen = np.random.default_rng(arguments.seed).permutation(len(images))[:CALIBRATION]
        self.calibration = TensorData(
            (self._load.normalise(images[chosen]),),
            torch.from_numpy(np.asarray(labels[chosen])).long(), batch_size=128,
        )  # fmt: skip
        self._images, self._labels = self._load.cifar10(arguments.split)
        self._images = self._images[: arguments.images]
        self.context = Context(data=self.calibration, seed=arguments.seed)
        captured = capture(self.model, (torch.zeros(2, 3, 32, 32),))
        self.program = apply(Canonicalize(), captured).program
        self.flops = cost(self.program).flops

    def row(
        self, tool: str, method: str, target: int, program: Program, images: int | None = None
    ) -> Row:
        """A program's row; ``images`` limits how many are looked at."""
        removed = 100 * (1 - cost(program).flops / self.flops)
        count = min(images or len(self._images), len(self._images))
        accuracy = self.accuracy(program, count)
        return Row(tool, method, target, removed, accuracy, count, program)

    def accuracy(self, program: Program, count: int) -> float:
        """Top-1 accuracy in percent on the first images."""
        fast = apply(FoldBatchNorm(), program).program
        hits = 0
        with torch.no_grad():
            for start in range(0, count, BATCH):
                part = slice(start, min(start + BATCH, count))
                images = self._load.normalise(self._images[part])
                images = images.to(memory_format=torch.channels_last)
                found = fast(images)[0].argmax(1).numpy()
                hits += int((found == self._labels[part]).sum())
        return 100 * hits / count


# -- ours ----------------------------------------------------------------------------------------


class Ours:
    """Our selections of inner channels; scores are computed once for all targets."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._program = bench, bench.program
        self._coupling: Coupling = couple(self._program)
        kinds = kinds_of(self._program, self._coupling)
        every = [
            Candidate(group, kind)
            for group, kind in zip(self._coupling.groups, kinds, strict=True)
            if group.reason is None
        ]
        # Several layers write into a residual stream, one into a block's inner channels.
        self._candidates = {
            "all channels": every,
            "inner channels": [c for c in every if len(self._weights(c)) == 1],
        }
        self._counted = Counted(self._program, self._coupling, "flops")

    def _weights(self, candidate: Candidate) -> list[str]:
        """The weights that produce a candidate's channels."""
        produced = [m.tensor for m in candidate.group.members if m.produced]
        return [name for name in produced if self._program.tensor(name).dim() > 1]

    @cache  # noqa: B019
    def selector(self, criterion: str, ranking: str, channels: str) -> Selector:
        """What goes for every share, as prune-channels selects it."""
        candidates = self._candidates[channels]
        groups = [candidate.group for candidate in candidates]
        # Norms compare channels of one group only; errors and losses compare all.
        normalise = "mean" if CRITERIA[criterion].power == 2 or criterion == "random" else "none"
        scored = scores(
            self._program, self._coupling, groups, criterion, context=self._bench.context,
            normalise=normalise,
        )  # fmt: skip
        if ranking == "sensitivity":
            rw = Rewrite(self._program, "sensitivity", self._bench.context)
            scored = sensitivities(
                Candidates(self._program, self._coupling, groups, self._bench.context), scored,
                self._counted.removed, lambda gone: without(rw, self._coupling, gone),
            )  # fmt: skip
        limits = Limits(ranking, max_ratio=1.0)
        return Selector(self._coupling, candidates, scored, limits, capped=True)

    def pruned(self, criterion: str, ranking: str, channels: str, target: int) -> Program:
        """The program without a share of its FLOPs, and its origin."""
        nothing = np.zeros(len(self._coupling.solved.frozen), np.bool_)
        selector = self.selector(criterion, ranking, channels)
        gone = self._counted.reach(selector, target / 100, nothing)
        plan = self._coupling.plan(np.flatnonzero(gone))
        rw = Rewrite(self._program, "prune", self._bench.context)
        remove(rw, self._coupling, plan)
        rw.set_origin(Origin(self._program, plan.removed))
        return rw.finish()


def ours(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[str, int, Program]]:
    """Every setting of ours at every target."""
    selections = Ours(bench)
    simple = ("none", "least squares")
    settings = [(c, "global", "inner channels", simple) for c in arguments.criteria]
    settings += [
        (criterion, "sensitivity", channels, tuple(arguments.compensations))
        for criterion in arguments.best
        for channels in ("inner channels", "all channels")
    ]
    for criterion, ranking, channels, names in settings:
        for target in arguments.targets:
            small = selections.pruned(criterion, ranking, channels, target)
            for name in names:
                program = small
                for pass_ in COMPENSATIONS[name]:
                    program = apply(pass_, program, bench.context).program
                yield f"{criterion}, {ranking}, {channels}, {name}", target, program


# -- theirs --------------------------------------------------------------------------------------


class Theirs:
    """Torch-Pruning at the ratio whose FLOPs are nearest to a target."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._flops = module_flops(bench.model)

    def pruned(self, name: str, scope: str, target: int, *, everywhere: bool) -> nn.Module:
        """The model pruned once; ``everywhere`` includes the residual width."""
        tried: list[tuple[float, nn.Module]] = []
        low, high = 0.0, 0.95
        for _ in range(9):
            ratio = (low + high) / 2
            model = self._at(name, scope, ratio, everywhere=everywhere)
            removed = 100 * (1 - module_flops(model) / self._flops)
            tried.append((abs(removed - target), model))
            low, high = (low, ratio) if removed > target else (ratio, high)
        return min(tried, key=lambda pair: pair[0])[1]

    def _at(self, name: str, scope: str, ratio: float, *, everywhere: bool) -> nn.Module:
        import torch_pruning

        torch.manual_seed(self._bench.seed)
        model = copy.deepcopy(self._bench.model)
        importance = self._importance(name, model)
        kept = [model.get_submodule("linear")]
        if not everywhere:
            kept += [m for n, m in model.named_modules() if n.endswith("conv2") or n == "conv1"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.BasePruner(
                model, torch.zeros(2, 3, 32, 32), importance=importance, pruning_ratio=ratio,
                global_pruning=scope == "global", ignored_layers=kept,
            )  # fmt: skip
            pruner.step()
        return model

    def _importance(self, name: str, model: nn.Module) -> Any:
        """An importance of theirs, with the gradients that it reads set on the model."""
        from torch_pruning.pruner import importance as tp

        made: dict[str, Callable[[], Any]] = {
            "random": tp.RandomImportance,
            "l1": lambda: tp.GroupMagnitudeImportance(p=1),
            "l2": lambda: tp.GroupMagnitudeImportance(p=2),
            "lamp": tp.LAMPImportance,
            "fpgm": tp.FPGMImportance,
            "bn-scale": tp.BNScaleImportance,
            "taylor": tp.GroupTaylorImportance,
            "hessian": tp.GroupHessianImportance,
            "obd-c": lambda: tp.OBDCImportance(num_classes=10),
        }
        importance = made[name]()
        if name in ("taylor", "hessian", "obd-c"):
            gradients = self._gradients(name)
            for key, parameter in model.named_parameters():
                parameter.grad = gradients[key].clone()
        if name == "obd-c":
            # Its diagonal is the mean of squared gradients of single samples, as a matrix.
            importance.steps = 1
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    importance.Fisher[module] = module.weight.grad.flatten(1)  # type: ignore[union-attr, operator]
        return importance

    @cache  # noqa: B019
    def _gradients(self, name: str) -> dict[str, torch.Tensor]:
        """The mean gradient, or the mean of the squared gradients of single samples.

        Labels are the true ones, and for obd-c drawn from the model, as its paper has it.
        """
        model = copy.deepcopy(self._bench.model)
        squares = name != "taylor"
        generator = torch.Generator().manual_seed(self._bench.seed)
        total = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
        (x,), labels = self._bench.calibration.inputs, self._bench.calibration.labels
        assert labels is not None
        size = 1 if squares else 128
        for start in range(0, len(x), size):
            logits = model(x[start : start + size])
            wanted = labels[start : start + size]
            if name == "obd-c":
                likely = logits.detach().softmax(1)
                wanted = torch.multinomial(likely, 1, generator=generator)[:, 0]
            model.zero_grad()
            nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None
                total[key] += parameter.grad.square() if squares else parameter.grad
        return {key: value / len(x) for key, value in total.items()}


def module_flops(model: nn.Module) -> int:
    """The FLOPs of a module's convolutions and linear layers for one image, as `cost` counts."""
    total = 0

    def count(module: nn.Module, _: Any, y: torch.Tensor) -> None:
        nonlocal total
        total += 2 * y[0].numel() * module.weight[0].numel()  # type: ignore[index, operator]

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return total


def theirs(bench: Bench, arguments: argparse.Namespace) -> Iterator[tuple[str, int, Program]]:
    """Every setting of theirs at every target; one that raises is told and left out."""
    tool = Theirs(bench)
    for name in arguments.theirs:
        for scope in ("global", "local"):
            for everywhere in (False, True):
                method = f"{name}, {scope}, {'all layers' if everywhere else 'inner channels'}"
                for target in arguments.targets:
                    try:
                        model = tool.pruned(name, scope, target, everywhere=everywhere)
                        captured = capture(model.eval(), (torch.zeros(2, 3, 32, 32),))
                    except (RuntimeError, ValueError, KeyError, IndexError, PrunaError) as error:
                        reason = str(error).splitlines()[0][:100]
                        print(f"theirs  {method}: {type(error).__name__}: {reason}", flush=True)
                        break
                    yield method, target, apply(Canonicalize(), captured).program


# -- the table -----------------------------------------------------------------------------------


def rows_of(
    tool: str, found: Iterator[tuple[str, int, Program]], bench: Bench, screen: int
) -> list[Row]:
    """The rows, printed as they come."""
    rows = []
    for method, target, program in found:
        row = bench.row(tool, method, target, program, screen or None)
        print(row, flush=True)
        rows.append(row)
    return rows


def finalists(rows: Sequence[Row], targets: Sequence[int], bench: Bench, count: int) -> list[Row]:
    """The best of each target, on all images."""
    kept = []
    for target in targets:
        best = sorted((r for r in rows if r.target == target), key=lambda r: -r.accuracy)[:count]
        for row in best:
            again = bench.row(row.tool, row.method, target, row.program)
            print(again, flush=True)
            kept.append(again)
    return kept


def verdict(ours_: Sequence[Row], theirs_: Sequence[Row], targets: Sequence[int]) -> bool:
    """Print both best curves and whether ours lies above at every target."""
    print(f"\n{'removed':>8}  {'ours':>7}  {'theirs':>7}")
    above = True
    for target in targets:
        pair = [
            max((r for r in rows if r.target == target), key=lambda r: r.accuracy, default=None)
            for rows in (ours_, theirs_)
        ]
        mine, other = pair
        if mine is None or other is None:
            above = False
            continue
        above &= mine.accuracy > other.accuracy
        print(
            f"{target:>7}%  {mine.accuracy:6.2f}%  {other.accuracy:6.2f}%   "
            f"{mine.method} ({mine.removed:.1f}%)  |  {other.method} ({other.removed:.1f}%)"
        )
    print(f"our best curve above theirs at every point: {'yes' if above else 'no'}")
    return above


def main() -> None:
    """Print a row a pruned network, and the verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with load.py")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--screen", type=int, default=0)
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--split", default="test", help="the part whose images are looked at")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--best", nargs="*", default=["l2", "obs", "obs-greedy"])
    parser.add_argument("--compensations", nargs="*", default=list(COMPENSATIONS))
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS), choices=THEIRS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    bench = Bench(arguments)
    dense = bench.row("", "unpruned", 0, bench.program)
    print(dense, flush=True)
    tables = {
        tool: rows_of(tool, found, bench, arguments.screen)
        for tool, found in (("ours", ours(bench, arguments)), ("theirs", theirs(bench, arguments)))
    }
    if arguments.screen:
        print("\nthe best of each target, on all images", flush=True)
        tables = {
            tool: finalists(rows, arguments.targets, bench, arguments.finalists)
            for tool, rows in tables.items()
        }
    fine = verdict(tables["ours"], tables["theirs"], arguments.targets)
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()

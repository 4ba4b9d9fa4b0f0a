"""Budgets: the share of a program's cost that a selection of units removes.

FLOPs, parameters and bytes are counted without rewriting anything: after removal the size of a
dimension is the number of its surviving ids (`pruna_ir.coupling.rule.kept_counts`), and
`pruna_ir.cost` prices every operator at these sizes.

Latency is measured: the pruned program is built for a backend and runs side by side with the
unpruned one, batch 1 where the batch is dynamic. A measurement repeats within a few percent, no
better; `LATENCY_TOLERANCE` says what is taken as reached. Each one costs a build.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from pruna_ir.build import Artifact, build
from pruna_ir.capture import BATCH
from pruna_ir.cost import Cost, NodeCost, cost
from pruna_ir.coupling import Coupling
from pruna_ir.coupling.rule import kept_counts
from pruna_ir.coupling.value import Value
from pruna_ir.errors import UsageError
from pruna_ir.latency import measure
from pruna_ir.passes.removal_plans import without
from pruna_ir.passes.selection import Limits, Mask, Selector, reach
from pruna_ir.program import Program
from pruna_ir.reexport import resized
from pruna_ir.transform import Context, Rewrite

COUNTED = ("flops", "parameters", "bytes")
LATENCY_TOLERANCE = 0.03
"""How far from the wanted share of the latency a measured one may be."""
LATENCY_BUILDS = 8
"""How often a search builds and measures at most."""
_MEASURE_S = 5.0
_REPEATS = 60


def cost_after(program: Program, coupling: Coupling, gone: Mask) -> Cost:
    """The cost of the program without some of its units.

    The indices that removal stores where it makes a slice uneven are not foreseen: eight bytes
    for each place that such a slice reads.

    Args:
        program: the program that ``coupling`` was made from.
        coupling: its analysis.
        gone: per unit, whether it is removed.
    """
    alive = ~gone[coupling.solved.unit]

    def after(node: fx.Node, shape: Any) -> Any:
        value = coupling.values.get(node.name)
        if isinstance(value, tuple):
            return [_kept(part, sizes, alive) for part, sizes in zip(value, shape, strict=True)]
        return shape if value is None else _kept(value, shape, alive)

    return cost(program, resize=after)


def _kept(value: Value, shape: tuple[int, ...], alive: Mask) -> tuple[int, ...]:
    sizes = []
    for dim, size in enumerate(shape):
        before, left = kept_counts(value, dim, alive) if value.tracked(dim) else (1, 1)
        sizes.append(size // before * left)
    return tuple(sizes)


def heaviest(total: Cost, of: str, number: int = 3) -> str:
    """The calls that cost the most, as text: ``conv2d (layer1.0.conv1) 12%, ...``."""
    of = of if of in COUNTED else "flops"
    full = getattr(total, of)

    def share(row: NodeCost) -> float:
        return float(getattr(row, of)) / full if full else 0.0

    rows = sorted(total.nodes, key=share, reverse=True)[:number]
    return ", ".join(
        f"{row.node}{f' ({row.module})' if row.module else ''} {share(row):.0%}" for row in rows
    )


class Budget(Protocol):
    """What a ratio is a share of."""

    def reach(self, selector: Selector, wanted: float, gone: Mask) -> Mask:
        """The smallest selection that removes the wanted share, and ``gone`` in any case.

        Raises:
            UsageError: nothing that may go is enough.
        """
        ...

    def told(self, gone: Mask) -> str:
        """What a selection removes, for a remark; empty where there is nothing to tell."""
        ...


@dataclass(frozen=True)
class ChannelShare:
    """A share of the number of channels."""

    def reach(self, selector: Selector, wanted: float, gone: Mask) -> Mask:
        """The share itself, rounded down for every group."""
        return selector.at(wanted) | gone

    def told(self, gone: Mask) -> str:  # noqa: ARG002
        """Nothing: each group's remark tells its own."""
        return ""


@dataclass(frozen=True)
class Counted:
    """A share of the FLOPs, parameters or bytes; at least that goes, and one part less would miss.

    Attributes:
        program: the program that ``coupling`` was made from.
        coupling: its analysis.
        of: one of `COUNTED`.
    """

    program: Program
    coupling: Coupling
    of: str

    def removed(self, gone: Mask) -> float:
        """The share that a selection removes."""
        full = self._full
        left = int(getattr(cost_after(self.program, self.coupling, gone), self.of))
        return 1 - left / full if full else 0.0

    @cached_property
    def _full(self) -> int:
        return int(getattr(cost(self.program), self.of))

    def reach(self, selector: Selector, wanted: float, gone: Mask) -> Mask:
        """By bisection over the share of channels, then over single units."""
        mask = reach(selector, self.removed, wanted, gone)
        if mask is None:
            every = selector.at(1.0) | gone
            left = cost_after(self.program, self.coupling, every)
            raise _impossible(
                wanted, self.of, self.removed(every), selector.limits, heaviest(left, self.of)
            )
        return mask

    def told(self, gone: Mask) -> str:
        """The share that goes."""
        return f"{self.removed(gone):.1%} of the {self.of} go"


@dataclass(frozen=True)
class Timed:
    """A share of the latency, as measured.

    Attributes:
        watch: times programs.
        without: the program without a selection.
    """

    watch: Stopwatch
    without: Callable[[Mask], Program]

    def reach(self, selector: Selector, wanted: float, gone: Mask) -> Mask:
        """A selection that saves the share within `LATENCY_TOLERANCE`, or the nearest above."""
        mask, most = reach_measured(
            lambda share: selector.at(share) | gone,
            lambda mask: self.watch.removed(self.without(mask)),
            wanted,
        )
        if mask is None:
            raise _impossible(wanted, "latency", most, selector.limits, "")
        return mask

    def told(self, gone: Mask) -> str:
        """A last measurement of the selection that was chosen."""
        saved = self.watch.removed(self.without(gone))
        return (
            f"{saved:.0%} of the latency go, measured on {self.watch.target} beside the unpruned "
            f"program: {self.watch.original:.3g} ms -> {self.watch.pruned:.3g} ms, after "
            f"{self.watch.builds} builds"
        )


@contextmanager
def budget(of: str, rw: Rewrite, coupling: Coupling) -> Iterator[Budget]:
    """The budget of the program under rewrite; folders that it needs vanish afterwards.

    Args:
        of: ``channels``, ``latency``, or one of `COUNTED`.
        rw: a rewrite that has not edited anything yet.
        coupling: the analysis of its program.

    Raises:
        PrunaError: latency cannot be measured on the target here.
    """
    if of == "channels":
        yield ChannelShare()
        return
    if of in COUNTED:
        yield Counted(rw.program, coupling, of)
        return
    target, seed = rw.context.target or "eager", rw.context.seed

    def without_units(gone: Mask) -> Program:
        rw.context.progress(f"building and timing for {target}", watch.builds, LATENCY_BUILDS)
        return without(rw, coupling, gone)

    with TemporaryDirectory(prefix="pruna-latency-") as folder:
        run = _runner(rw.before, target, Path(folder) / "original", seed)
        watch = Stopwatch(target, Path(folder), seed, run)
        yield Timed(watch, without_units)


def _impossible(
    wanted: float, of: str, most: float, limits: Limits, remains: str
) -> UsageError:
    rest = f"; what remains is mostly {remains}" if remains else ""
    return UsageError(
        f"{wanted:.1%} of the {of} cannot go: without the channels that must stay (see the "
        f"remarks), and with max_ratio={limits.max_ratio}, min_channels={limits.min_channels} and "
        f"round_to={limits.round_to}, at most {most:.1%} can{rest}. Ask for less, or loosen these"
    )


# -- latency ---------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Times pruned programs on a backend, side by side with the program that it was made for.

    Attributes:
        target: the backend.
        builds: how many programs were timed.
        original: the latest milliseconds of the unpruned program (median).
        pruned: those of the program timed last.
    """

    target: str
    folder: Path
    seed: int
    run_original: Callable[[], object]
    builds: int = 0
    original: float = math.nan
    pruned: float = math.nan

    def removed(self, program: Program) -> float:
        """The share of the unpruned program's latency that a program saves."""
        self.builds += 1
        run = _runner(program, self.target, self.folder / str(self.builds), self.seed)
        found = measure(
            {"original": self.run_original, "pruned": run}, repeats=_REPEATS, budget_s=_MEASURE_S
        )
        self.original, self.pruned = found["original"].p50, found["pruned"].p50
        return 1 - 1 / found["pruned"].speedup


def _runner(program: Program, target: str, folder: Path, seed: int) -> Callable[[], object]:
    artifact = build(program, target, folder, Context(target=target, seed=seed), verify=False)
    runner, inputs = artifact.load(), _inputs(artifact, program)
    return lambda: runner.run(inputs)


def _inputs(artifact: Artifact, program: Program) -> list[np.ndarray[Any, Any]]:
    """The program's examples at batch 1, or at the sizes that the artifact takes."""
    sizes = {BATCH: 1}
    for spec, described in zip(program.inputs, artifact.manifest.inputs, strict=True):
        for name, taken in zip(spec.shape, described["shape"], strict=True):
            if isinstance(name, str) and isinstance(taken, int):
                sizes[name] = taken
    return [
        _numpy(resized(value, spec, sizes))
        for value, spec in zip(program.examples, program.inputs, strict=True)
    ]


def _numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return array


def reach_measured(
    at: Callable[[float], Mask], removed: Callable[[Mask], float], wanted: float
) -> tuple[Mask | None, float]:
    """A selection that saves the wanted share, or the nearest above; and the most that any saved.

    The share of channels is bracketed and interpolated. None stands for a wanted share that no
    selection saves.

    Args:
        at: the selection for a share of the channels in [0, 1].
        removed: measures the share that a selection saves; called `LATENCY_BUILDS` times at most.
        wanted: the share to save, within `LATENCY_TOLERANCE`.
    """
    low, high = (0.0, 0.0), (1.0, math.nan)
    best: Mask | None = None
    # Cost falls with the square of the width, roughly.
    share, most = 1 - math.sqrt(1 - wanted), 0.0
    for _ in range(LATENCY_BUILDS):
        mask = at(share)
        if best is not None and bool((mask == best).all()):
            break
        saved = removed(mask)
        most = max(most, saved)
        if abs(saved - wanted) <= LATENCY_TOLERANCE:
            return mask, most
        if saved > wanted:
            best, high = mask, (share, saved)
        elif share == 1.0:
            break
        else:
            low = (share, saved)
        share = _next_share(low, high, wanted)
    return best, most


def _next_share(low: tuple[float, float], high: tuple[float, float], wanted: float) -> float:
    """Where a line through both ends of the bracket reaches what is wanted, well inside of it."""
    width = high[0] - low[0]
    if math.isnan(high[1]):
        # Nothing has saved enough yet: half of what remains, and at last all of it.
        return high[0] if width < 0.2 else low[0] + width / 2
    part = (wanted - low[1]) / max(high[1] - low[1], 1e-9)
    return low[0] + width * min(max(part, 0.1), 0.9)

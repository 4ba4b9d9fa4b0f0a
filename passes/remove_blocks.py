"""remove-blocks: depth pruning, whole residual blocks or layers by their redundancy.

    y = x + f(x)   -->   y = x

Which blocks there are, and why one cannot go, is `pruna_ir.passes.residual_blocks`. The most
redundant go first, by the lowest score of

    influence   1 - mean over positions of cos(x, y): Block Influence, Men et al., ShortGPT:
                Layers in Large Language Models are More Redundant Than You Expect, 2024,
                equation (1)
    norm-ratio  ||y - x|| / ||x||, both norms over all positions and features
    magnitude   the mean of |w| over the branch's weights (two or more dimensions); no data. After
                the magnitude baseline of Kim et al., Shortened LLaMA, 2024, which the paper and
                our own trials find to be weak
    random      a number from the run's seed

x is what enters the block (or the first block of a layer), y the sum that leaves it (the last).
A position is a token or a pixel; positions where x and y are both zero count as unchanged, those
where one of them is, as wholly changed.

All are scored once, on the whole program, as in the papers. Limits: scores say nothing of what
several removals do together; accuracy is not recovered here. A block that changes the resolution
or the number of channels is not residual and stays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import fx

from pruna_ir.calibration import observe
from pruna_ir.call import bind_arguments
from pruna_ir.equivalence import Lifted
from pruna_ir.errors import UsageError
from pruna_ir.passes.residual_blocks import ResidualBlock, Residuals, feature_dim
from pruna_ir.passes.sparsity_patterns import share
from pruna_ir.program import Program, computed_nodes
from pruna_ir.registry import unknown
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten

_WEAK = (
    "the size of weights says little of redundancy and can choose worse than chance; influence "
    "asks for a few samples of data only"
)

Criterion = Literal["influence", "norm-ratio", "magnitude", "random"]
Unit = Literal["block", "layer"]
Layer = tuple[ResidualBlock, ...]


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Remove the most redundant residual blocks or layers: ``x + f(x)`` becomes ``x``.

    Rewrite:
        f = linear(relu(linear(x, W1, b1)), W2, b2); y = add(x, f)
          -->
        y = x

    Options:
        ratio: the share of the blocks (or layers) to remove, in [0, 1), rounded down; those that
            cannot go or are excluded count too.
        count: how many to remove, in place of a ratio.
        unit: ``block``, one residual sum (an attention, an FFN, a ResNet block); or ``layer``, the
            consecutive blocks of one numbered module (attention and FFN together).
        criterion: ``influence`` or ``norm-ratio``, which need calibration data; ``magnitude``;
            ``random``.
        exclude: globs of module paths whose blocks stay, such as ``layers.0`` for the first.
        samples: how many samples of the data to look at.

    What follows the sum (a relu, a norm) stays; the names of the remaining parameters stay, too,
    with gaps in their numbers. Run it after canonicalize and before fuse-conv-bn-relu, which hides
    sums. Remarks list the score of every block, and why one cannot go.

    Raises:
        UsageError: an option is out of its range, a glob matches nothing, data is missing, or
            fewer than ``count`` can go.

    >>> from pruna_ir import apply, capture
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.ffn, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    ...     def forward(self, x):
    ...         return self.head(x + self.ffn(x).relu())
    >>> program = capture(Net(), (torch.ones(2, 4),))
    >>> result = apply(RemoveBlocks(count=1, criterion="magnitude"), program)
    >>> list(result.program.tensors())
    ['head.weight', 'head.bias']
    """

    name: ClassVar[str] = "remove-blocks"
    effect: ClassVar[Effect] = Effect.ORACLE

    ratio: float = 0.25
    count: int | None = None
    unit: Unit = "block"
    criterion: Criterion = "influence"
    exclude: tuple[str, ...] = ()
    samples: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise UsageError(f"{self.name}: ratio must be in [0, 1), not {self.ratio}")
        if self.count is not None and self.count < 0:
            raise UsageError(f"{self.name}: count must be at least 0, not {self.count}")
        for option, known in (("unit", get_args(Unit)), ("criterion", get_args(Criterion))):
            if getattr(self, option) not in known:
                raise UsageError(f"{self.name}: {unknown(option, getattr(self, option), known)}")

    def rewrite(self, rw: Rewrite) -> None:
        """Find, score, choose, bypass, promise."""
        found, free = self._units(rw)
        wanted = self._wanted(len(found), len(free))
        if not free:
            return
        scores = self._scores(rw, free)
        if self.criterion == "magnitude":
            rw.note(free[0][-1].add, _WEAK)
        order = sorted(range(len(free)), key=lambda i: scores[i])
        chosen = sorted(order[:wanted])
        for i, layer in enumerate(free):
            text = f"{_title(layer)}: {self.criterion} {scores[i]:.4g}"
            if i in chosen:
                rw.applied(layer[-1].add, f"removed {text}")
            else:
                rw.note(layer[-1].add, f"kept {text}")
        gone = [block for i in chosen for block in free[i]]
        # From the end, since the stream of a later block may be the sum of an earlier one.
        for block in reversed(gone):
            rw.replace(block.add, block.stream)
        if gone:
            rw.promise(SkippedBranches({block.add.name: block.branch for block in gone}))

    def _units(self, rw: Rewrite) -> tuple[list[Layer], list[Layer]]:
        """All units in scope, and those that may go; remarks say why the others may not."""
        residuals = Residuals(rw.program)
        layers = (
            residuals.layers() if self.unit == "layer" else [(b,) for b in residuals.blocks]
        )
        found = [layer for layer in layers if all(rw.in_scope(b.add) for b in layer)]
        self._check_globs(found)
        for miss in residuals.near_misses:
            if rw.in_scope(miss.add):
                rw.skip(miss.add, f"no residual block: {miss.reason}")
        _note_hidden_sums(rw)
        free = []
        for layer in found:
            reason = self._why_not(layer)
            if reason:
                rw.skip(layer[-1].add, f"{_title(layer)} stays: {reason}")
            else:
                free.append(layer)
        return found, free

    def _why_not(self, layer: Layer) -> str:
        for block in layer:
            hit = next((glob for glob in self.exclude if _matches(block, glob)), None)
            if hit is not None:
                return f"excluded by '{hit}'"
            if block.reason:
                return block.reason
        return ""

    def _check_globs(self, found: Sequence[Layer]) -> None:
        blocks = [block for layer in found for block in layer]
        for glob in self.exclude:
            if not any(_matches(block, glob) for block in blocks):
                names = [block.name for block in blocks]
                raise UsageError(f"{self.name}: exclude: {unknown('block', glob, names)}")

    def _wanted(self, found: int, free: int) -> int:
        if self.count is None:
            return min(share(self.ratio, found), free)
        if self.count > free:
            raise UsageError(
                f"{self.name}: {self.count} {self.unit}s are to go, but of the {found} found only "
                f"{free} can; lower count, or see the remarks for the others"
            )
        return self.count

    # -- scores ------------------------------------------------------------------------------

    def _scores(self, rw: Rewrite, layers: Sequence[Layer]) -> list[float]:
        """One number a layer; the lowest goes first."""
        if self.criterion == "random":
            generator = random.Random(rw.context.seed)
            return [generator.random() for _ in layers]
        if self.criterion == "magnitude":
            return [_magnitude(rw.program, layer) for layer in layers]
        if rw.context.data is None:
            raise UsageError(
                f"{self.name}: criterion {self.criterion} compares what enters and leaves a block "
                "on data, and there is none; give calibration data (--data FILE.npz, or "
                "Context(data=...)), or use criterion=magnitude"
            )
        changes = [Change(feature_dim(layer[0]), feature_dim(layer[-1])) for layer in layers]
        taps: dict[fx.Node, _Tap] = {}
        for layer, change in zip(layers, changes, strict=True):
            taps.setdefault(layer[-1].add, _Tap()).left.append(change)
            taps.setdefault(layer[0].stream, _Tap()).entered.append(change)
        observe(
            rw.program, taps, rw.context.data,
            samples=self.samples, progress=rw.context.progress,
        )  # fmt: skip
        if self.criterion == "influence":
            return [change.influence() for change in changes]
        return [change.norm_ratio() for change in changes]


@dataclass
class Change:
    """How much a block changes its stream, over everything seen.

    Attributes:
        entering: the dimension of the features in what enters; all others are positions.
        leaving: the same in what leaves.

    >>> change = Change(1, 1)
    >>> change.enter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> change.leave(torch.tensor([[3.0, 0.0], [2.0, 0.0]]))
    >>> change.influence()
    0.5
    """

    entering: int
    leaving: int
    cosines: float = 0.0
    positions: int = 0
    squares: float = 0.0
    changes: float = 0.0
    _entered: torch.Tensor | None = field(default=None, repr=False)

    def enter(self, x: torch.Tensor) -> None:
        """Take what enters the block."""
        self._entered = x.detach()

    def leave(self, y: torch.Tensor) -> None:
        """Take what leaves it, of the same run."""
        assert self._entered is not None
        x = _positions(self._entered, self.entering)
        y = _positions(y.detach(), self.leaving)
        self._entered = None
        norms = x.norm(dim=1) * y.norm(dim=1)
        still = (x == 0).all(1) & (y == 0).all(1)
        cosine = torch.where(norms > 0, (x * y).sum(1) / norms.where(norms > 0, 1.0), 0.0)
        self.cosines += float(torch.where(still, 1.0, cosine).sum())
        self.positions += len(x)
        self.squares += float(x.square().sum())
        self.changes += float((y - x).square().sum())

    def influence(self) -> float:
        """1 - the mean cosine between what enters and what leaves at each position."""
        # Rounding may lift a cosine above 1.
        return max(0.0, 1.0 - self.cosines / self.positions)

    def norm_ratio(self) -> float:
        """The norm of what is added over the norm of what enters."""
        if self.squares == 0:
            return float("inf") if self.changes else 0.0
        return float((self.changes / self.squares) ** 0.5)


def _positions(value: torch.Tensor, dim: int) -> torch.Tensor:
    """[positions, features] in float64."""
    return value.double().movedim(dim, -1).reshape(-1, value.shape[dim])


@dataclass
class _Tap:
    """Observes one node: what leaves some blocks and enters others."""

    left: list[Change] = field(default_factory=list)
    entered: list[Change] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0

    def update(self, x: torch.Tensor) -> None:
        """Take in the node's value of one run."""
        for change in self.left:
            change.leave(x)
        for change in self.entered:
            change.enter(x)


def _magnitude(program: Program, layer: Layer) -> float:
    """The mean of |w| over the weights that only this layer's branches read."""
    total, count = 0.0, 0
    for name in _weights_of(program, layer):
        weight = program.tensor(name).detach()
        total += float(weight.abs().sum(dtype=torch.float64))
        count += weight.numel()
    return total / count if count else 0.0


def _weights_of(program: Program, layer: Layer) -> list[str]:
    """The stored tensors of two or more dimensions behind the branches, each once."""
    todo = [n for block in layer for node in block.nodes for n in node.all_input_nodes]
    inside = {node for block in layer for node in block.nodes}
    computed = computed_nodes(program)
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop(0)
        if node in seen or node in inside:
            continue
        seen.add(node)
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            if tensor.dim() > 1 and tensor.is_floating_point():
                found[str(node.target)] = None
        elif node not in computed:
            todo.extend(node.all_input_nodes)
    return list(found)


# -- the oracle -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkippedBranches:
    """The oracle: what the program before the pass computes with these branches adding zero.

    Every node of the unchanged program runs in float64; at each named sum, the named operand is
    put to zero.

    Attributes:
        branches: node name of a sum to the schema name of the operand that counts as zero.
    """

    branches: Mapping[str, str]

    def __call__(
        self, program: Program, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """The float64 outputs that the shortened program must have."""
        return self.trace(program, inputs)

    def trace(
        self, program: Program, inputs: Sequence[torch.Tensor], observe: Any = None
    ) -> tuple[torch.Tensor, ...]:
        """The outputs; ``observe`` sees every call with its value."""
        with torch.no_grad():
            run = _Skipping(program, observe, None, self.branches)
            return tuple(run.run(*(value.clone() for value in inputs)))


class _Skipping(Lifted):
    """A float64 run in which some operands of sums are zero."""

    def __init__(
        self, program: Program, observe: Any, exact: Any, branches: Mapping[str, str]
    ) -> None:
        super().__init__(program, observe, exact)
        self._branches = branches

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a named sum adds zero."""
        argument = self._branches.get(n.name)
        if argument is None:
            return super().run_node(n)
        values = {
            key: self.env[value] if isinstance(value, fx.Node) else value
            for key, value in bind_arguments(n).items()
        }
        values[argument] = torch.zeros_like(values[argument])
        result = values["self"] + values["alpha"] * values["other"]
        if self._observe is not None:
            self._observe(n, result)
        return result


# -- words ----------------------------------------------------------------------------------------


def _title(layer: Layer) -> str:
    """What remarks call a unit: its module, and what it is."""
    kinds = " and ".join("attention" if block.attention else "branch" for block in layer)
    names = list(dict.fromkeys(block.name for block in layer))
    return f"{' to '.join([names[0], names[-1]] if len(names) > 1 else names)} ({kinds})"


def _matches(block: ResidualBlock, glob: str) -> bool:
    return any(
        fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")
        for name in (block.path, block.add.name)
    )


def _note_hidden_sums(rw: Rewrite) -> None:
    """Say where a residual sum may hide in another spelling."""
    for node in rw.calls():
        if str(node.target) == "pruna.conv_act.default" and bind_arguments(node)["residual"]:
            rw.skip(node, "its residual sum is fused; run remove-blocks before fuse-conv-bn-relu")
        elif str(node.target) == "pruna.ffn.default" and bind_arguments(node)["residual"]:
            rw.skip(node, "its residual sum is fused; run remove-blocks before fuse-ffn")
        elif node.target is aten.add_.Tensor:
            rw.skip(node, "it adds in place; run canonicalize first")

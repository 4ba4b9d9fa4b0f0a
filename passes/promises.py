"""What compensation passes promise, as tests on the programs before and after and on the data.

Each test runs whole programs over the calibration data, batch by batch, and compares what their
layers yield: it neither reads the sums that the pass gathered nor steps as the pass does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pruna_ir.call import Call
from pruna_ir.errors import VerificationError
from pruna_ir.passes.fitting import Aim, aims
from pruna_ir.passes.layer_inputs import batches_of, observed
from pruna_ir.passes.least_squares import Moments, ridge
from pruna_ir.passes.linear_layers import Layer, Tail, tail
from pruna_ir.passes.norm_statistics import normed, survivors_of
from pruna_ir.program import Origin, Program, shape_of
from pruna_ir.transform import Context, Finding

ROUNDING_STEPS = 64
"""How many units in the last place of the program's precision a fitted figure may be off."""


def rounding_limit(dtype: torch.dtype) -> float:
    """The largest relative deviation that counts as rounding at a precision."""
    return ROUNDING_STEPS * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Untouched:
    """Every tensor but those named is, bit for bit, what it was."""

    changed: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """The number of other tensors that differ, which must be 0."""
        old = before.tensors()
        others = [
            name
            for name, tensor in after.tensors().items()
            if name not in self.changed
            and (name not in old or not torch.equal(tensor, old[name]))
        ]
        what = f"tensors that must stay{': ' + ', '.join(others[:3]) if others else ''}"
        return [Finding(what, float(len(others)), 0.0)]


@dataclass(frozen=True)
class MeansAgree:
    """The mean of each output channel of some layers is that of the program they stem from.

    Attributes:
        layers: node names.
        every: they need not have lost inputs.
    """

    layers: tuple[str, ...]
    every: bool = False

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """One figure a layer: the largest difference of means over the values' magnitude."""
        return [
            Finding(
                f"means of {aim.layer.node.name}",
                mean.relative(),
                rounding_limit(aim.layer.node.meta["val"].dtype),
            )
            for aim, mean in _followed(self, after, context)
        ]


@dataclass(frozen=True)
class StatisticsAgree:
    """The running statistics of some batch norms are those of what arrives there.

    The mean and biased variance of the data are recomputed in two passes per norm. Deviations are
    relative to the standard deviation and to the magnitude of each channel.

    Attributes:
        norms: node names.
    """

    norms: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """One figure a norm: the largest deviation of a mean or a variance."""
        nodes = [node for node in after.calls() if node.name in self.norms]
        inputs = [Call(after, node).arg("input") for node in nodes]
        sums = [_Sums() for _ in nodes]
        for batch in _batches(after, context):
            seen = observed(after, batch, inputs)
            for source, total in zip(inputs, sums, strict=True):
                total.update(seen[source])
        return [
            Finding(
                f"statistics of {node.name}",
                total.deviation(*_stored(after, node)),
                rounding_limit(_stored(after, node)[1].dtype),
            )
            for node, total in zip(nodes, sums, strict=True)
        ]


def _stored(program: Program, norm: fx.Node) -> tuple[Tensor, Tensor]:
    names = normed(program, norm)
    if isinstance(names, str):
        raise VerificationError(f"{norm.name}: {names}")
    return program.tensor(names[0]), program.tensor(names[1])


@dataclass(frozen=True)
class OutputsAgree:
    """What leaves some batch norms has the mean and variance that it has in the unpruned program.

    Channels whose stored variance reached 0, and those that do not vary, are compared by their
    means alone.

    Attributes:
        norms: node names.
    """

    norms: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """One figure a norm: the largest deviation of a mean or a variance."""
        origin = _origin(after)
        now = [node for node in after.calls() if node.name in self.norms]
        was = [node for node in origin.program.calls() if node.name in self.norms]
        pairs = [(_Sums(), _Sums()) for _ in now]
        for batch in _batches(after, context):
            new, old = observed(after, batch, now), observed(origin.program, batch, was)
            for a, b, (ours, theirs) in zip(now, was, pairs, strict=True):
                ours.update(new[a])
                kept = survivors_of(origin, b, after, a)
                theirs.update(old[b] if kept is None else old[b].index_select(1, kept))
        return [
            Finding(
                f"output of {node.name}",
                ours.deviation(*_compared(after, node, ours, theirs)),
                rounding_limit(node.meta["val"].dtype),
            )
            for node, (ours, theirs) in zip(now, pairs, strict=True)
        ]


def _compared(
    after: Program, norm: fx.Node, ours: _Sums, theirs: _Sums
) -> tuple[Tensor, Tensor]:
    """The unpruned mean and variance; our own variance where it cannot be made to agree."""
    stored = Call(after, norm).parameter("running_var")
    assert stored is not None
    (_, var), (mean, wanted) = ours.moments(), theirs.moments()
    fixed = (stored.detach().cpu() <= 0) | (var <= 0) | (wanted <= 0)
    return mean, torch.where(fixed, var, wanted)


class _Sums:
    """Sums of values and of squares per channel, about the first batch's mean."""

    def __init__(self) -> None:
        self._about: Tensor | None = None
        self._count = 0
        self._sum = self._square = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        """Take in one batch of a norm's input."""
        rows = x.double().transpose(0, 1).flatten(1).cpu()
        if self._about is None:
            self._about = rows.mean(1, keepdim=True)
            self._sum = self._square = torch.zeros(len(rows), dtype=torch.float64)
        rows = rows - self._about
        self._count += rows.shape[1]
        self._sum = self._sum + rows.sum(1)
        self._square = self._square + rows.square().sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean and the biased variance of each channel."""
        assert self._about is not None
        offset = self._sum / self._count
        return self._about[:, 0] + offset, self._square / self._count - offset.square()

    def deviation(self, mean: Tensor, var: Tensor) -> float:
        """The largest difference of a mean or variance from these, relative to the magnitude."""
        own_mean, own_var = self.moments()
        size = (own_mean.square() + own_var).sqrt().clamp_min(1e-30)
        of_mean = (mean.detach().double().cpu() - own_mean).abs() / size
        of_var = (var.detach().double().cpu() - own_var).abs() / size.square()
        return _larger(float(of_mean.max()), float(of_var.max()))


class _Mean:
    """The mean difference of two values per channel, and their magnitude."""

    def __init__(self, aim: Aim) -> None:
        self._aim = aim
        self._sum = torch.zeros(len(aim.kept), dtype=torch.float64)
        self._square = torch.zeros(len(aim.kept), dtype=torch.float64)
        self._count = 0

    def update(self, own: Tensor, now: Tensor, was: Tensor) -> None:
        """Take in a batch: the layer's own output, and both ends."""
        wanted = self._aim.survivors(was)
        scale = self._aim.scale
        self._sum += self._per_channel(now.double() - wanted.double())
        self._square += self._per_channel(wanted.double().square())
        self._square += self._per_channel(own.double().square()) * scale.square()
        self._count += now.numel() // len(self._sum)

    def _per_channel(self, value: Tensor) -> Tensor:
        return value.movedim(self._aim.layer.channel_dim, -1).flatten(0, -2).sum(0).cpu()

    def relative(self) -> float:
        """The largest mean difference of a channel over the root mean square of the layer."""
        magnitude = float((self._square / self._count).mean().sqrt())
        error = float((self._sum / self._count).abs().max())
        return error / magnitude if magnitude > 0 else error


def _followed(
    test: MeansAgree, after: Program, context: Context
) -> list[tuple[Aim, _Mean]]:
    origin = _origin(after)
    chosen = [
        aim
        for aim in aims(after, origin, residual=False, every=test.every)
        if isinstance(aim, Aim) and aim.layer.node.name in test.layers
    ]
    means = [_Mean(aim) for aim in chosen]
    for inputs in _batches(after, context):
        nodes = [n for a in chosen for n in (a.layer.node, _last(a, now=True))]
        now = observed(after, inputs, nodes)
        was = observed(origin.program, inputs, [_last(a, now=False) for a in chosen])
        for aim, mean in zip(chosen, means, strict=True):
            mean.update(now[aim.layer.node], now[_last(aim, now=True)], was[_last(aim, now=False)])
    return list(zip(chosen, means, strict=True))


@dataclass(frozen=True)
class Fit:
    """What layers are fitted to; see `reconstruct_consumers.ReconstructConsumers`."""

    damping: float
    positions: int
    residual: bool
    every: bool


def positions_of(fit: Fit, rows: int, samples: int, seed: int) -> Tensor:
    """The positions of a batch that a layer is fitted to, int64, sorted.

    >>> positions_of(Fit(0.01, 2, True, False), rows=32, samples=2, seed=0).shape
    torch.Size([4])
    """
    wanted = fit.positions * samples
    if not fit.positions or wanted >= rows:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows, generator=generator)[:wanted].sort().values


@dataclass(frozen=True)
class LeastSquares:
    """Some layers are fitted as well as they can be, and no worse than before.

    For each layer, with r what its output lacks at the positions fitted to and D the change of its
    weights, two figures: the squared error over that with the old weights on the same inputs,
    which must not be above 1, and how far the normal equations ``sum r x^T = ridge D`` and
    ``sum r = 0`` are from holding, relative to the magnitudes of outputs and inputs.

    Attributes:
        layers: node names.
        fit: what they were fitted to.
    """

    layers: tuple[str, ...]
    fit: Fit

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """Two figures a layer."""
        origin = _origin(after)
        found = aims(after, origin, residual=self.fit.residual, every=self.fit.every)
        chosen = [a for a in found if isinstance(a, Aim) and a.layer.node.name in self.layers]
        tests = [_Fitted(aim, before) for aim in chosen]
        for number, inputs in enumerate(_batches(after, context)):
            nodes = [n for a in chosen for n in (a.layer.node, a.layer.input, _last(a, now=True))]
            now = observed(after, inputs, nodes)
            was = observed(origin.program, inputs, [_last(a, now=False) for a in chosen])
            for aim, test in zip(chosen, tests, strict=True):
                seed = context.seed + number
                test.update(self.fit, seed, now, was[_last(aim, now=False)])
        return [f for test in tests for f in test.findings(self.fit)]


class _Fitted:
    """The sums over positions by which one layer's fit is judged."""

    def __init__(self, aim: Aim, before: Program) -> None:
        self._aim, layer = aim, aim.layer
        self._old = before.tensor(str(layer.weight.target)).detach()
        self._new = layer.program.tensor(str(layer.weight.target)).detach()
        self._shift = _constant(layer, aim.now) - _constant_before(aim, before)
        self._moments = Moments()
        self._error = self._old_error = self._power = 0.0

    def update(
        self, fit: Fit, seed: int, now: dict[fx.Node, Tensor], was: Tensor
    ) -> None:
        """Take in a batch: the pruned program's values, and the end of the unpruned tail."""
        layer = self._aim.layer
        x, y = now[layer.input], now[layer.node]
        lacking = layer.rows(self._aim.lacking(now[_last(self._aim, now=True)], was))
        chosen = positions_of(fit, len(lacking), len(x), seed).to(x.device)
        patches, r = layer.patches(x, chosen).double(), lacking[chosen]
        change = layer.matrix(self._new.double()) - layer.matrix(self._old.double())
        moved = torch.einsum("pgk,gok->pgo", patches, change) + self._shift
        self._moments.update(patches, r)
        self._error += float(r.square().sum())
        self._old_error += float((r + moved).square().sum())
        ends = layer.rows(self._aim.lacking(torch.zeros_like(y), was))
        self._power += float(layer.rows(y)[chosen].double().square().sum())
        self._power += float(ends[chosen].square().sum())
        self._change = change

    def findings(self, fit: Fit) -> list[Finding]:
        """What was found, once every batch was taken in."""
        name, seen = self._aim.layer.node.name, self._moments
        limit = rounding_limit(self._new.dtype)
        slack = limit * self._power
        ratio = self._error / (self._old_error + slack) if self._old_error + slack else 0.0
        diagonal = seen.xx.diagonal(dim1=-2, dim2=-1)
        pull = ridge(diagonal.mean(1), fit.damping)[:, None, None] * self._change.cpu()
        size = math.sqrt(float(diagonal.max()) * (self._power + self._error)) or 1.0
        slope = float((seen.xe.mT - pull).abs().max()) / size
        spread = math.sqrt((self._power + self._error) / seen.count) or 1.0
        mean = float(seen.mean_e.abs().max()) / spread
        return [
            Finding(f"error of {name} over that with its old weights", ratio, 1.0),
            Finding(f"normal equations of {name}", _larger(slope, mean), limit),
        ]


def _constant_before(aim: Aim, before: Program) -> Tensor:
    node = next(n for n in before.calls() if n.name == aim.layer.node.name)
    return _constant(Layer(before, node), tail(before, node, residual=False))


def _constant(layer: Layer, after: Tail) -> Tensor:
    """All that is added to a layer's output, in its units: [groups, outputs] float64."""
    channels = int((shape_of(layer.node) or ())[layer.channel_dim])
    program, total = layer.program, torch.zeros(channels, dtype=torch.float64)
    if layer.bias is not None:
        total = total + program.tensor(str(layer.bias.target)).detach().double()
    if after.norm is not None:
        mean = Call(program, after.norm).parameter("running_mean")
        assert mean is not None
        total = total - mean.detach().double()
    if after.addition is not None:
        call = Call(program, after.addition)
        first = call.producer("self") is layer.node
        found = call.parameter("other" if first else "self")
        assert found is not None
        total = total + found.detach().double()
    return total.reshape(layer.groups, -1)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _last(aim: Aim, *, now: bool) -> fx.Node:
    nodes = aim.now.nodes if now else aim.was.nodes
    return nodes[-1] if nodes else (aim.layer if now else aim.counterpart).node


def _origin(program: Program) -> Origin:
    if program.origin is None:
        raise VerificationError("the program lost its origin, with which it must be compared")
    return program.origin


def _batches(program: Program, context: Context) -> list[tuple[Tensor, ...]]:
    if context.data is None:
        raise VerificationError("the calibration data that the pass was fitted to is not there")
    return batches_of(program, context.data)

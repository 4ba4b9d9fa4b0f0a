"""Round weights so that later columns make up for what earlier ones lost (GPTQ).

    linear(x, fake_quant(W))   -->   linear(x, fake_quant(W'))     W' on the grid, W' x near W x

For each matrix product whose weight is a constant on a grid (left by quantize-weights or
insert-fake-quant), the float weight is replaced by grid points that minimise the error of the
product over calibration data, given what the already rounded layers before it yield. Scales and
zero points stay; see `optimal_rounding` for the algorithm and its source.

Promise (checked): every touched weight is on its grid, the squared error of each touched product
over the calibration data, against its float weight on the same inputs, is not above that of
rounding to nearest, and nothing else changed.

Limits: convolutions are left alone, and so are weights that several nodes read. Memory: all
batches at once (`layer_inputs.Frontier`) and [inputs, inputs] float64 for a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.calibration import layer_name
from pruna_ir.errors import UsageError, VerificationError
from pruna_ir.passes.layer_inputs import Frontier, batches_of, calibration_inputs, observed
from pruna_ir.passes.optimal_rounding import errors, gptq, rounded
from pruna_ir.passes.promises import Untouched
from pruna_ir.passes.weight_blocks import PRODUCTS, StoredWeight, stored_weight
from pruna_ir.program import Program
from pruna_ir.transform import Context, Effect, Finding, Pass, Rewrite

_CHUNK = 1 << 22
"""Elements of inputs that are lifted to float64 at a time."""


@dataclass(frozen=True)
class CompensateRounding(Pass):
    """Replace quantised weights by grid points whose products err least over calibration data.

    Options:
        damping: the ridge relative to the mean diagonal of the inputs' second moments, above 0.
        act_order: round the inputs that carry most first, not in their stored order.
        max_inputs: the largest number of inputs of a layer; time grows with its cube.

    Requires: weights on grids (quantize-weights before it) and calibration data.

    Raises:
        UsageError: there is no calibration data, or an option is out of its range.
    """

    name: ClassVar[str] = "compensate-rounding"
    effect: ClassVar[Effect] = Effect.FITTED

    damping: float = 0.01
    act_order: bool = True
    max_inputs: int = 16384

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UsageError(f"{self.name}: damping must be above 0, not {self.damping}")
        if self.max_inputs < 1:
            raise UsageError(f"{self.name}: max_inputs must be at least 1, not {self.max_inputs}")

    def rewrite(self, rw: Rewrite) -> None:
        """Walk the program once; round each weight before anything reads it."""
        rw.set_origin(rw.before.origin)
        batches = calibration_inputs(rw, self.name)
        chosen = [w for w in _weights(rw.program) if rw.in_scope(w.node) and self._accepts(rw, w)]
        frontier = Frontier(rw.program, batches)
        grams = _Grams(frontier)
        changed: list[str] = []
        for number, weight in enumerate(chosen):
            rw.context.progress("compensating rounding", number, len(chosen))
            frontier.reach(weight.first)
            changed.append(self._round(rw, weight, grams.of(weight)))
        if chosen:
            rw.context.progress("compensating rounding", len(chosen), len(chosen))
            names = tuple(weight.node.name for weight in chosen)
            rw.assure(OnGrid(names))
            rw.assure(NotWorse(names))
            rw.assure(Untouched(tuple(changed)))

    def _accepts(self, rw: Rewrite, weight: StoredWeight) -> bool:
        """Whether a weight can be rounded anew; says why not."""
        inputs = weight.layer.input.meta["val"].shape[-1]
        reason = ""
        if others := sorted(_readers(rw.program, weight) - {weight.first.name}):
            reason = f"its weight is also read by {', '.join(others)}"
        elif not weight.layer.input < weight.first:
            reason = f"its weight is rounded before {weight.layer.input.name} is computed"
        elif inputs > self.max_inputs:
            reason = f"it has {inputs} inputs, more than max_inputs={self.max_inputs}"
        if reason:
            rw.skip(weight.node, f"rounded to nearest: {reason}")
        return not reason

    def _round(self, rw: Rewrite, weight: StoredWeight, gram: Tensor) -> str:
        """Round one weight; returns the name of the tensor that changed."""
        if not bool(torch.isfinite(gram).all()):
            raise rw.error(weight.node, "the calibration data drives its input to inf or NaN")
        grid, float_weight = weight.grid, weight.weight()
        scale, zero = weight.parameters()
        found = gptq(
            float_weight, scale, zero, grid.qmin, grid.qmax, gram,
            damping=self.damping, act_order=self.act_order,
        )  # fmt: skip
        nearest = rounded(float_weight, scale, zero, grid.qmin, grid.qmax)
        was, now = (float(errors(float_weight, q, gram).sum()) for q in (nearest, found))
        gain = 1 - now / was if was > 0 else 0.0
        rw.applied(weight.node, f"{layer_name(weight.node)}: {gain:.0%} less error of its product")
        name = str(weight.source.target)
        # The operator's own arithmetic: the point of the grid in float32, bit for bit.
        levels = torch.round(found / scale)
        exact = levels.float() * scale.float()
        rw.set_tensor(name, weight.stored(exact.to(rw.program.tensor(name).dtype)))
        return name


def _weights(program: Program) -> Iterator[StoredWeight]:
    for node in program.calls(*PRODUCTS):
        found = stored_weight(program, node)
        if found is not None:
            yield found


def _readers(program: Program, weight: StoredWeight) -> set[str]:
    """What reads the parameter, or anything between it and the product."""
    reads = program.graph.find_nodes(op="get_attr", target=weight.source.target)
    found = {user.name for get in reads for user in get.users}
    between = [node for node in weight.path() if len(node.users) > 1]
    return found | {user.name for node in between for user in node.users}


class _Grams:
    """The sums of x x^T at a frontier; the last one is kept, for layers that share their input."""

    def __init__(self, frontier: Frontier) -> None:
        self._frontier = frontier
        self._last: tuple[fx.Node, Tensor] | None = None

    def of(self, weight: StoredWeight) -> Tensor:
        """The sum over all positions of all batches, [inputs, inputs] float64."""
        source = weight.layer.input
        if self._last is None or self._last[0] is not source:
            self._last = (source, gram(self._frontier.values(source)))
        return self._last[1]


def gram(values: Sequence[Tensor]) -> Tensor:
    """The sum of x x^T over all rows of some tensors [..., inputs], float64.

    >>> gram([torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.0, 1.0]]])]).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = values[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64, device=values[0].device)
    for value in values:
        for rows in torch.split(value.reshape(-1, size), max(1, _CHUNK // max(1, size))):
            lifted = rows.double()
            total += lifted.mT @ lifted
    return total


@dataclass(frozen=True)
class OnGrid:
    """The stored weights of some products are points of their grids, bit for bit.

    Attributes:
        layers: node names.
    """

    layers: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """The number of elements that rounding still changes, for each product: 0."""
        return [
            Finding(
                f"elements of {w.node.name} off its grid",
                float((w.weight() != w.rounded()).sum()),
                0.0,
            )
            for w in _named(after, self.layers)
        ]


@dataclass(frozen=True)
class NotWorse:
    """The products of some layers err no more over the data than with weights rounded to nearest.

    Attributes:
        layers: node names.
    """

    layers: tuple[str, ...]

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """For each product its squared error over that of rounding to nearest, at most 1."""
        if context.data is None:
            raise VerificationError("the calibration data that the pass was fitted to is missing")
        new, old = list(_named(after, self.layers)), list(_named(before, self.layers))
        sums = [[0.0, 0.0] for _ in new]
        changes = [
            (b.weight() - a.rounded(), b.weight() - b.rounded())
            for a, b in zip(new, old, strict=True)
        ]
        for inputs in batches_of(after, context.data):
            seen = observed(after, inputs, [weight.layer.input for weight in new])
            for weight, pair, total in zip(new, changes, sums, strict=True):
                rows = seen[weight.layer.input].double().flatten(0, -2)
                for which, change in enumerate(pair):
                    total[which] += float((rows @ change.mT).square().sum())
        return [
            Finding(f"error of {weight.node.name} over nearest rounding's", _ratio(*total), 1.0)
            for weight, total in zip(new, sums, strict=True)
        ]


def _ratio(now: float, nearest: float) -> float:
    # Equal roundings differ by nothing but the order of sums.
    return now / (nearest * (1 + 1e-9)) if nearest else now


def _named(program: Program, names: tuple[str, ...]) -> Iterator[StoredWeight]:
    return (weight for weight in _weights(program) if weight.node.name in names)

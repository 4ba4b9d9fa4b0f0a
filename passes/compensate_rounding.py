"""Round weights so that later columns make up for what earlier ones lost (GPTQ).

    linear(x, fake_quant(W))   -->   linear(x, fake_quant(W'))     W' on the grid, W' x near W x

For each matrix product whose weight is a constant on a grid (left by quantize-weights or
insert-fake-quant), the float weight is replaced by grid points that minimise the error of the
product over calibration data, and the grid's scales by those that suit these points best. Zero
points stay. The product is to yield what it yields in the float program, though the already
rounded layers before it feed it something else. See `optimal_rounding` for the algorithms and the
source of GPTQ's.

Promise (checked): every touched weight is on its grid, the squared error of each touched product
over the calibration data is not above that of rounding to nearest on the given grid, and nothing
but these weights and their scales changed.

Limits: convolutions are left alone, and so are weights that several nodes read, and weights on
their grid already, whose float values are gone. Scales that several rows share stay. Memory: all
batches at once, twice (`layer_inputs.Frontier`), and a few [inputs, inputs] float64 for a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.calibration import layer_name
from pruna_ir.call import bind_arguments
from pruna_ir.errors import UsageError, VerificationError
from pruna_ir.passes.layer_inputs import (
    Frontier,
    Inputs,
    batches_of,
    calibration_inputs,
    observed,
)
from pruna_ir.passes.linear_layers import FORMS
from pruna_ir.passes.optimal_rounding import Objective, Rounding, fitted, rounded
from pruna_ir.passes.promises import Untouched
from pruna_ir.passes.weight_blocks import PRODUCTS, StoredWeight, stored_weight
from pruna_ir.program import Program, shape_of
from pruna_ir.transform import Context, Effect, Finding, Pass, Rewrite

_CHUNK = 1 << 22
"""Elements of inputs that are lifted to float64 at a time."""


@dataclass(frozen=True)
class CompensateRounding(Pass):
    """Replace quantised weights by grid points whose products err least over calibration data.

    Options:
        damping: the ridge relative to the mean diagonal of the inputs' second moments, above 0.
        act_order: round the inputs that carry most first, not in their stored order.
        refits: how often scales are fitted to the rounded weights, and those rounded anew; 0
            leaves scales as they are.
        follow: aim at what the product yields in the float program; otherwise at what the float
            weight makes of the inputs that the rounded layers before it yield.
        max_inputs: the largest number of inputs of a layer; time grows with its cube.

    Requires: weights on grids (quantize-weights before it) and calibration data.

    Raises:
        UsageError: there is no calibration data, or an option is out of its range.
    """

    name: ClassVar[str] = "compensate-rounding"
    effect: ClassVar[Effect] = Effect.FITTED

    damping: float = 0.01
    act_order: bool = True
    refits: int = 2
    follow: bool = True
    max_inputs: int = 16384

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UsageError(f"{self.name}: damping must be above 0, not {self.damping}")
        if self.refits < 0:
            raise UsageError(f"{self.name}: refits must be at least 0, not {self.refits}")
        if self.max_inputs < 1:
            raise UsageError(f"{self.name}: max_inputs must be at least 1, not {self.max_inputs}")

    def rewrite(self, rw: Rewrite) -> None:
        """Walk the program once; round each weight before anything reads it."""
        rw.set_origin(rw.before.origin)
        batches = calibration_inputs(rw, self.name)
        chosen = [w for w in _weights(rw.program) if rw.in_scope(w.node) and self._accepts(rw, w)]
        moments = _Moments(rw, batches, follow=self.follow)
        changed: list[str] = []
        for number, weight in enumerate(chosen):
            rw.context.progress("compensating rounding", number, len(chosen))
            changed += self._round(rw, weight, moments.of(weight))
        if chosen:
            rw.context.progress("compensating rounding", len(chosen), len(chosen))
            names = tuple(weight.node.name for weight in chosen)
            rw.assure(OnGrid(names))
            rw.assure(NotWorse(names, self.follow))
            rw.assure(Untouched(tuple(changed)))

    def _accepts(self, rw: Rewrite, weight: StoredWeight) -> bool:
        """Whether a weight can be rounded anew; says why not."""
        inputs = weight.layer.input.meta["val"].shape[-1]
        reason = ""
        if others := sorted(_readers(rw.program, weight) - {weight.first.name}):
            reason = f"its weight is also read by {', '.join(others)}"
        elif not weight.layer.input < weight.first:
            reason = f"its weight is rounded before {weight.layer.input.name} is computed"
        elif torch.equal(weight.weight(), weight.rounded()):
            reason = "its weight is on its grid already, and its float values are gone"
        elif inputs > self.max_inputs:
            reason = f"it has {inputs} inputs, more than max_inputs={self.max_inputs}"
        if reason:
            rw.skip(weight.node, f"rounded to nearest: {reason}")
        return not reason

    def _round(self, rw: Rewrite, weight: StoredWeight, objective: Objective) -> list[str]:
        """Round one weight; returns the names of the tensors that changed."""
        if not bool(torch.isfinite(objective.gram).all()):
            raise rw.error(weight.node, "the calibration data drives its input to inf or NaN")
        grid, block = weight.grid, _own_block(weight)
        scale, zero = weight.parameters()
        found = fitted(
            objective, scale, zero, grid.qmin, grid.qmax, damping=self.damping,
            act_order=self.act_order, refits=self.refits if block else 0, block=block or 1,
        )  # fmt: skip
        nearest = rounded(objective.weight, scale, zero, grid.qmin, grid.qmax)
        was, now = (float(objective.errors(q).sum()) for q in (nearest, found.matrix))
        gain = 1 - now / was if was > 0 else 0.0
        rw.applied(weight.node, f"{layer_name(weight.node)}: {gain:.0%} less error of its product")
        names = [_set_weight(rw, weight, found)]
        return [*names, _set_scale(rw, weight, found)] if block and self.refits else names


def _own_block(weight: StoredWeight) -> int:
    """How many inputs share a scale that only this weight has; 0 where others have it too."""
    source = bind_arguments(weight.fake)["scale"]
    reads = weight.program.graph.find_nodes(op="get_attr", target=source.target)
    alone = {user for get in reads for user in get.users} == {weight.fake}
    return weight.block() if alone else 0


def _set_weight(rw: Rewrite, weight: StoredWeight, found: Rounding) -> str:
    name = str(weight.source.target)
    # The operator's own arithmetic: the point of the grid in float32, bit for bit.
    exact = found.levels.float() * found.scale.float()
    rw.set_tensor(name, weight.stored(exact.to(rw.program.tensor(name).dtype)))
    return name


def _set_scale(rw: Rewrite, weight: StoredWeight, found: Rounding) -> str:
    name = str(bind_arguments(weight.fake)["scale"].target)
    old = rw.program.tensor(name).detach()
    new = old.clone().reshape(-1)
    new[weight.numbers().reshape(-1)] = found.scale.to(old.dtype).reshape(-1)
    rw.set_tensor(name, new.reshape(old.shape))
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


class _Moments:
    """What products read, here and in the float program; the last is kept, for shared inputs."""

    def __init__(self, rw: Rewrite, batches: Sequence[Inputs], *, follow: bool) -> None:
        self._rw, self._follow = rw, follow
        self._here = Frontier(rw.program, batches)
        origin = rw.before.origin if follow else None
        self._float = None if origin is None else Frontier(origin.program, batches)
        self._counterparts = counterparts(rw.before) if follow else {}
        self._last: tuple[tuple[fx.Node, fx.Node | None], tuple[Tensor, ...]] | None = None

    def of(self, weight: StoredWeight) -> Objective:
        """What the rounding of a weight is to minimise; to be asked in the program's order."""
        self._here.reach(weight.first)
        source, twin = weight.layer.input, self._counterparts.get(weight.node.name)
        if self._float is not None and twin is not None:
            self._float.reach(twin)
        elif self._follow:
            self._rw.note(weight.node, "the float program has no such product to follow")
        was = None if twin is None else product_input(twin)
        if self._last is None or self._last[0] != (source, was):
            self._last = ((source, was), self._sums(source, was))
        return Objective(weight.weight(), *self._last[1])

    def _sums(self, source: fx.Node, was: fx.Node | None) -> tuple[Tensor, ...]:
        here = self._here.values(source)
        if was is None or self._float is None:
            return (gram(here),)
        lost = [
            f.reshape(x.shape) - x for f, x in zip(self._float.values(was), here, strict=True)
        ]
        return gram(here), gram(lost, here), gram(lost)


def counterparts(program: Program) -> dict[str, fx.Node]:
    """The products of the program that this one was rounded from, by the names of nodes.

    Those that read a tensor of another size are left out.
    """
    if program.origin is None:
        return {}
    was = {node.name: node for node in program.origin.program.calls(*PRODUCTS)}
    return {
        node.name: was[node.name]
        for node in program.calls(*PRODUCTS)
        if node.name in was
        and shape_of(product_input(was[node.name])) == shape_of(product_input(node))
    }


def product_input(node: fx.Node) -> fx.Node:
    """What a product reads beside its weight."""
    source = bind_arguments(node)[FORMS[node.target].input]
    assert isinstance(source, fx.Node)
    return source


def gram(left: Sequence[Tensor], right: Sequence[Tensor] | None = None) -> Tensor:
    """The sum of a b^T over all rows of some tensors [..., inputs], float64; b is a by default.

    >>> gram([torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.0, 1.0]]])]).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = left[0].shape[-1]
    total = torch.zeros(size, size, dtype=torch.float64, device=left[0].device)
    step = max(1, _CHUNK // max(1, size))
    for first, second in zip(left, left if right is None else right, strict=True):
        pairs = (torch.split(value.reshape(-1, size), step) for value in (first, second))
        for a, b in zip(*pairs, strict=True):
            total += a.double().mT @ b.double()
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
        follow: whether what they err from is the float program's product.
    """

    layers: tuple[str, ...]
    follow: bool = False

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """For each product its squared error over that of rounding to nearest, at most 1."""
        if context.data is None:
            raise VerificationError("the calibration data that the pass was fitted to is missing")
        new, old = list(_named(after, self.layers)), list(_named(before, self.layers))
        twins = counterparts(before) if self.follow else {}
        sums = [[0.0, 0.0] for _ in new]
        for inputs in batches_of(after, context.data):
            seen = observed(after, inputs, [weight.layer.input for weight in new])
            was = _observed_in_origin(before, inputs, twins)
            for weight, nearest, total in zip(new, old, sums, strict=True):
                rows = seen[weight.layer.input].double().flatten(0, -2)
                truth = was.get(weight.node.name, rows).reshape(rows.shape) @ nearest.weight().mT
                for which, stands in enumerate((weight, nearest)):
                    total[which] += float((rows @ stands.rounded().mT - truth).square().sum())
        return [
            Finding(f"error of {weight.node.name} over nearest rounding's", _ratio(*total), 1.0)
            for weight, total in zip(new, sums, strict=True)
        ]


def _observed_in_origin(
    program: Program, inputs: Inputs, twins: Mapping[str, fx.Node]
) -> dict[str, Tensor]:
    """What products read in the float program, by name, float64."""
    if program.origin is None or not twins:
        return {}
    sources = {name: product_input(node) for name, node in twins.items()}
    seen = observed(program.origin.program, inputs, list(sources.values()))
    return {name: seen[source].double() for name, source in sources.items()}


def _ratio(now: float, nearest: float) -> float:
    # Equal roundings differ by nothing but the order of sums.
    return now / (nearest * (1 + 1e-9)) if nearest else now


def _named(program: Program, names: tuple[str, ...]) -> Iterator[StoredWeight]:
    return (weight for weight in _weights(program) if weight.node.name in names)

"""What insert-fake-quant promises, as tests on the programs before and after.

`Bypassed`: fake-quants are all that was inserted. Without them the program is the one before, bit
for bit: the same operators, arguments and tensors.

`OnGrid`: each inserted fake-quant has the grid that its reader was promised: the bits, the sign
and zero points of the target, powers of two where asked for, one scale or one for each channel of
the right axis.

`WeightErrors`: rounding costs a weight no more than its grid says: no value that its grid reaches
is off by more than half a step, and with ``minmax`` the grid reaches them all; with ``mse`` the
squared error of no scale is above that of ``minmax``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.kernels.fake_quant import fake_quant_reference
from pruna_ir.passes.quant_placement import KINDS, is_quantised
from pruna_ir.program import Program
from pruna_ir.quantization import SMALLEST_SCALE, Grid, power_of_two
from pruna_ir.transform import Context, Finding, Rewrite

HALF_STEP = 0.5 + 2.0**-20
"""Half a step, and the rounding of a float32 scale; in steps."""


def inserted(before: Program, after: Program) -> list[fx.Node]:
    """The fake-quants of the new program that the old one has not."""
    old = {node.name for node in before.calls() if is_quantised(node)}
    return [node for node in after.calls() if is_quantised(node) and node.name not in old]


@dataclass(frozen=True)
class Bypassed:
    """Without the inserted fake-quants, the program is the one before.

    Attributes:
        spelt_out: names of fused convolutions that were spelt out first.
    """

    spelt_out: tuple[str, ...] = ()

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:
        """Whether the two differ, which they must not."""
        old = Rewrite(before, "spell out", context)
        for node in list(old.program.calls(CONV_ACT.op)):
            if node.name in self.spelt_out:
                old.inline(node, CONV_ACT.reference, bind_arguments(node))
        new = Rewrite(after, "bypass", context)
        names = {node.name for node in inserted(before, after)}
        for node in list(new.program.calls()):
            if node.name in names:
                source = new.call(node).producer("x")
                if source is not None:
                    new.replace(node, source)
        wanted = replace(old.finish(), attributes={}).hash()
        found = replace(new.finish(), attributes={}).hash()
        what = "differences from the program before, with all fake-quants taken out"
        return [Finding(what, float(wanted != found), 0.0)]


@dataclass(frozen=True)
class OnGrid:
    """Every inserted fake-quant is on the grid that was promised.

    Attributes:
        weights: the grid of each layer's weight, by the layer's name.
        activations: the grids of each reader's inputs, by the reader's name.
        per_channel: whether weights have a scale for each output channel.
    """

    weights: Mapping[str, Grid]
    activations: Mapping[str, frozenset[Grid]]
    per_channel: bool

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """How many fake-quants are not, and how many weights have none; both must be 0."""
        found = inserted(before, after)
        wrong = [
            f"{fake.name} of {reader.name}"
            for fake in found
            for reader in fake.users
            if not self._fits(after, fake, reader)
        ]
        layers = {node.name: node for node in after.calls() if node.name in self.weights}
        bare = [name for name in self.weights if not _has_quantised_weight(after, layers, name)]
        return [
            Finding(f"fake-quants off their grid{_some(wrong)}", float(len(wrong)), 0.0),
            Finding(f"weights without a fake-quant{_some(bare)}", float(len(bare)), 0.0),
        ]

    def _fits(self, program: Program, fake: fx.Node, reader: fx.Node) -> bool:
        call = Call(program, fake)
        scale, zero = call.parameter("scale"), call.parameter("zero_point")
        if scale is None or zero is None or not _usable(scale):
            return False
        bounds = int(call.number("qmin")), int(call.number("qmax"))
        weight = call.parameter("x")
        if weight is None:
            grids = self.activations.get(reader.name, frozenset())
            return call.arg("axis") is None and _on_one_of(grids, bounds, scale, zero)
        grid = self.weights.get(reader.name)
        if grid is None or not _on_one_of({grid}, bounds, scale, zero):
            return False
        axis = KINDS[reader.target].axis % weight.dim()
        return bool(call.arg("axis") == (axis if self.per_channel else None))


def _some(names: list[str]) -> str:
    return f": {', '.join(names[:3])}" if names else ""


def _usable(scale: torch.Tensor) -> bool:
    return bool(torch.isfinite(scale).all() and (scale >= SMALLEST_SCALE).all())


def _on_one_of(
    grids: frozenset[Grid] | set[Grid],
    bounds: tuple[int, int],
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> bool:
    inside = bool((zero >= bounds[0]).all() and (zero <= bounds[1]).all())
    return inside and any(
        (grid.qmin, grid.qmax) == bounds
        and (not grid.symmetric or not zero.any())
        and (not grid.powers or _is_exact(scale.double(), zero))
        for grid in grids
    )


def _is_exact(scale: torch.Tensor, zero: torch.Tensor) -> bool:
    return torch.equal(power_of_two(scale), scale) and not bool((zero % 2).any())


def _has_quantised_weight(program: Program, layers: Mapping[str, fx.Node], name: str) -> bool:
    layer = layers.get(name)
    if layer is None:
        return False
    source = Call(program, layer).producer(KINDS[layer.target].weight)
    return source is not None and is_quantised(source)


@dataclass(frozen=True)
class WeightErrors:
    """No weight loses more than its grid says.

    Attributes:
        method: how the scales were chosen, ``minmax`` or ``mse``.
        powers: whether scales are powers of two.
    """

    method: str
    powers: bool = False

    def __call__(self, before: Program, after: Program, context: Context) -> list[Finding]:  # noqa: ARG002
        """The worst weight's largest error in steps, and with mse its error over minmax's."""
        findings = []
        for weight, call in _weights(before, after):
            findings += self._of(weight, call)
        return [max(found, key=lambda f: f.measured / f.limit) for found in _by_limit(findings)]

    def _of(self, weight: torch.Tensor, call: Call) -> list[Finding]:
        scale, axis = _along(call, weight)
        name = call.node.name
        error = (_quantised(weight, scale, axis, call) - weight).abs()
        reach = scale * call.number("qmax")
        inside = weight.abs() <= reach * (1 + 2.0**-20)
        beyond = (error / scale)[inside]
        steps = float(beyond.max()) if beyond.numel() else 0.0
        found = [Finding(f"largest error in steps, {name}", steps, HALF_STEP)]
        if self.method == "minmax":
            short = float((weight.abs() / (reach + 0.5 * scale)).max()) if weight.numel() else 0.0
            found.append(Finding(f"largest value over the grid's reach, {name}", short, 1.0))
            return found
        others = [d for d in range(weight.dim()) if d != axis]
        most = weight.abs().amax(others, keepdim=True)
        step = most / call.number("qmax")
        step = power_of_two(step) if self.powers else step
        widest = torch.where(most > 0, step, 1.0).clamp(min=SMALLEST_SCALE)
        base = (_quantised(weight, widest, axis, call) - weight).square().sum(others)
        own = error.square().sum(others)
        ratio = float((own / base.clamp(min=1e-30)).max()) if base.numel() else 0.0
        found.append(Finding(f"squared error over that of minmax, {name}", ratio, 1.0 + 1e-5))
        return found


def _weights(before: Program, after: Program) -> Iterator[tuple[torch.Tensor, Call]]:
    """The constants that the inserted fake-quants read, in float64."""
    for node in inserted(before, after):
        call = Call(after, node)
        weight = call.parameter("x")
        if weight is not None:
            yield weight.detach().double(), call


def _along(call: Call, weight: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """The scale in float64, shaped to broadcast along its axis, and the axis."""
    scale, axis = call.parameter("scale"), call.arg("axis")
    assert scale is not None
    if axis is None:
        return scale.double(), None
    shape = [1] * weight.dim()
    shape[axis] = -1
    return scale.double().reshape(shape), axis


def _quantised(
    weight: torch.Tensor, scale: torch.Tensor, axis: int | None, call: Call
) -> torch.Tensor:
    flat = scale.reshape(-1) if axis is not None else scale.reshape(())
    zero = torch.zeros_like(flat)
    bounds = int(call.number("qmin")), int(call.number("qmax"))
    found: torch.Tensor = fake_quant_reference(weight, flat, zero, axis, *bounds)
    return found


def _by_limit(findings: list[Finding]) -> list[list[Finding]]:
    """Findings of one kind together: those that share their limit."""
    groups: dict[float, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.limit, []).append(finding)
    return list(groups.values())

"""Sensitivity to bits: what the outputs lose, as measured, when a layer alone is quantised.

For a layer l and a width b, the float program runs with the weight and the input of l alone
rounded to the grids that the whole program has at b, everything else as it was:

    noise(l, b)       mean over the outputs y of  sum (y_lb - y)^2 / sum y^2,    1 / SQNR
    loss(l, b)        mean over samples of the cross entropy, less that of the float program
    divergence(l, b)  mean over samples of KL(softmax y || softmax y_lb), first output

Rounding errors of different layers are nearly independent, so that to first order what layers lose
together is the sum of what they lose alone; the Hessian-weighted sums of Dong et al. (HAWQ-V2,
NeurIPS 2020, section 3.2) and Yao et al. (HAWQ-V3, ICML 2021, section 3.4) rest on the same
assumption, with a trace in place of a measurement. Whether it holds is measured too (`together`).

Cost: the float program is walked once; behind each layer, what follows runs once for each width,
so layers * widths / 2 runs of the program for a chain of equal layers. All samples are held at the
widest place of the graph. Limits: what the target quantises besides layers (residual adds, pools,
results) is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from pruna_ir.calibration import layer_name
from pruna_ir.call import Call
from pruna_ir.data import Batch, DataSource
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.losses import divergence
from pruna_ir.passes.calibration_loss import language_input, sample_losses
from pruna_ir.passes.calibration_runs import rows, runs
from pruna_ir.passes.layer_inputs import Frontier
from pruna_ir.passes.quant_placement import KINDS, is_quantised
from pruna_ir.program import Program
from pruna_ir.quantization import quantized_operands
from pruna_ir.transform import Context, Progress, Rewrite, no_progress

Measure = Literal["noise", "loss", "divergence"]
NOISE = "noise"

Lost = dict[str, float]
"""What was lost, by measure: always ``noise``, and the measure that was asked for."""
Changes = Mapping[fx.Node, Mapping[fx.Node, "Rounding | Tensor"]]
"""For layers, what they read in place of some operands: a rounded operand, or a tensor."""


@dataclass(frozen=True)
class Rounding:
    """The parameters of one fake-quant."""

    scale: Tensor
    zero_point: Tensor
    axis: int | None
    qmin: int
    qmax: int

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor on the grid."""
        found: Tensor = FAKE_QUANT.op(
            x, self.scale, self.zero_point, self.axis, self.qmin, self.qmax
        )
        return found


@dataclass(frozen=True)
class LayerGroup:
    """Layers that take one width together: calls of one module, and readers of one weight.

    Attributes:
        names: what ``bits`` calls them: module paths, or node names.
        nodes: the calls, in graph order.
    """

    names: tuple[str, ...]
    nodes: tuple[fx.Node, ...]

    def __str__(self) -> str:
        return " + ".join(self.names)


def without_fake_quants(program: Program) -> Program:
    """The program without any fake-quant, its other nodes under the same names."""
    rw = Rewrite(program, "bypass", Context())
    for node in rw.calls(FAKE_QUANT.op):
        source = rw.call(node).producer("x")
        if source is not None:
            rw.replace(node, source)
    return rw.finish()


def layer_groups(base: Program, uniform: Sequence[Program]) -> list[LayerGroup]:
    """The layers that are quantised in every one of some programs, in graph order.

    Args:
        base: the program without fake-quants.
        uniform: it quantised, each time with other bits.
    """
    quantised = [{n.name for n in p.calls() if roundings(p, n)} for p in uniform]
    place: dict[fx.Node, int] = {}
    group_of: dict[tuple[str, Any], list[fx.Node]] = {}
    for node in base.calls(*KINDS):
        if not all(node.name in names for names in quantised):
            continue
        place[node] = len(place)
        joined = [node]
        for key in _keys(base, node):
            joined += [other for other in group_of.get(key, []) if other not in joined]
        keys = {key for other in joined for key in _keys(base, other)}
        group_of |= dict.fromkeys(keys, joined)
    unique = {id(group): sorted(group, key=place.__getitem__) for group in group_of.values()}
    return [
        LayerGroup(tuple(dict.fromkeys(map(layer_name, group))), tuple(group))
        for group in sorted(unique.values(), key=lambda group: place[group[0]])
    ]


def stored_weight(program: Program, node: fx.Node) -> Tensor | None:
    """The stored tensor that a layer reads as its weight; None where it is computed."""
    return Call(program, node).parameter(KINDS[node.target].weight)


def _keys(program: Program, node: fx.Node) -> set[tuple[str, Any]]:
    """What a layer shares with those that take its width: its name, and its stored weight."""
    weight = stored_weight(program, node)
    return {("layer", layer_name(node)), ("weight", node.name if weight is None else id(weight))}


def roundings(program: Program, node: fx.Node) -> dict[str, Rounding]:
    """How each operand of a layer is rounded, by the layer's argument."""
    if node.target not in KINDS:
        return {}
    kind = KINDS[node.target]
    return {
        name: _rounding(program, fake)
        for name, _, fake in quantized_operands(node)
        if name in (kind.input, kind.weight)
    }


def _rounding(program: Program, fake: fx.Node) -> Rounding:
    call = Call(program, fake)
    scale, zero = call.parameter("scale"), call.parameter("zero_point")
    if scale is None or zero is None:
        raise PassError(f"{fake.name}: its scale or zero point is no constant of the program")
    return Rounding(
        scale, zero, call.arg("axis"), int(call.number("qmin")), int(call.number("qmax"))
    )


def changes(base: Program, group: LayerGroup, quantised: Program) -> Changes:
    """What the layers of a group read once they are quantised as in another program."""
    others = {node.name: node for node in quantised.calls()}
    found: dict[fx.Node, dict[fx.Node, Rounding | Tensor]] = {}
    for node in group.nodes:
        call = Call(base, node)
        found[node] = {}
        for name, rounding in roundings(quantised, others[node.name]).items():
            source, stored = call.producer(name), call.parameter(name)
            assert source is not None
            found[node][source] = rounding if stored is None else rounding(stored.detach())
    return found


def some_runs(program: Program, data: DataSource, samples: int) -> list[Batch]:
    """Whole batches of the data, until there are this many samples or no more.

    Raises:
        UsageError: the data does not fit the program, or holds no run.
    """
    found: list[Batch] = []
    seen = 0
    for batch in runs(program, data):
        found.append(batch)
        seen += rows(program, batch.inputs)
        if seen >= samples:
            break
    return found


class Losses:
    """What changes of a float program cost on some data.

    Args:
        base: the float program.
        batches: what it is run on.
        measure: what to measure besides the noise.

    Raises:
        UsageError: the measure does not fit program or data, or an output is 0 throughout.
    """

    def __init__(self, base: Program, batches: Sequence[Batch], measure: Measure) -> None:
        self._base, self._batches, self._measure = base, batches, measure
        if measure == "loss" and not has_labels(base, batches[0]):
            raise UsageError(
                "a loss is measured against labels, and the data has none; give labels, or "
                "measure noise or divergence"
            )
        with torch.no_grad():
            self._wanted = [base(*batch.inputs) for batch in batches]
        self._floats = [n for n, y in enumerate(self._wanted[0]) if y.dtype.is_floating_point]
        self._power = [
            sum(float(y[n].double().square().sum()) for y in self._wanted) for n in self._floats
        ]
        if not any(self._power):
            raise UsageError("no output holds floating-point numbers other than 0 on this data")
        self._before = self._task(self._wanted)
        self._frontier = Frontier(base, [batch.inputs for batch in batches])
        self._last = {
            operand: node for node in base.graph.nodes for operand in node.all_input_nodes
        }

    def alone(self, changed: Changes) -> Lost:
        """What is lost with these changes; calls must come in the order of their first layers."""
        self._frontier.reach(next(n for n in self._base.calls() if n in changed))
        return self._continued(self._frontier, changed)

    def together(self, changed: Changes) -> Lost:
        """What is lost with any changes, from the start."""
        if not changed:
            return self.lost([list(y) for y in self._wanted], "nothing")
        frontier = Frontier(self._base, [batch.inputs for batch in self._batches])
        return self._continued(frontier, changed)

    def of(self, program: Program) -> Lost:
        """What another program with the same inputs and outputs loses.

        Raises:
            PassError: an output is NaN or infinite.
        """
        with torch.no_grad():
            found = [program(*batch.inputs) for batch in self._batches]
        return self.lost(found, "the quantised program")

    def lost(self, found: Sequence[Sequence[Tensor]], what: str) -> Lost:
        """What outputs, one list a batch, lose against those of the float program.

        Raises:
            PassError: an output is NaN or infinite.
        """
        shares = []
        for power, number in zip(self._power, self._floats, strict=True):
            error = sum(
                float((y[number].double() - wanted[number].double()).square().sum())
                for y, wanted in zip(found, self._wanted, strict=True)
            )
            if not math.isfinite(error):
                raise PassError(f"with {what} quantised, an output is NaN or infinite")
            if power > 0:
                shares.append(error / power)
        result = {NOISE: math.fsum(shares) / len(shares)}
        if self._measure != NOISE:
            result[self._measure] = self._task(found) - self._before
        return result

    def _task(self, found: Sequence[Sequence[Tensor]]) -> float:
        """The mean over samples of the cross entropy or the divergence; 0 for the noise."""
        if self._measure == NOISE:
            return 0.0
        each = [
            sample_losses(self._base, batch, y[0], seed=0).double()
            if self._measure == "loss"
            else divergence(y[0].double(), wanted[0].double())
            for batch, y, wanted in zip(self._batches, found, self._wanted, strict=True)
        ]
        return float(torch.cat(each).mean())

    def _continued(self, frontier: Frontier, changed: Changes) -> Lost:
        found = [self._outputs(frontier, batch, changed) for batch in range(len(self._batches))]
        return self.lost(found, " + ".join(layer_name(node) for node in list(changed)[:3]))

    def _outputs(self, frontier: Frontier, batch: int, changed: Changes) -> list[Tensor]:
        """The outputs of one batch, from the frontier on."""
        env: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            return env[node] if node in env else frontier.values(node)[batch]

        for node in frontier.ahead():
            instead = env
            if node in changed:
                read = {
                    source: new if isinstance(new, Tensor) else new(value(source))
                    for source, new in changed[node].items()
                }
                instead = {**env, **read}
            env[node] = frontier.evaluate(node, batch, instead)
            for operand in node.all_input_nodes:
                if self._last[operand] is node:
                    env.pop(operand, None)
        return [value(node) for node in self._base.results()]


def has_labels(program: Program, batch: Batch) -> bool:
    """Whether a cross entropy has something to compare with: labels, or the next token."""
    return batch.labels is not None or language_input(program) is not None


def sensitivities(
    losses: Losses,
    base: Program,
    groups: Sequence[LayerGroup],
    quantised: Mapping[str, Program],
    progress: Progress = no_progress,
) -> list[dict[str, Lost]]:
    """For each group, what the outputs lose when it alone has each of some widths.

    Args:
        losses: of the float program, not used before.
        base: that program.
        groups: its layers, in graph order.
        quantised: the program with all layers at one width, by the width.
        progress: called after each group.
    """
    found = []
    for done, group in enumerate(groups):
        progress("sensitivity to bits", done, len(groups))
        found.append({
            width: losses.alone(changes(base, group, program))
            for width, program in quantised.items()
        })  # fmt: skip
    progress("sensitivity to bits", len(groups), len(groups))
    return found


def is_float_program(program: Program) -> bool:
    """Whether nothing is fake-quantised."""
    return not any(is_quantised(node) for node in program.calls())

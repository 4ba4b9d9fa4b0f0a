"""round-weights: weights go up or down to the grid so that the layer's output changes least.

Rounding each weight to the nearest grid point is not what changes y = W x least: errors of
different weights can cancel on the inputs that really occur. Layer by layer, in topological order,
this pass learns for each weight whether it goes up or down (AdaRound):

    minimise  E[|f(W x + b) - f(W~ x~ + b~)|^2] + lambda sum(1 - |2 h(V) - 1|^beta)
    W~ = s clip(floor(W / s) + h(V), qmin, qmax)        h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

W x + b is the float program's output, x~ the input that the quantised program's layer really has,
behind the layers that are rounded already, and f the ReLU (or clip) that alone reads the output.
Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020,
equations (21) to (25) (see `learned_rounding`).

What is learned is a local minimum. From there, and from rounding to nearest, single weights are
changed as long as that lowers the squared error before f (`learned_rounding.refined`). Each output
channel takes what has the least error behind f over *all* calibration data, which may be rounding
to nearest. It is stored as a weight that lies on the grid, so that the fake-quant in front of the
layer hands it on unchanged; scales stay as they are.

Promise (checked): the fake-quant of every rounded weight is that weight, bit for bit; each weight
was within the grid moved by less than one step; over the calibration data no layer's output is
further from the float program's than with rounding to nearest on the same inputs; nothing else
changed.

Limits: layers are fitted on their own, so that what follows a residual addition is not seen. The
float program must have the layer too, by name. Transposed convolutions and convolutions that are
fused with their activation are left alone, with a remark. Memory: the activations at one place of
both programs over all data (see `layer_inputs`) and the patches of one layer, 256 MiB at most. Run
correct-bias after this pass rather than before: it takes back what rounding leaves of the means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.errors import UsageError
from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs, origin_of
from pruna_ir.passes.learned_rounding import (
    Problem,
    Training,
    learn_rounding,
    nearest,
    refined,
)
from pruna_ir.passes.least_squares import enough
from pruna_ir.passes.linear_layers import stored
from pruna_ir.passes.promises import Untouched
from pruna_ir.passes.rounding_promises import NoWorse, OnGrid
from pruna_ir.passes.weight_grids import Rounded, activation_behind, rounded_layers
from pruna_ir.transform import Effect, Pass, Rewrite

_MOST = 1 << 26
"""The largest number of patch elements that are gathered for a layer."""


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Learn for each quantised weight whether to round it up or down.

    Rewrite:
        y = fq(W) x + b
          -->
        y = fq(W') x + b                    with fq(W') = W', |W' - W| < s

    Attributes:
        iterations: steps of the optimiser for each layer.
        batch: the positions (pixels, tokens) of each step.
        positions: how many positions of each sample are gathered for a layer at random (by the
            context's seed); more where that makes fewer than 16,384 in all; 0 for all.
        rate: the learning rate.
        regularisation: the lambda above, with errors in units of what rounding to nearest costs.
        activations: take the ReLU behind a layer into the loss.

    Requires: calibration data; a program that insert-fake-quant has just left (passes that mend
    what quantisation cost may stand between).

    Raises:
        UsageError: there is no calibration data, or an option is out of its range.
        PassError: the program does not know what it was quantised from, or the data drives a
            layer to infinity or NaN.

    >>> from pruna_ir import Context, TensorData, capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> context = Context(data=TensorData((torch.randn(64, 3),)), target="onnx")
    >>> pipeline = Pipeline.parse("insert-fake-quant,round-weights{iterations=50},correct-bias")
    >>> result = pipeline.run(capture(model, (torch.zeros(2, 3),)), context)
    >>> [str(step.check.effect.value) for step in result.steps]
    ['bounded', 'fitted', 'fitted']
    """

    name: ClassVar[str] = "round-weights"
    effect: ClassVar[Effect] = Effect.FITTED

    iterations: int = 1000
    batch: int = 2048
    positions: int = 64
    rate: float = 0.01
    regularisation: float = 1.0
    activations: bool = True

    def __post_init__(self) -> None:
        for option, least in (("iterations", 1), ("batch", 1), ("positions", 0)):
            if getattr(self, option) < least:
                raise UsageError(
                    f"{self.name}: {option} must be at least {least}, not {getattr(self, option)}"
                )
        for option in ("rate", "regularisation"):
            if not getattr(self, option) > 0:
                raise UsageError(
                    f"{self.name}: {option} must be above 0, not {getattr(self, option)}"
                )

    def rewrite(self, rw: Rewrite) -> None:
        """Walk both programs side by side and round each layer before anything reads it."""
        origin, batches = origin_of(rw, self.name), calibration_inputs(rw, self.name)
        now, was = Frontier(rw.program, batches), Frontier(origin.program, batches)
        samples = sum(len(inputs[0]) for inputs in batches)
        found = list(self._layers(rw))
        done: list[str] = []
        changed: list[str] = []
        for number, layer in enumerate(found):
            now.reach(layer.node)
            was.pass_by(layer.counterpart)
            if not layer.off_grid():
                rw.note(layer.node, "its weights lie on the grid already")
                continue
            work = _Layer(rw, self, layer, now, was)
            weight, ratio = work.rounded(samples, self._ticks(rw, number, len(found)))
            changed.append(_store(rw, layer, weight))
            now.again(layer.fake)
            done.append(layer.node.name)
            rw.applied(layer.node, f"squared error {ratio:.3g} of that with rounding to nearest")
        rw.set_origin(rw.before.origin)
        if done:
            rw.assure(OnGrid(tuple(done)))
            rw.assure(NoWorse(tuple(done), self.activations))
            rw.assure(Untouched(tuple(changed)))

    def _ticks(self, rw: Rewrite, number: int, layers: int) -> Callable[[int], None]:
        """What to call after each step of a layer."""

        def tick(done: int) -> None:
            steps = self.iterations
            rw.context.progress(self.name, number * steps + done, layers * steps)

        return tick

    def _layers(self, rw: Rewrite) -> Iterator[Rounded]:
        """The layers to round; remarks say why others are not."""
        origin = origin_of(rw, self.name)
        fused = [n for n in rw.calls(CONV_ACT.op) if _reads_quantised(rw, n)]
        for node in fused:
            rw.skip(node, "it is fused with its activation; run round-weights before the fusion")
        for layer in rounded_layers(rw.program, origin.program):
            node = layer.node if isinstance(layer, Rounded) else layer[0]
            if rw.in_scope(node):
                if isinstance(layer, Rounded):
                    yield layer
                else:
                    rw.skip(*layer)


def _reads_quantised(rw: Rewrite, node: fx.Node) -> bool:
    weight = rw.call(node).producer("weight")
    return weight is not None and weight.target is FAKE_QUANT.op and stored(weight) is not None


def _store(rw: Rewrite, layer: Rounded, weight: Tensor) -> str:
    source = layer.source
    derived = rw.derive(source, weight, layer.fake)
    if derived is not source:
        rw.update(layer.fake, x=derived)
    return str(derived.target)


class _Layer:
    """One layer, with both programs standing at it."""

    def __init__(
        self, rw: Rewrite, options: RoundWeights, layer: Rounded, now: Frontier, was: Frontier
    ) -> None:
        self._rw, self._options, self._layer = rw, options, layer
        self._now = now
        self._inputs: list[Tensor] = now.values(layer.input)
        self._wanted: list[Tensor] = was.values(layer.counterpart)
        self._bounds = activation_behind(layer) if options.activations else None

    def rounded(self, samples: int, tick: Callable[[int], None]) -> tuple[Tensor, float]:
        """The new weight, and its squared error over that of rounding to nearest."""
        options, layer = self._options, self._layer
        problem = self._problem(samples)
        generator = torch.Generator().manual_seed(self._rw.context.seed)
        training = Training(
            options.iterations, options.batch, options.rate, options.regularisation
        )
        best = layer.nearest()
        least = plain = self._errors(best)
        if not bool(torch.isfinite(plain).all()):
            raise self._rw.error(layer.node, "the calibration data drives it to inf or NaN")
        learned = learn_rounding(problem, training, generator, tick)
        for levels in (learned, refined(problem, learned), refined(problem, nearest(problem))):
            weight = layer.on_grid(levels)
            errors = self._errors(weight)
            best = layer.choose(errors < least, weight, best)
            least = torch.minimum(errors, least)
        total = float(plain.sum())
        return best, float(least.sum()) / total if total else 1.0

    def _problem(self, samples: int) -> Problem:
        layer, options = self._layer, self._options
        inputs = layer.weight_steps().shape[-1] * layer.layer.groups
        per_sample = enough(options.positions, samples) if options.positions else 0
        most = max(_MOST // max(inputs, 1) // max(samples, 1), 1)
        xs, ys = [], []
        for number, (x, y) in enumerate(zip(self._inputs, self._wanted, strict=True)):
            rows = layer.layer.rows(y)
            wanted = len(x) * min(per_sample or most, most)
            chosen = _chosen(len(rows), wanted, self._rw.context.seed + number).to(x.device)
            xs.append(layer.layer.patches(x, chosen).float())
            ys.append(rows[chosen].float())
        return layer.problem(
            torch.cat(xs).transpose(0, 1).contiguous(),
            torch.cat(ys).transpose(0, 1).contiguous(),
            self._bounds,
        )

    def _errors(self, weight: Tensor) -> Tensor:
        """The squared error of each output channel over all data, float64."""
        total = torch.zeros(self._layer.channels, dtype=torch.float64)
        for batch, wanted in enumerate(self._wanted):
            made = self._now.evaluate(self._layer.node, batch, {self._layer.fake: weight})
            total += self._layer.squared_error(made, wanted, self._bounds)
        return total


def _chosen(rows: int, wanted: int, seed: int) -> Tensor:
    if wanted >= rows:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(rows, generator=generator)[:wanted].sort().values

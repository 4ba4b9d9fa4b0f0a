"""correct-bias: what quantisation adds to a layer's output on average leaves through its bias.

Rounding the weights W of a layer y = W x + b to W + dW, and its input x to x + dx, shifts the mean
of every output channel; the shift goes on through the network and adds up. It is taken back:

    b'[o] = b[o] + E[y_float[o]] - E[y_quantised[o]]

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019, section 4.2 (equation 16: E[y] = E[y'] - dW E[x]) and appendix D, the empirical variant: both
means are measured over calibration data, in topological order, so that a layer is corrected on the
inputs that the corrected layers before it produce, and so also for what they still do wrong.

y_float is the value of the node of the same name in the float program that insert-fake-quant left
as the origin. A layer without a bias in front of a batch norm has the amount taken from the norm's
running mean; any other layer without a bias gets one. Biases stay float in the program.

Promise (checked): over the calibration data, the mean of every output channel of every corrected
layer is the float program's; nothing else changed.

Limits: only layers that the float program has too, by name and operator, are corrected; a
convolution that is fused with its activation is not (its own output cannot be seen). What one
constant cannot express, such as the borders of padded convolutions, is corrected on average. A few
hundred samples are enough; with very few, the means of the sample are fitted, not those of the
data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from pruna_ir.kernels.conv_act import KERNEL as CONV_ACT
from pruna_ir.passes.fitting import Aim, aims, both_ends, shift
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs, origin_of
from pruna_ir.passes.linear_layers import layer_at, stored
from pruna_ir.passes.promises import MeansAgree, Untouched
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Give the bias of every quantised layer the mean of what quantisation took from its output.

    Rewrite:
        y = fq(W) fq(x) + b
          -->
        y = fq(W) fq(x) + b'                with b' = b + E[y_float - y], per output channel

    Requires: calibration data; a program that insert-fake-quant has just left (passes that mend
    what quantisation cost may stand between).

    Raises:
        UsageError: there is no calibration data.
        PassError: the program does not know what it was quantised from, or the data drives a
            layer to infinity or NaN.

    >>> from pruna_ir import Context, TensorData, capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> context = Context(data=TensorData((torch.randn(64, 3),)), target="onnx")
    >>> pipeline = Pipeline.parse("insert-fake-quant,correct-bias")
    >>> result = pipeline.run(capture(model, (torch.zeros(2, 3),)), context)
    >>> [str(step.check.effect.value) for step in result.steps]
    ['bounded', 'fitted']
    """

    name: ClassVar[str] = "correct-bias"
    effect: ClassVar[Effect] = Effect.FITTED

    def rewrite(self, rw: Rewrite) -> None:
        """Walk the float and the quantised program side by side, layer by layer."""
        origin, batches = origin_of(rw, self.name), calibration_inputs(rw, self.name)
        now, was = Frontier(rw.program, batches), Frontier(origin.program, batches)
        touched: list[str] = []
        changed: list[str] = []
        for aim in _quantised(rw):
            node = aim.layer.node
            now.reach(node)
            was.pass_by(aim.counterpart.node)
            amount = _mean_lacking(aim, now, was)
            if not bool(torch.isfinite(amount).all()):
                raise rw.error(node, "the calibration data drives it to inf or NaN")
            changed.append(shift(rw, aim, amount))
            touched.append(node.name)
            rw.applied(node, f"mean error up to {float(amount.abs().max()):.3g} taken back")
        rw.set_origin(rw.before.origin)
        if touched:
            rw.assure(MeansAgree(tuple(touched), every=True))
            rw.assure(Untouched(tuple(changed)))


def _quantised(rw: Rewrite) -> Iterator[Aim]:
    """The quantised layers that can be compared with the float program; remarks on the others."""
    origin = rw.before.origin
    assert origin is not None
    found = list(aims(rw.program, origin, residual=False, every=True))
    by_node = {(f.layer.node if isinstance(f, Aim) else f[0]): f for f in found}
    for node in rw.calls():
        layer, aim = layer_at(rw.program, node), by_node.get(node)
        if node.target is CONV_ACT.op and _reads_quantised(rw, node):
            rw.skip(node, "it is fused with its activation; run correct-bias before the fusion")
        elif layer is not None and layer.quantised:
            if isinstance(aim, Aim):
                yield aim
            else:
                rw.skip(node, "the float program has no such layer" if aim is None else aim[1])


def _reads_quantised(rw: Rewrite, node: fx.Node) -> bool:
    weight = rw.call(node).producer("weight")
    return weight is not None and weight.op != "get_attr" and stored(weight) is not None


def _mean_lacking(aim: Aim, now: Frontier, was: Frontier) -> Tensor:
    """The mean, per output channel, of float minus quantised output, float64."""
    total, count = torch.zeros(len(aim.kept), dtype=torch.float64), 0
    for batch in range(now.count):
        lacking = aim.lacking(*both_ends(aim, now, was, batch))
        rows = lacking.movedim(aim.layer.channel_dim, -1).flatten(0, -2)
        total += rows.sum(0).cpu()
        count += len(rows)
    return total / count

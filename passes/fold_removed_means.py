"""fold-removed-means: what removed channels gave on average goes into the next bias.

A layer y = W x + b that lost the input channels R yields W_R x_R less at every position. Its mean
over calibration data and positions is put back:

    b'[o] = b[o] + E[(W_R x_R)[o]]      of a linear layer: b[o] + sum over j in R of W[o, j] E[x_j]

Source of the idea: Ye et al., Rethinking the Smaller-Norm-Less-Informative Assumption in Channel
Pruning of Convolution Layers, ICLR 2018, section 3 (the bias of a removed channel is absorbed);
bias correction by data: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, ICCV 2019, section 4.2.

The expectation is measured as the difference of the means of y in the unpruned program and in the
pruned one, whose earlier layers are already mended, so that it also holds what their remaining
errors add on average, and, at borders that a convolution pads with zeros, the taps that fall
outside: there one constant serves for all positions, and its value is the mean over them.

A layer without bias in front of a batch norm has the amount taken from the norm's running mean,
which computes the same and adds no parameter; any other layer without bias gets one.

Promise (checked): over the calibration data, the mean of every output channel of every touched
layer, taken after a following batch norm, equals the unpruned program's; nothing else changed.

Limits: a batch norm without running statistics removes the constant again; grouped transposed
convolutions, einsum and layers whose bias is computed in the graph are left alone, with a remark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruna_ir.passes.fitting import Aim, aims, both_ends, shift
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs, origin_of
from pruna_ir.passes.promises import MeansAgree, Untouched
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class FoldRemovedMeans(Pass):
    """Give the biases of layers that lost inputs the mean of what the removed inputs gave.

    Rewrite:
        y = W x + b                                     # W lost columns R
          -->
        y = W x + b'                                    with b' = b + E[W_R x_R]

    Requires: calibration data; a program that prune-channels has just left.

    Raises:
        UsageError: there is no calibration data.
        PassError: the program does not know what it was pruned from.

    >>> import torch
    >>> from pruna_ir import Context, TensorData, capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> context = Context(data=TensorData((torch.randn(64, 3),)))
    >>> pipeline = Pipeline.parse("prune-channels{ratio=0.5},fold-removed-means")
    >>> result = pipeline.run(capture(model, (torch.zeros(2, 3),)), context)
    >>> [str(step.check.effect.value) for step in result.steps]
    ['oracle', 'fitted']
    """

    name: ClassVar[str] = "fold-removed-means"
    effect: ClassVar[Effect] = Effect.FITTED

    def rewrite(self, rw: Rewrite) -> None:
        """Walk both programs side by side and shift each layer that lost inputs."""
        origin, batches = origin_of(rw, self.name), calibration_inputs(rw, self.name)
        now, was = Frontier(rw.program, batches), Frontier(origin.program, batches)
        touched: list[str] = []
        changed: list[str] = []
        for found in aims(rw.program, origin, residual=False):
            if not isinstance(found, Aim):
                rw.skip(*found)
                continue
            now.reach(found.layer.node)
            was.pass_by(found.counterpart.node)
            amount = _mean_lacking(found, now, was)
            if not bool(torch.isfinite(amount).all()):
                raise rw.error(found.layer.node, "the calibration data drives it to inf or NaN")
            where = shift(rw, found, amount)
            touched.append(found.layer.node.name)
            changed.append(where)
            rw.applied(found.layer.node, f"means of {found.lost} inputs folded into {where}")
        rw.set_origin(rw.before.origin)
        if touched:
            rw.assure(MeansAgree(tuple(touched)))
            rw.assure(Untouched(tuple(changed)))


def _mean_lacking(aim: Aim, now: Frontier, was: Frontier) -> Tensor:
    """The mean, per output channel, of what the layer's output lacks; float64."""
    dims: Sequence[int] = ()
    total, count = torch.zeros(len(aim.kept), dtype=torch.float64), 0
    for batch in range(now.count):
        lacking = aim.lacking(*both_ends(aim, now, was, batch))
        channel = aim.layer.channel_dim % lacking.dim()
        dims = [dim for dim in range(lacking.dim()) if dim != channel]
        total += lacking.sum(dims).cpu()
        count += lacking.numel() // len(total)
    return total / count

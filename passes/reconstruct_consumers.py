"""reconstruct-consumers: least squares lets the surviving inputs stand in for the removed ones.

For each layer that lost inputs, the weights W' and bias b' that minimise

    sum over positions  ||y - W' x' - b'||^2 + ridge ||W' - W||^2

where x' is what arrives in the pruned program, whose earlier layers are already mended, and y what
the unpruned program's layer yields there (of the channels that survive). Sources: He, Zhang and
Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, equation (2) with fixed
selection, and section 3.3 for whole networks and residual branches; Luo, Wu and Lin, ThiNet, ICCV
2017, equation (7). For inputs that are not disturbed otherwise and a vanishing ridge it is the
compensation of Optimal Brain Surgeon (Hassibi and Stork, 1993) for a set of removed weights:

    W'_S = W_S + W_R H_RS H_SS^-1         H = covariance of x, S the survivors, R the removed

Convolutions are fitted over whole patches, grouped ones group by group. Only second moments are
kept (`least_squares`), in float64; both programs are run once, layer by layer over all batches at
once (`layer_inputs.Frontier`). A residual branch is fitted to what makes the *sum* right, so that
it also takes up what the shortcut already lacks (He et al., section 3.3). The ridge is ``damping``
times the mean variance of the inputs and pulls towards the present weights, so that no layer can
get worse on the positions that it is fitted to, and linearly dependent inputs do no harm.

Promise (checked): for every touched layer, over the positions fitted to, the squared error against
the unpruned program is not larger with the new weights than with the old ones on the same inputs,
and the normal equations hold; nothing else changed.

Limits: activations between layers are not linearised: each layer is fitted on its own. Layers with
more inputs than ``max_inputs``, transposed convolutions and weights that are computed in the graph
or read by several layers are left alone, with a remark (fold-removed-means may still serve them).
Memory: see `layer_inputs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruna_ir.errors import UsageError
from pruna_ir.passes.fitting import Aim, aims, both_ends, shift
from pruna_ir.passes.layer_inputs import Frontier, calibration_inputs, origin_of
from pruna_ir.passes.least_squares import Moments, enough, solve
from pruna_ir.passes.linear_layers import why_no_matrix
from pruna_ir.passes.promises import Fit, LeastSquares, Untouched, positions_of
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class ReconstructConsumers(Pass):
    """Refit the layers that lost inputs to what they yielded before, by least squares.

    Rewrite:
        y = W x' + b                                    # x' lacks inputs, W their columns
          -->
        y = W' x' + b'                                  closest to the unpruned program's y

    Attributes:
        damping: the ridge relative to the mean variance of a layer's inputs, above 0.
        positions: how many positions of each sample (pixels, tokens) a layer is fitted to, chosen
            at random by the context's seed (the same for all samples of a batch together); more
            where that makes fewer than 16,384 in all; 0 for all.
        residual: fit a residual branch to what makes the sum right, not the branch alone.
        every: refit all layers, not only those that lost inputs: they take up what their inputs
            lack through earlier layers.
        max_inputs: the largest number of inputs (times kernel elements) of a layer that is
            fitted; time grows with its cube, memory with its square.

    Requires: calibration data; a program that prune-channels has just left.

    Raises:
        UsageError: there is no calibration data, or an option is out of its range.
        PassError: the program does not know what it was pruned from.

    >>> from pruna_ir import Context, TensorData, capture
    >>> from pruna_ir.pipeline import Pipeline
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))  # rank 3
    >>> context = Context(data=TensorData((torch.randn(64, 3),)))
    >>> pipeline = Pipeline.parse("prune-channels{ratio=0.5},reconstruct-consumers{damping=1e-9}")
    >>> program = pipeline.run(capture(model, (torch.zeros(2, 3),)), context).program
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(program(x)[0], model(x), atol=1e-4)
    True
    """

    name: ClassVar[str] = "reconstruct-consumers"
    effect: ClassVar[Effect] = Effect.FITTED

    damping: float = 0.01
    positions: int = 64
    residual: bool = True
    every: bool = False
    max_inputs: int = 4608

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise UsageError(f"{self.name}: damping must be above 0, not {self.damping}")
        for option, least in (("positions", 0), ("max_inputs", 1)):
            if getattr(self, option) < least:
                raise UsageError(
                    f"{self.name}: {option} must be at least {least}, not {getattr(self, option)}"
                )

    def rewrite(self, rw: Rewrite) -> None:
        """Walk both programs side by side and refit each layer before anything reads it."""
        origin, batches = origin_of(rw, self.name), calibration_inputs(rw, self.name)
        now, was = Frontier(rw.program, batches), Frontier(origin.program, batches)
        samples = sum(len(inputs[0]) for inputs in batches)
        positions = enough(self.positions, samples) if self.positions else 0
        fit = Fit(self.damping, positions, self.residual, self.every)
        touched: list[str] = []
        changed: list[str] = []
        for aim in self._fitted(rw, fit):
            now.reach(aim.layer.node)
            was.pass_by(aim.counterpart.node)
            moments = _gathered(rw, aim, fit, now, was)
            changed += self._refit(rw, aim, moments)
            touched.append(aim.layer.node.name)
        rw.set_origin(rw.before.origin)
        if touched:
            rw.assure(LeastSquares(tuple(touched), fit))
            rw.assure(Untouched(tuple(changed)))

    def _fitted(self, rw: Rewrite, fit: Fit) -> Iterator[Aim]:
        """The layers to refit; remarks say why others are not."""
        origin = origin_of(rw, self.name)
        for aim in aims(rw.program, origin, residual=fit.residual, every=fit.every):
            if not isinstance(aim, Aim):
                rw.skip(*aim)
                continue
            node = aim.layer.node
            why = why_no_matrix(aim.layer)
            inputs = 0 if why else _inputs(rw, aim)
            if why or inputs > self.max_inputs:
                why = why or f"it has {inputs} inputs, more than max_inputs={self.max_inputs}"
                rw.skip(node, f"not refitted: {why}")
            else:
                yield aim

    def _refit(self, rw: Rewrite, aim: Aim, moments: Moments) -> list[str]:
        """Solve and store; returns the names of the tensors that changed."""
        layer = aim.layer
        finite = all(bool(torch.isfinite(t).all()) for t in (moments.xx, moments.xe))
        if not finite:
            raise rw.error(layer.node, "the calibration data drives it to inf or NaN")
        change, bias = solve(moments, self.damping)
        old = rw.program.tensor(str(layer.weight.target)).detach()
        fitted = layer.matrix(old.double()) + change.to(old.device)
        source = rw.derive(layer.weight, layer.weight_of(fitted, old.shape), layer.node)
        where = shift(rw, aim, bias.flatten())
        inputs = fitted.shape[-1]
        rw.applied(
            layer.node,
            f"refitted {inputs} inputs ({aim.lost} lost) to {moments.count} positions",
        )
        if moments.count < inputs:
            rw.note(
                layer.node,
                f"{moments.count} positions are fewer than its {inputs} inputs: it may overfit; "
                "give more data or positions",
            )
        return [str(source.target), where]


def _inputs(rw: Rewrite, aim: Aim) -> int:
    weight = rw.program.tensor(str(aim.layer.weight.target))
    return int(aim.layer.matrix(weight.detach()).shape[-1])


def _gathered(
    rw: Rewrite, aim: Aim, fit: Fit, now: Frontier, was: Frontier
) -> Moments:
    """The moments of the layer's inputs and of what its output lacks."""
    moments = Moments()
    inputs: list[Tensor] = now.values(aim.layer.input)
    for batch in range(now.count):
        lacking = aim.layer.rows(aim.lacking(*both_ends(aim, now, was, batch)))
        samples = len(inputs[batch])
        chosen = positions_of(fit, len(lacking), samples, rw.context.seed + batch)
        chosen = chosen.to(lacking.device)
        moments.update(aim.layer.patches(inputs[batch], chosen), lacking[chosen])
    return moments

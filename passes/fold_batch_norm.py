"""Fold batch norms in inference mode into the convolution or linear layer before them.

    s = gamma / sqrt(var + eps);  W' = s W;  b' = (b - mean) s + beta

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference (2018), section 3.2. Covers convolutions and transposed
convolutions in one to three dimensions, grouped and depthwise ones, linear layers, and batch norms
without affine parameters. A batch norm in front of a convolution (DenseNet) stays: between the two
stands a relu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pruna_ir.call import Call
from pruna_ir.passes.batch_norm_folding import apply_fold, try_fold
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Replace ``batch_norm(conv(x))`` by ``conv(x)`` with other weights.

    Rewrite:
        c = conv2d(x, W, b); y = batch_norm(c, gamma, beta, mean, var, eps)
          -->
        y = conv2d(x, W', b')
        with s = gamma / sqrt(var + eps), W' = W s, b' = (b - mean) s + beta

    Requires: eval mode with running statistics; constant weights; no other reader of c. A weight
    that other nodes read too (tied weights) keeps its value for them.

    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    >>> program = apply(FoldBatchNorm(), capture(model, (torch.zeros(2, 3, 8, 8),))).program
    >>> [str(node.target) for node in program.calls()]
    ['aten.conv2d.default']
    """

    name: ClassVar[str] = "fold-batch-norm"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        """Fold each batch norm, or say why not."""
        for node in rw.calls(aten.batch_norm.default):
            norm = Call(rw.program, node)
            folded = try_fold(norm)
            if isinstance(folded, str):
                rw.skip(node, folded)
                continue
            source = apply_fold(rw, norm, folded)
            rw.applied(node, f"folded into {source.name}")
            rw.replace(node, source)

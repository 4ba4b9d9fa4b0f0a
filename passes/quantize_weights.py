"""Quantise the weights of matrix products by blocks, and nothing else: weight-only int8 and int4.

    y = linear(x, W, b)
      -->
    y = linear(x, reshape(fake_quant(reshape(W, [-1, block]), s, z, axis=0), W.shape), b)

Each block of a row (see `weight_blocks`) is rounded to nearest on its own grid; activations stay
float. What a language model's token-by-token decoding pays for is the weights' memory traffic, so
that is what shrinks: int4 in blocks of 32 takes 5 bits a weight (a float32 scale each; 4.25 in
blocks of 128), int8 per channel 8. No data is needed. Passes that go further stand before it
(scale-salient-channels) or behind it (compensate-rounding).

Runtimes: ONNX Runtime runs int4, and int8 in blocks, with MatMulNBits; OpenVINO keeps int4 and
int8 weights compressed and expands them inside its kernels; TVM stores a byte a weight and
dequantises at load. TensorRT takes symmetric grids only.

Limits: matrix products with a constant matrix (linear, addmm, mm, matmul); convolutions and
embedding tables stay float. A weight that other nodes read too, such as a tied embedding, stays
float unless ``tied`` is set, since the other reader keeps the float table in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from pruna_ir.calibration import layer_name
from pruna_ir.errors import UsageError
from pruna_ir.passes.linear_layers import Layer, layer_at
from pruna_ir.passes.weight_blocks import (
    PRODUCTS,
    as_rows,
    block_parameters,
    check_block,
    check_globs,
    fitting_block,
    insert_blocks,
    stored_weight,
    weight_grid,
    why_not_stored,
)
from pruna_ir.program import Origin
from pruna_ir.transform import Effect, Pass, Rewrite


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights of matrix products to int8 or int4, with a scale for each block.

    Options:
        bits: 8 or 4.
        block: how many inputs share a scale: 16, 32, 64, 128, 256, or 0 for one scale per output
            channel. Where it does not divide a layer's inputs it is halved until it does; where
            not even 16 does, the last block of each row is short. A remark says so.
        symmetric: zero points are 0 (-8..7, -127..127); otherwise each block has one of its own
            (0..15, 0..255).
        scales: ``minmax`` spans each block; ``mse`` takes the part of it with the least squared
            error.
        exclude: globs over module paths whose layers stay float, such as ``lm_head``.
        tied: quantise weights that other nodes read too; those keep the float tensor.
        min_sqnr_db: the lowest signal-to-quantisation-noise ratio of any output that the pipeline
            accepts. 4 bits leave logits at 10 to 25 dB.

    >>> import torch
    >>> from pruna_ir import capture
    >>> from pruna_ir.transform import apply
    >>> program = capture(torch.nn.Linear(64, 3), (torch.zeros(2, 64),))
    >>> result = apply(QuantizeWeights(bits=4, block=32), program)
    >>> print(result.remarks[0].message)
    linear: s4[-8, 7], blocks of 32 inputs
    """

    name: ClassVar[str] = "quantize-weights"
    effect: ClassVar[Effect] = Effect.BOUNDED

    bits: Literal[8, 4] = 8
    block: int = 0
    symmetric: bool = True
    scales: Literal["minmax", "mse"] = "mse"
    exclude: tuple[str, ...] = ()
    tied: bool = False
    min_sqnr_db: float = 10.0  # type: ignore[misc]  # a budget that users can set

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UsageError(f"{self.name}: bits must be 8 or 4, not {self.bits}")
        check_block(self.name, self.block)

    def rewrite(self, rw: Rewrite) -> None:
        """Choose the layers, then a grid for each block of each."""
        if not self.symmetric and rw.context.target == "tensorrt":
            raise UsageError(
                f"{self.name}: TensorRT takes weights without zero points only; leave out "
                "symmetric=false"
            )
        products = list(rw.calls(*PRODUCTS))
        check_globs(self.exclude, {layer_name(node) for node in products})
        changed = False
        for layer in self._chosen(rw, products):
            self._quantise(rw, layer)
            changed = True
        if changed:
            rw.set_origin(rw.before.origin or Origin(rw.before, {}))

    def _chosen(self, rw: Rewrite, products: list[fx.Node]) -> Iterator[Layer]:
        """The layers to quantise; remarks say why others are not."""
        for node in products:
            layer = layer_at(rw.program, node)
            if layer is None or stored_weight(rw.program, node) is not None:
                continue
            reason = why_not_stored(layer, self.exclude, tied=self.tied)
            if reason:
                rw.skip(node, reason)
            else:
                yield layer

    def _quantise(self, rw: Rewrite, layer: Layer) -> None:
        node, name = layer.node, str(layer.weight.target)
        weight = rw.program.tensor(name).detach()
        inputs = layer.matrix(weight).shape[-1]
        block = fitting_block(inputs, self.block)
        grid = weight_grid(self.bits, symmetric=self.symmetric)
        rows = as_rows(weight, layer, block)
        insert_blocks(rw, layer, block_parameters(rows, grid, self.scales, name), block)
        how = "one scale per channel" if block == inputs else f"blocks of {block} inputs"
        if inputs % block:
            how += f", the last of {inputs % block}"
        rw.applied(node, f"{layer_name(node)}: {grid}, {how}")
        if self.block and (self.block != block or inputs % block):
            rw.note(node, f"blocks of {self.block} do not divide its {inputs} inputs: {how}")

"""Quantise matrix products with activation ranges found at run time: dynamic int8, without data.

    y = linear(x, W, b)
      -->
    s = dynamic_scale(x, 0, 255);  z = dynamic_zero_point(x, s, 0, 255)
    y = linear(fake_quant(x, s, z), fake_quant(W, s_W, 0, axis=0), b)

Weights get one symmetric int8 scale per output channel, as static quantisation gives them; the
grid of an activation is unsigned and spans the tensor's own range at each run, so that nothing is
calibrated and nothing is ever clipped. Products that read one tensor share its quantisation.

Runtimes: ONNX Runtime runs DynamicQuantizeLinear and an integer product (fused where one product
reads the tensor). OpenVINO and TVM compute the same function in float arithmetic and store int8
weights; OpenVINO's own dynamic quantisation, another function (groups of 32 inputs, symmetric),
acts on weight-only programs that are loaded without ``strict_precision``.

Limits: matrix products with a constant matrix; the range is the tensor's, so samples of one batch
influence one another by rounding. On x86 without VNNI, ONNX Runtime's u8 x s8 products saturate in
16 bits: give ``reduce_range``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from pruna_ir.calibration import layer_name
from pruna_ir.kernels.dynamic_range import SCALE, ZERO_POINT
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.linear_layers import Layer, layer_at
from pruna_ir.passes.weight_blocks import (
    PRODUCTS,
    as_rows,
    block_parameters,
    check_globs,
    insert_blocks,
    stored_weight,
    why_not_stored,
)
from pruna_ir.program import Origin, dtype_of
from pruna_ir.quantization import S8_WEIGHT, U8_ASYMMETRIC, Grid
from pruna_ir.transform import Effect, Pass, Rewrite

_SEVEN_BITS = Grid(-63, 63, symmetric=True)


@dataclass(frozen=True)
class QuantizeDynamically(Pass):
    """Round weights to int8 per channel and activations to uint8 by their range at run time.

    Options:
        scales: how weight scales are chosen: ``minmax``, or ``mse`` per channel.
        reduce_range: give weights 7 bits, for processors whose 8-bit products saturate.
        exclude: globs over module paths whose layers stay float, such as ``lm_head``.
        tied: quantise weights that other nodes read too; those keep the float tensor.
        min_sqnr_db: the lowest signal-to-quantisation-noise ratio of any output that the pipeline
            accepts.
    """

    name: ClassVar[str] = "quantize-dynamically"
    effect: ClassVar[Effect] = Effect.BOUNDED

    scales: Literal["minmax", "mse"] = "minmax"
    reduce_range: bool = False
    exclude: tuple[str, ...] = ()
    tied: bool = False
    min_sqnr_db: float = 15.0  # type: ignore[misc]  # a budget that users can set

    def rewrite(self, rw: Rewrite) -> None:
        """Choose the layers, then round what each reads."""
        products = list(rw.calls(*PRODUCTS))
        check_globs(self.exclude, {layer_name(node) for node in products})
        rounded: dict[fx.Node, fx.Node] = {}
        for node in products:
            layer = layer_at(rw.program, node)
            if layer is None or stored_weight(rw.program, node) is not None:
                continue
            reason = why_not_stored(layer, self.exclude, tied=self.tied) or _why_no_input(layer)
            if reason:
                rw.skip(node, reason)
                continue
            self._quantise_weight(rw, layer)
            source = layer.input
            if source not in rounded:
                rounded[source] = _rounded(rw, source, node)
            rw.update(node, **{layer.form.input: rounded[source]})
            rw.applied(node, f"{layer_name(node)}: int8, activations ranged at run time")
        if rounded:
            rw.set_origin(rw.before.origin or Origin(rw.before, {}))

    def _quantise_weight(self, rw: Rewrite, layer: Layer) -> None:
        name = str(layer.weight.target)
        weight = rw.program.tensor(name).detach()
        inputs = layer.matrix(weight).shape[-1]
        grid = _SEVEN_BITS if self.reduce_range else S8_WEIGHT
        rows = as_rows(weight, layer, inputs)
        insert_blocks(rw, layer, block_parameters(rows, grid, self.scales, name), inputs)


def _why_no_input(layer: Layer) -> str:
    if layer.input.target is FAKE_QUANT.op:
        return "its input is quantised already"
    return "" if str(dtype_of(layer.input)) == "torch.float32" else "its input is not float32"


def _rounded(rw: Rewrite, source: fx.Node, before: fx.Node) -> fx.Node:
    """The fake-quant of a tensor by its own range, in front of its first product."""
    low, high = U8_ASYMMETRIC.qmin, U8_ASYMMETRIC.qmax
    scale = rw.insert(SCALE.op, before=before, like=before, x=source, qmin=low, qmax=high)
    zero = rw.insert(
        ZERO_POINT.op, before=before, like=before, x=source, scale=scale, qmin=low, qmax=high
    )
    return rw.insert(
        FAKE_QUANT.op, before=before, like=before, x=source, scale=scale, zero_point=zero,
        axis=None, qmin=low, qmax=high,
    )  # fmt: skip

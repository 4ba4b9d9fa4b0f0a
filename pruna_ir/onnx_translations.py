"""Operators that we translate for ``torch.onnx``, and one mend of what it makes of others.

    pruna.fake_quant(x, s, z, ...)   -->   pruna::FakeQuant(x, s, z), replaced after the export
    pruna.dynamic_scale, dynamic_zero_point   -->   pruna::DynamicScale, DynamicZeroPoint; likewise
    aten.one_hot(x, n)               -->   OneHot(x, n, [0, 1])
    aten.gelu(x)                     -->   x * (Erf(x / sqrt(2)) + 1) * 0.5, in this order

ONNX Runtime has a kernel for GELU and recognises it by this order; ``torch.onnx`` takes another.
``OneHot`` counts negative classes from the end, where PyTorch raises; both are outside what the
program may be given.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pruna_ir.errors import LoweringError
from pruna_ir.registry import kernels

DOMAIN = "pruna"
"""The domain of operators that stand in the graph between the export and their replacement."""
FAKE_QUANT = "FakeQuant"
DYNAMIC_SCALE, DYNAMIC_ZERO_POINT = "DynamicScale", "DynamicZeroPoint"


def translations() -> dict[Any, Any]:
    """The operators that we translate ourselves, for ``custom_translation_table``."""
    kernels()
    return {
        torch.ops.pruna.fake_quant.default: _fake_quant(),
        **dynamic_ranges(),
        torch.ops.aten.one_hot.default: _one_hot,
        torch.ops.aten.gelu.default: _gelu,
    }


def dynamic_ranges() -> dict[Any, Any]:
    """The operators that find a tensor's range at run time, with their translations."""
    kernels()
    return {
        torch.ops.pruna.dynamic_scale.default: _dynamic(DYNAMIC_SCALE, ("x",), "tensor(float)"),
        torch.ops.pruna.dynamic_zero_point.default: _dynamic(
            DYNAMIC_ZERO_POINT, ("x", "scale"), "tensor(int32)"
        ),
    }


def keep_constants(graph: Any) -> None:
    """Enter every constant that a node reads among the graph's initializers, in place.

    ONNX Script's rewriter names the bounds of a ``Clip`` that it fuses after the tensor that is
    clipped: where one tensor is clipped twice, the second pair drives the first out of the graph.
    """
    known = graph.initializers
    values = [value for node in graph.all_nodes() for value in node.inputs if value is not None]
    for value in values:
        if value.producer() is not None or value.const_value is None or value.is_initializer():
            continue
        name, number = value.name, 0
        while value.name in known:
            number += 1
            value.name = f"{name}_{number}"
        known[value.name] = value


def _one_hot(self: Any, num_classes: int) -> Any:
    """``aten.one_hot`` as ``OneHot``; ``torch.onnx`` would decompose it into an assertion."""
    from onnxscript import opset18 as op

    if num_classes < 0:
        raise LoweringError("one_hot takes its number of classes from the data; state num_classes")
    depth, values = op.Constant(value_int=num_classes), op.Constant(value_ints=[0, 1])
    return op.OneHot(self, depth, values, axis=-1)


def _gelu(self: Any, approximate: str = "none") -> Any:
    """``aten.gelu``, exactly or by the hyperbolic tangent (Hendrycks and Gimpel, 2016)."""
    from onnxscript import opset18 as op

    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), self)

    if approximate == "tanh":
        cube = op.Mul(op.Pow(self, number(3.0)), number(0.044715))
        inner = op.Mul(op.Add(self, cube), number(math.sqrt(2.0 / math.pi)))
        return op.Mul(op.Mul(self, number(0.5)), op.Add(op.Tanh(inner), number(1.0)))
    factor = op.Erf(op.Div(self, number(math.sqrt(2.0))))
    return op.Mul(op.Mul(self, op.Add(factor, number(1.0))), number(0.5))


def _fake_quant() -> Any:
    """A translation of ``pruna::fake_quant`` into one ONNX node that keeps its constants.

    Only after the translation is it known which inputs are weights; the node is replaced then.
    """
    import onnx
    import onnxscript

    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    node = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        FAKE_QUANT,
        schema(
            FAKE_QUANT,
            DOMAIN,
            1,
            inputs=[parameter("x", "T"), parameter("scale", "T"), parameter("zero_point", "Z")],
            outputs=[parameter("y", "T")],
            type_constraints=[
                ("T", ["tensor(float)"], ""),
                ("Z", ["tensor(float)", "tensor(int32)", "tensor(int64)", "tensor(int8)"], ""),
            ],
            attributes=[
                schema.Attribute(name, schema.AttrType.INT)
                for name in ("per_channel", "axis", "qmin", "qmax")
            ],
        ),
    )

    def fake_quant(
        x: Any, scale: Any, zero_point: Any, axis: int | None, qmin: int, qmax: int
    ) -> Any:
        per_channel = int(axis is not None)
        axis = 0 if axis is None else axis % len(x.shape)
        return node(
            x, scale, zero_point, per_channel=per_channel, axis=axis, qmin=qmin, qmax=qmax
        )

    return fake_quant


def _dynamic(name: str, inputs: tuple[str, ...], result: str) -> Any:
    """A translation into one ONNX node; it goes when the FakeQuant that reads it is replaced."""
    import onnx
    import onnxscript

    schema, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    node = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        name,
        schema(
            name,
            DOMAIN,
            1,
            inputs=[parameter(own, "T") for own in inputs],
            outputs=[parameter("y", "Y")],
            type_constraints=[("T", ["tensor(float)"], ""), ("Y", [result], "")],
            attributes=[
                schema.Attribute(own, schema.AttrType.INT) for own in ("qmin", "qmax")
            ],
        ),
    )

    def scale(x: Any, qmin: int, qmax: int) -> Any:
        return node(x, qmin=qmin, qmax=qmax)

    def zero_point(x: Any, scale: Any, qmin: int, qmax: int) -> Any:
        return node(x, scale, qmin=qmin, qmax=qmax)

    return scale if len(inputs) == 1 else zero_point

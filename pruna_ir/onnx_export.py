"""ONNX export: from a Program to an ``onnx.ModelProto``, shared by the backends that start there.

The program is exported again, translated by ``torch.onnx`` and then put into the shape that
runtimes expect of a quantised model:

    fake_quant(x)             ->  DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    fake_quant(x, own range)  ->  DequantizeLinear(DynamicQuantizeLinear(x))
    fake_quant(W)             ->  DequantizeLinear(W8, s, z)
    transpose(fake_quant(W))  ->  DequantizeLinear(transpose(W8), s, z)
                                  where W8 = clip(rint(W / s) + z, qmin, qmax)

``rint`` rounds half to even and the division is in float32: what ``QuantizeLinear`` specifies
(ONNX operators, QuantizeLinear-19). Every DequantizeLinear of a weight owns its scale and zero
point: OpenVINO leaves linears in float32 when two nodes share one.

A range narrower than the 8-bit type (an int4 grid, or -127..127) is kept exactly: weights are
clipped when they are quantised, activations by a ``Clip`` before the ``QuantizeLinear``, never
between the pair.

Limits: scales and zero points must be constants of the program; a model must stay under
protobuf's 2 GiB.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pruna_ir.errors import LoweringError
from pruna_ir.onnx_attention import with_plain_attention
from pruna_ir.onnx_projections import with_split_projections
from pruna_ir.onnx_splits import with_plain_splits
from pruna_ir.onnx_translations import (
    DOMAIN,
    DYNAMIC_SCALE,
    DYNAMIC_ZERO_POINT,
    FAKE_QUANT,
    dynamic_ranges,
    keep_constants,
    translations,
)
from pruna_ir.program import Program, TensorSpec
from pruna_ir.reexport import reexport

OPSET = 18
"""The operator set that ``torch.onnx`` itself is written for, so nothing is converted."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_BYTE_RANGES = {np.dtype(np.int8): (-128, 127), np.dtype(np.uint8): (0, 255)}


def export_onnx(program: Program, *, opset: int = OPSET, int8_weights: bool = True) -> Any:
    """The program as a checked ``onnx.ModelProto`` with the program's input and output names.

    ONNX forbids an output with the name of an input: it gets ``_output`` behind its name.

    Args:
        program: float32 or with ``fake_quant`` operators in it.
        opset: the version of the standard operator set.
        int8_weights: store quantised weights as 8-bit integers with a DequantizeLinear; float
            weights with both operators otherwise.

    Raises:
        LoweringError: ``torch.onnx`` cannot translate the program, or a quantiser has a form
            that ONNX cannot state.

    >>> from pruna_ir.capture import capture
    >>> model = export_onnx(capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),)))
    >>> [node.op_type for node in model.graph.node], model.graph.output[0].name
    (['Gemm'], 'output')
    """
    import onnx

    model = _translate(program, opset)
    _lower_fake_quants(_Graph(model.graph), int8_weights)
    _drop_domain(model)
    _drop_traces(model.graph)
    _rename(model, program)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise LoweringError(f"torch.onnx wrote a model that ONNX refuses: {error}") from error
    return model


def module_scopes(node: Any) -> list[str]:
    """Where an ONNX node of ours comes from: module paths, and the name of the torch node last.

    Empty for a node that the export itself added.
    """
    noted = [entry.value for entry in node.metadata_props if entry.key == _SCOPES]
    return [str(scope) for scope in ast.literal_eval(noted[0])] if noted else []


# -- translation ---------------------------------------------------------------------------------


def _translate(program: Program, opset: int) -> Any:
    plain = with_split_projections(with_plain_splits(with_plain_attention(program)))
    exported = reexport(plain, keep=dynamic_ranges())
    try:
        result = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations(),
            verbose=False,
        )
    except Exception as error:
        raise LoweringError(f"torch.onnx cannot translate the program: {_cause(error)}") from error
    if result is None:
        raise LoweringError("torch.onnx returned no model")
    keep_constants(result.model.graph)
    try:
        return result.model_proto
    except ValueError as error:
        raise LoweringError(f"the model does not fit into ONNX's 2 GiB: {error}") from error


def _cause(error: BaseException) -> str:
    """The first line of the innermost error, ahead of it the node that was being translated."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    lines = [(str(link).strip().splitlines() or [type(link).__name__])[0] for link in chain]
    nodes = [line.partition(". See")[0] for line in lines if "translating node" in line]
    return ": ".join(dict.fromkeys([*nodes[:1], lines[-1]]))


# -- quantisers ----------------------------------------------------------------------------------


class _Graph:
    """An ONNX graph under edit: constants and readers by name, fresh names."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.initializers = {tensor.name: tensor for tensor in proto.initializer}
        self._taken = set(self.initializers) | {v.name for v in proto.input}
        self._taken |= {name for node in proto.node for name in node.output}

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        from onnx import numpy_helper

        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_constant(self, value: np.ndarray[Any, Any], name: str) -> str:
        from onnx import numpy_helper

        name = self.fresh(name)
        tensor = numpy_helper.from_array(value, name)
        self.initializers[name] = tensor
        return name

    def fresh(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        return unique

    def finish(self, nodes: Iterable[Any]) -> None:
        """Set the nodes; keep the constants and the value types that are still in use."""
        kept = list(nodes)
        del self.proto.node[:]
        self.proto.node.extend(kept)
        used = {name for node in kept for name in node.input} | {v.name for v in self.proto.output}
        made = {name for node in kept for name in node.output}
        constants = [tensor for name, tensor in self.initializers.items() if name in used]
        values = [value for value in self.proto.value_info if value.name in made]
        del self.proto.initializer[:], self.proto.value_info[:]
        self.proto.initializer.extend(constants)
        self.proto.value_info.extend(values)


@dataclass(frozen=True)
class _Quantizer:
    """One FakeQuant node with its constants.

    Attributes:
        scale: float32, [] or [channels].
        zero_point: int8 or uint8, of the shape of ``scale``.
        axis: the channel's dimension; None where there is one scale for all.
    """

    x: str
    y: str
    scale: np.ndarray[Any, Any]
    zero_point: np.ndarray[Any, Any]
    axis: int | None
    qmin: int
    qmax: int

    @staticmethod
    def read(graph: _Graph, node: Any) -> _Quantizer:
        """The quantiser that a FakeQuant node states.

        Raises:
            LoweringError: its scale or zero point is computed, or its range exceeds 8 bits.
        """
        attributes = {a.name: a.i for a in node.attribute}
        qmin, qmax = attributes["qmin"], attributes["qmax"]
        scale, zero_point = (graph.constant(name) for name in node.input[1:3])
        if scale is None or zero_point is None:
            raise LoweringError(
                f"{node.output[0]}: fake_quant reads a computed scale or zero point; ONNX "
                "artifacts need calibrated constants"
            )
        dtype = np.dtype(np.int8 if qmin < 0 else np.uint8)
        lowest, highest = _BYTE_RANGES[dtype]
        if not lowest <= qmin <= qmax <= highest:
            raise LoweringError(
                f"{node.output[0]}: fake_quant has the range [{qmin}, {qmax}], which no 8-bit "
                "integer type holds"
            )
        shape = scale.shape if attributes["per_channel"] else ()
        points = np.broadcast_to(zero_point, scale.shape).astype(dtype).reshape(shape)
        axis = attributes["axis"] if attributes["per_channel"] else None
        return _Quantizer(
            node.input[0],
            node.output[0],
            np.array(scale, dtype=np.float32, order="C").reshape(shape),
            points,
            axis,
            qmin,
            qmax,
        )

    @property
    def is_narrow(self) -> bool:
        """Whether the range is smaller than the integer type's."""
        return bool((self.qmin, self.qmax) != _BYTE_RANGES[self.zero_point.dtype])

    def bounds(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The smallest and the largest real value of the grid, in the shape of ``scale``."""
        points = self.zero_point.astype(np.float32)
        return (self.qmin - points) * self.scale, (self.qmax - points) * self.scale

    def along(self, values: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
        """Per-channel values, shaped to broadcast against a tensor of this rank."""
        if self.axis is None:
            return values
        shape = [1] * rank
        shape[self.axis] = -1
        return values.reshape(shape)

    def quantize(self, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``clip(rint(weight / scale) + zero_point, qmin, qmax)`` in the integer type."""
        scale = self.along(self.scale, weight.ndim)
        points = self.along(self.zero_point, weight.ndim).astype(np.int32)
        grid = np.rint(weight.astype(np.float32) / scale) + points
        return np.asarray(np.clip(grid, self.qmin, self.qmax), dtype=self.zero_point.dtype)


def _lower_fake_quants(graph: _Graph, int8_weights: bool) -> None:
    nodes: list[Any] = []
    weights: dict[str, _Quantizer] = {}
    makers = {name: node for node in graph.proto.node for name in node.output}
    for node in graph.proto.node:
        if node.domain == DOMAIN and node.op_type in (DYNAMIC_SCALE, DYNAMIC_ZERO_POINT):
            continue
        if node.domain == DOMAIN and node.op_type == FAKE_QUANT:
            if _is_dynamic(node, makers):
                nodes += _dynamic(graph, node)
                continue
            quantizer = _Quantizer.read(graph, node)
            if int8_weights and quantizer.x in graph.initializers:
                weights[quantizer.y] = quantizer
            else:
                nodes += _activation(graph, quantizer)
            continue
        nodes.append(node)
    graph.finish(_lower_weights(graph, nodes, weights))


def _is_dynamic(node: Any, makers: Mapping[str, Any]) -> bool:
    """Whether a FakeQuant rounds a tensor to 8 unsigned bits by the tensor's own range."""
    found = [makers[name] for name in node.input[1:3] if name in makers]
    attributes = {a.name: a.i for a in node.attribute}
    return (
        [maker.op_type for maker in found] == [DYNAMIC_SCALE, DYNAMIC_ZERO_POINT]
        and all(maker.input[0] == node.input[0] for maker in found)
        and (attributes["qmin"], attributes["qmax"]) == (0, 255)
    )


def _dynamic(graph: _Graph, node: Any) -> Iterator[Any]:
    from onnx import helper

    (result,) = node.output
    names = [graph.fresh(f"{result}_{part}") for part in ("quantized", "scale", "zero_point")]
    yield helper.make_node("DynamicQuantizeLinear", node.input[:1], names, name=names[0])
    yield helper.make_node("DequantizeLinear", names, [result], name=result)


def _activation(graph: _Graph, q: _Quantizer) -> Iterator[Any]:
    from onnx import helper

    scale = graph.add_constant(q.scale, f"{q.y}_scale")
    point = graph.add_constant(q.zero_point, f"{q.y}_zero_point")
    axis = {} if q.axis is None else {"axis": q.axis}
    source = q.x
    if q.is_narrow:
        lowest, highest = q.bounds()
        if q.x in graph.initializers:
            clipped = _clipped(q, graph.constant(q.x))
            source = graph.add_constant(clipped, f"{q.y}_clipped")
        elif q.axis is not None:
            raise LoweringError(
                f"{q.y}: fake_quant of an activation has a scale per channel and the narrow "
                f"range [{q.qmin}, {q.qmax}]; use one scale, or the full range"
            )
        else:
            source = graph.fresh(f"{q.y}_clipped")
            low = graph.add_constant(lowest, f"{q.y}_lowest")
            high = graph.add_constant(highest, f"{q.y}_highest")
            yield helper.make_node("Clip", [q.x, low, high], [source], name=source)
    quantized = graph.fresh(f"{q.y}_quantized")
    yield helper.make_node(
        "QuantizeLinear", [source, scale, point], [quantized], name=quantized, **axis
    )
    yield helper.make_node("DequantizeLinear", [quantized, scale, point], [q.y], name=q.y, **axis)


def _clipped(q: _Quantizer, weight: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    assert weight is not None
    low, high = (q.along(bound, weight.ndim) for bound in q.bounds())
    return np.asarray(np.clip(weight, low, high))


def _lower_weights(
    graph: _Graph, nodes: list[Any], weights: dict[str, _Quantizer]
) -> Iterator[Any]:
    """The nodes with a DequantizeLinear ahead of each reader of a quantised weight.

    A transposition of a weight is carried out on its integers.
    """
    done: dict[str, np.ndarray[Any, Any]] = {}

    def integers(q: _Quantizer) -> np.ndarray[Any, Any]:
        if q.y not in done:
            weight = graph.constant(q.x)
            assert weight is not None
            done[q.y] = q.quantize(weight)
        return done[q.y]

    placed: set[str] = set()
    outputs = {value.name for value in graph.proto.output}
    for node in nodes:
        if node.op_type == "Transpose" and node.input[0] in weights:
            q = weights[node.input[0]]
            order = _permutation(node, integers(q).ndim)
            axis = None if q.axis is None else order.index(q.axis)
            yield _dequantize(graph, q, integers(q).transpose(order), axis, node.output[0])
            continue
        for name in dict.fromkeys(node.input):
            if name in weights and name not in placed:
                placed.add(name)
                q = weights[name]
                yield _dequantize(graph, q, integers(q), q.axis, name)
        yield node
    for name in sorted(outputs & set(weights) - placed):
        yield _dequantize(graph, weights[name], integers(weights[name]), weights[name].axis, name)


def _permutation(node: Any, rank: int) -> list[int]:
    given = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return given[0] if given else list(reversed(range(rank)))


def _dequantize(
    graph: _Graph, q: _Quantizer, integers: np.ndarray[Any, Any], axis: int | None, output: str
) -> Any:
    from onnx import helper

    names = [
        graph.add_constant(np.ascontiguousarray(integers), f"{q.x}_quantized"),
        graph.add_constant(q.scale, f"{output}_scale"),
        graph.add_constant(q.zero_point, f"{output}_zero_point"),
    ]
    chosen = {} if axis is None else {"axis": axis}
    return helper.make_node("DequantizeLinear", names, [output], name=output, **chosen)


def _drop_domain(model: Any) -> None:
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _drop_traces(graph: Any) -> None:
    """Leave of the exporter's notes the module path alone: source paths are no one else's."""
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    for value in (*graph.input, *graph.output, *graph.value_info):
        del value.metadata_props[:]


# -- names ---------------------------------------------------------------------------------------


def _rename(model: Any, program: Program) -> None:
    """Give inputs, outputs and dynamic dimensions the names that the program has for them."""
    graph = model.graph
    _own_outputs(graph)
    symbols = _symbols(graph.input, program.inputs)
    given = {spec.name for spec in program.inputs}
    wanted = {v.name: s.name for v, s in zip(graph.input, program.inputs, strict=True)}
    for value, spec in zip(graph.output, program.outputs, strict=True):
        wanted[value.name] = f"{spec.name}_output" if spec.name in given else spec.name
    names = _without_clashes(graph, wanted)
    for node in graph.node:
        for values in (node.input, node.output):
            for position, name in enumerate(values):
                values[position] = names.get(name, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r"\w+", lambda m: symbols.get(m.group(), m.group()), size.dim_param
                )
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _own_outputs(graph: Any) -> None:
    """An Identity for each output that is an input, a constant, or a second name of an output."""
    from onnx import helper

    made = {name for node in graph.node for name in node.output}
    seen: set[str] = set()
    for value in graph.output:
        if value.name not in made or value.name in seen:
            own = f"{value.name}_output_{len(seen)}"
            graph.node.append(helper.make_node("Identity", [value.name], [own], name=own))
            value.name = own
        seen.add(value.name)


def _symbols(inputs: Iterable[Any], specs: tuple[TensorSpec, ...]) -> dict[str, str]:
    symbols = {}
    for value, spec in zip(inputs, specs, strict=True):
        for size, wanted in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
            if size.dim_param and isinstance(wanted, str):
                symbols[size.dim_param] = wanted
    return symbols


def _without_clashes(graph: Any, wanted: dict[str, str]) -> dict[str, str]:
    """``wanted`` with new names for the inner values that bear a wanted name already."""
    inner = {name for node in graph.node for name in node.output}
    inner |= {tensor.name for tensor in graph.initializer}
    taken = inner | set(wanted.values()) | set(wanted)
    names = dict(wanted)
    for name in sorted(inner & set(wanted.values()) - set(wanted)):
        number = 1
        while f"{name}_{number}" in taken:
            number += 1
        names[name] = f"{name}_{number}"
        taken.add(names[name])
    return names

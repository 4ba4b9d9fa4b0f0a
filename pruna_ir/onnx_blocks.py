"""Weight-only products in the form that ONNX Runtime has kernels for.

    MatMul(x, views(DequantizeLinear(W8, s, z)))  -->  MatMulNBits(x, packed, scales, zero points)
    Gemm(x, views(DequantizeLinear(W8, s, z)), c) -->  Add(MatMulNBits(...), c)

``com.microsoft.MatMulNBits`` holds W [outputs, inputs] as unsigned integers of 4 or 8 bits in
blocks of 16 to 256 inputs, two nibbles a byte, the last block padded; zero points are packed
likewise and left out where all are the middle, 2^(bits - 1). A row that is one block (a scale per
channel) is stored in the blocks that take the least space, its scale repeated.

``accuracy_level`` is 1: float32 arithmetic, as the program has it. Left to itself, ONNX Runtime
turns a MatMul behind a DequantizeLinear into a MatMulNBits that rounds activations to 8 bits
(accuracy level 4), 1 % off; therefore int8 per channel is written in this form too.

A product whose other operand is dequantised as well runs on integers and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruna_ir.packed_weights import BlockedWeight, blocked, pack_nibbles

DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)
"""The block sizes that MatMulNBits has."""
_FLOAT32 = 1
_VIEWS = ("Reshape", "Slice", "Transpose")
Array = np.ndarray[Any, Any]


def pack_products(model: Any) -> int:
    """Give every weight-only product its packed form, in place; returns how many."""
    from onnx import helper

    graph = _Weights(model.graph)
    nodes: list[Any] = []
    count = 0
    for node in model.graph.node:
        weight = graph.weight(node)
        packed = None if weight is None else _pack(graph, node, weight)
        count += packed is not None
        nodes += [node] if packed is None else packed
    if count:
        graph.finish(nodes)
        if not any(entry.domain == DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return count


class _Weights:
    """A graph's constants, and what stands behind the weights of its products."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._makers = {name: node for node in proto.node for name in node.output}
        self._added: dict[str, Any] = {}

    def constant(self, name: str) -> Array | None:
        from onnx import numpy_helper

        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add(self, value: Array, name: str) -> str:
        from onnx import numpy_helper

        unique, number = name, 0
        while unique in self._constants or unique in self._added or unique in self._makers:
            number += 1
            unique = f"{name}_{number}"
        self._added[unique] = numpy_helper.from_array(value, unique)
        return unique

    def weight(self, node: Any) -> BlockedWeight | None:
        """The weight [outputs, inputs] of a product with one float operand; None elsewhere."""
        attributes = _attributes(node)
        if node.op_type == "Gemm":
            plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            if not plain or attributes.get("transA"):
                return None
        elif node.op_type != "MatMul":
            return None
        integers = self._integers(node.input[1])
        if integers is None or self._is_quantised(node.input[0]):
            return None
        if any(value.ndim != 2 for value in integers):
            return None
        # Laid out [inputs, outputs], unless a Gemm says otherwise.
        turned = integers if attributes.get("transB") else [value.T for value in integers]
        return blocked(*turned)

    def _is_quantised(self, name: str) -> bool:
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in _VIEWS:
            maker = self._makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _integers(self, name: str) -> list[Array] | None:
        """Integers, scales and zero points, element by element, behind views of a constant."""
        views: list[Any] = []
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in _VIEWS:
            views.append(maker)
            maker = self._makers.get(maker.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) != 3:
            return None
        parts = [self.constant(name) for name in maker.input]
        if any(part is None for part in parts):
            return None
        integers, *others = (np.asarray(part) for part in parts)
        shape = [1] * integers.ndim
        shape[_attributes(maker).get("axis", 1) if others[0].ndim else 0] = -1
        found = [integers, *(np.broadcast_to(v.reshape(shape), integers.shape) for v in others)]
        for view in reversed(views):
            moved = [self._viewed(view, value) for value in found]
            if any(value is None for value in moved):
                return None
            found = [np.asarray(value) for value in moved]
        return found

    def _viewed(self, view: Any, value: Array) -> Array | None:
        if view.op_type == "Transpose":
            return value.transpose(_attributes(view).get("perm"))
        if view.op_type == "Slice":
            return self._sliced(view, value)
        shape = self.constant(view.input[1])
        if shape is None or (shape == 0).any():
            return None
        return value.reshape(shape.tolist())

    def _sliced(self, view: Any, value: Array) -> Array | None:
        bounds = [self.constant(name) for name in view.input[1:]]
        if any(bound is None for bound in bounds):
            return None
        starts, ends, *rest = (np.asarray(bound).tolist() for bound in bounds)
        axes = rest[0] if rest else list(range(len(starts)))
        steps = rest[1] if len(rest) > 1 else [1] * len(starts)
        where = [slice(None)] * value.ndim
        for axis, *bound in zip(axes, starts, ends, steps, strict=True):
            where[axis] = slice(*bound)
        return value[tuple(where)]

    def finish(self, nodes: list[Any]) -> None:
        """Set the nodes; drop what nobody reads any longer."""
        needed = {value.name for value in self._proto.output}
        kept: list[Any] = []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        del self._proto.node[:], self._proto.initializer[:]
        self._proto.node.extend(reversed(kept))
        constants = {**self._constants, **self._added}
        self._proto.initializer.extend(t for name, t in constants.items() if name in needed)
        made = {name for node in kept for name in node.output}
        values = [value for value in self._proto.value_info if value.name in made]
        del self._proto.value_info[:]
        self._proto.value_info.extend(values)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@dataclass(frozen=True)
class Packed:
    """A weight as MatMulNBits stores it.

    Attributes:
        integers: uint8 [outputs, blocks, block * bits / 8].
        scale: float32 [outputs, blocks].
        zero_point: uint8 [outputs, bytes]; None where all are the middle of the range.
    """

    integers: Array
    scale: Array
    zero_point: Array | None
    block: int
    bits: int


def packed(weight: BlockedWeight) -> Packed | None:
    """A weight in the form of MatMulNBits; None where its blocks have a size that it lacks."""
    bits = weight.bits
    block = _best_block(weight, bits)
    if block is None:
        return None
    weight = weight.repeated(block)
    offset = 2 ** (bits - 1) if weight.integers.dtype == np.int8 else 0
    outputs, inputs = weight.integers.shape
    whole = np.zeros((outputs, -(-inputs // block) * block), dtype=np.uint8)
    whole[:, :inputs] = (weight.integers.astype(np.int16) + offset).astype(np.uint8)
    points = (weight.zero_point.astype(np.int16) + offset).astype(np.uint8)
    narrow = pack_nibbles if bits == 4 else np.ascontiguousarray
    return Packed(
        narrow(whole.reshape(outputs, -1, block)),
        weight.scale,
        None if (points == 2 ** (bits - 1)).all() else narrow(points),
        block,
        bits,
    )


def _best_block(weight: BlockedWeight, bits: int) -> int | None:
    """The block that takes the least space: 4 bytes a scale, and what the last block is padded."""
    inputs = weight.integers.shape[1]
    whole = weight.block == inputs
    usable = [b for b in BLOCKS if whole or weight.block % b == 0]
    return min(usable, key=lambda b: -(-inputs // b) * (b * bits // 8 + 4), default=None)


def _pack(graph: _Weights, node: Any, weight: BlockedWeight) -> list[Any] | None:
    found = packed(weight)
    return None if found is None else list(_products(graph, node, weight, found))


def _products(graph: _Weights, node: Any, weight: BlockedWeight, found: Packed) -> Iterator[Any]:
    from onnx import helper

    (result,) = node.output
    bias = node.input[2] if len(node.input) > 2 else ""
    product = f"{result}_product" if bias else result
    inputs = [
        node.input[0],
        graph.add(found.integers, f"{node.name}_integers"),
        graph.add(found.scale.reshape(-1), f"{node.name}_scales"),
    ]
    if found.zero_point is not None:
        inputs.append(graph.add(found.zero_point.reshape(-1), f"{node.name}_zero_points"))
    outputs, size = weight.integers.shape
    made = [
        helper.make_node(
            "MatMulNBits", inputs, [product], name=node.name, domain=DOMAIN, K=size, N=outputs,
            bits=found.bits, block_size=found.block, accuracy_level=_FLOAT32,
        )
    ]  # fmt: skip
    if bias:
        made.append(helper.make_node("Add", [product, bias], [result], name=f"{node.name}_bias"))
    for part in made:
        part.metadata_props.extend(node.metadata_props)
    yield from made

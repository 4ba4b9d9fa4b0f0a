"""Products on integers, in the form of ONNX Runtime's own kernel.

    MatMul(DequantizeLinear(A8, s, z), DequantizeLinear(B8, t, w)) + c
      -->
    com.microsoft.MatMulIntegerToFloat(A8, B8, s, t, z, w, c)

ONNX Runtime makes that operator itself, but leaves the bias to an Add: a pass over the result more
for each product (a tenth of the time of an int8 ViT-Ti). Written here, the operator needs no
optimiser either. ``A8`` is uint8 (the kernel is slow for int8), its scale a number; ``B8`` has one
scale, or one for each column. Either may be computed, as query and key of attention are; then

    MatMul(DequantizeLinear(A8), Transpose(DequantizeLinear(B8))) * number

becomes one operator too, with integers transposed and the number in the scale of ``A8``. What a
QuantizeLinear reads is left to ONNX Runtime, which has an operator for integers on both sides.

A projection that is only read in slices of its columns (queries, keys and values) is computed in
slices, each with those columns of the weight: copying them apart takes longer than a product more.

A Gemm of two dequantised matrices is split first, since there is no kernel for one:

    Gemm(DequantizeLinear(A8), DequantizeLinear(B8), c)
      -->
    Add(MatMul(DequantizeLinear(A8), DequantizeLinear(B8')), c)    B8' = B8, transposed if transB
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

DOMAIN = "com.microsoft"
KIND = "MatMulIntegerToFloat"
Array = np.ndarray[Any, Any]


def integer_products(model: Any) -> int:
    """Give products of two dequantised tensors this form, in place; returns how many."""
    from onnx import helper

    split_gemms(model.graph)
    graph = _Graph(model.graph)
    count = sum(graph.fuse(node) for node in list(model.graph.node) if node.op_type == "MatMul")
    if count:
        graph.finish()
        if not any(entry.domain == DOMAIN for entry in model.opset_import):
            model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return count


class _Graph:
    """A graph under rewrite: makers and readers of its values, its constants, and new nodes."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._makers = {name: node for node in proto.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in proto.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in proto.output}
        self._ranks = {
            value.name: len(value.type.tensor_type.shape.dim) for value in proto.value_info
        }
        self._new: dict[str, list[Any]] = {}

    def fuse(self, product: Any) -> bool:
        """Note what takes the place of a product and of what follows it; whether anything does."""
        left = self._dequantize(product.input[0])
        right, transpose = self._right(product)
        if left is None or right is None:
            return False
        if not self._is_bytes(left) or not self._has_columns(right, transpose):
            return False
        last, factor = self._scaled(product, left)
        last, row = self._biased(last, right)
        result = last.output[0]
        readers = [] if result in self._outputs else self._readers.get(result, [])
        if any(reader.op_type == "QuantizeLinear" for reader in readers):
            return False
        a, scale, a_zero = left.input
        b, b_scale, b_zero = right.input
        if factor != 1.0:
            scale = self._add(self._number(scale) * np.float32(factor), f"{product.name}_scale")
        ahead: list[Any] = []
        if transpose is not None:
            b, ahead = self._turned(right, transpose)
        columns = [b, b_scale, b_zero, *row]
        parts = [] if factor != 1.0 else self._slices(readers, b)
        for number, (part, start, end) in enumerate(parts):
            cut = [self._columns(name, start, end) for name in columns]
            self._put(part.output[0], product, f"_{number}", [a, scale, a_zero], cut, [])
        if not parts:
            self._put(result, product, "", [a, scale, a_zero], columns, ahead)
        return True

    def _put(
        self, result: str, product: Any, ending: str, left: list[str], right: list[str],
        ahead: list[Any],
    ) -> None:  # fmt: skip
        """Let an integer product make a value, with what must stand ahead of it."""
        (a, scale, zero), (b, b_scale, b_zero, *row) = left, right
        kernel = _node(KIND, [a, b, scale, b_scale, zero, b_zero, *row], result, domain=DOMAIN)
        kernel.name = f"{product.name}{ending}"
        # Whose module it is: profiles name it after that.
        kernel.metadata_props.extend(product.metadata_props)
        self._new[result] = [*ahead, kernel]

    def _turned(self, dequantize: Any, transpose: Any) -> tuple[str, list[Any]]:
        """The transposed integers, and the node that makes them if there is none yet."""
        name = f"{transpose.output[0]}_quantized"
        if name in self._makers:
            return name, []
        self._makers[name] = _node(
            "Transpose", dequantize.input[:1], name, transpose.attribute
        )
        return name, [self._makers[name]]

    def _slices(self, readers: list[Any], weight: str) -> list[tuple[Any, int, int]]:
        """The readers with their first and last column, where all are slices of columns."""
        matrix = self._constants.get(weight)
        if matrix is None or len(matrix.dims) != 2 or len(readers) < 2:
            return []
        found = [self._slice(reader, matrix.dims[1]) for reader in readers]
        return [each for each in found if each is not None] if None not in found else []

    def _slice(self, node: Any, columns: int) -> tuple[Any, int, int] | None:
        if node.op_type != "Slice" or len(node.input) < 4:
            return None
        given = [self._value(name) for name in node.input[1:]]
        if any(value is None or value.size != 1 for value in given):
            return None
        start, end, axis, *step = (int(value.item()) for value in given if value is not None)
        rank = self._ranks.get(node.input[0])
        if axis not in (-1, None if rank is None else rank - 1) or step not in ([], [1]):
            return None
        begin, stop, _ = slice(start, end).indices(columns)
        return (node, begin, stop) if begin < stop else None

    def _columns(self, name: str, start: int, end: int) -> str:
        """Some columns of a constant; itself where it is one number."""
        value = self._value(name)
        assert value is not None
        if not value.ndim:
            return name
        return self._add(np.ascontiguousarray(value[..., start:end]), f"{name}_{start}_{end}")

    def _dequantize(self, name: str) -> Any:
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear" or len(maker.input) < 3:
            return None
        return maker

    def _right(self, product: Any) -> tuple[Any, Any]:
        """What dequantises the second operand, and the Transpose behind it, if there is one."""
        maker = self._makers.get(product.input[1])
        if maker is not None and maker.op_type == "Transpose":
            return self._dequantize(maker.input[0]), maker
        return self._dequantize(product.input[1]), None

    def _is_bytes(self, dequantize: Any) -> bool:
        """Whether an operand is uint8 with one scale."""
        _, scale, zero = dequantize.input
        if self._is_dynamic(dequantize):
            return True
        numbers, point = self._value(scale), self._value(zero)
        return (
            numbers is not None and numbers.ndim == 0
            and point is not None and point.dtype == np.uint8
        )  # fmt: skip

    def _is_dynamic(self, dequantize: Any) -> bool:
        maker = self._makers.get(dequantize.input[1])
        return maker is not None and maker.op_type == "DynamicQuantizeLinear"

    def _has_columns(self, dequantize: Any, transpose: Any) -> bool:
        """Whether an operand has one scale, or is a matrix with one for each column."""
        values, scale, zero = dequantize.input
        numbers, matrix = self._value(scale), self._constants.get(values)
        if numbers is None or zero not in self._constants:
            return False
        if numbers.ndim == 0:
            return True
        axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
        return transpose is None and matrix is not None and axis % 2 == len(matrix.dims) - 1 == 1

    def _scaled(self, product: Any, left: Any) -> tuple[Any, float]:
        """The Mul by a positive number behind a product, and the number; else itself and 1."""
        follower = self._only_reader(product)
        if follower is None or follower.op_type != "Mul" or self._is_dynamic(left):
            return product, 1.0
        number = self._value(_other(follower, product))
        if number is None or number.ndim or not number > 0:
            return product, 1.0
        return follower, float(number)

    def _biased(self, last: Any, right: Any) -> tuple[Any, list[str]]:
        """The Add of a constant row behind a product with a weight, and the row."""
        follower, weight = self._only_reader(last), self._constants.get(right.input[0])
        if follower is None or follower.op_type != "Add" or weight is None:
            return last, []
        row = _other(follower, last)
        added = self._constants.get(row)
        if added is None or list(added.dims) != [weight.dims[-1]]:
            return last, []
        return follower, [row]

    def _only_reader(self, node: Any) -> Any:
        (result,) = node.output
        readers = self._readers.get(result, [])
        return readers[0] if len(readers) == 1 and result not in self._outputs else None

    def _value(self, name: str) -> Array | None:
        from onnx import numpy_helper

        tensor = self._constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def _number(self, name: str) -> Array:
        value = self._value(name)
        assert value is not None
        return value

    def _add(self, value: Array, name: str) -> str:
        from onnx import numpy_helper

        self._constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def finish(self) -> None:
        """Put the new nodes in place, and drop nodes, constants and notes that nobody needs."""
        nodes = [
            each
            for node in self._proto.node
            for each in self._new.get(node.output[0] if node.output else "", [node])
        ]
        read = set(self._outputs)
        kept = []
        for node in reversed(nodes):
            if read.intersection(node.output):
                kept.append(node)
                read.update(node.input)
        made = {name for node in kept for name in node.output}
        notes = [value for value in self._proto.value_info if value.name in made]
        constants = [tensor for name, tensor in self._constants.items() if name in read]
        del self._proto.node[:], self._proto.value_info[:], self._proto.initializer[:]
        self._proto.node.extend(reversed(kept))
        self._proto.value_info.extend(notes)
        self._proto.initializer.extend(constants)


def _node(
    kind: str, inputs: Sequence[str], output: str, attributes: Iterable[Any] = (), domain: str = ""
) -> Any:
    from onnx import helper

    node = helper.make_node(kind, inputs, [output], name=output, domain=domain)
    node.attribute.extend(attributes)
    return node


def _other(node: Any, known: Any) -> str:
    """The operand of a node with two that another node does not make."""
    first, second = node.input
    return str(second if first == known.output[0] else first)


def split_gemms(graph: Any) -> int:
    """Split, in place, every Gemm of two dequantised matrices; returns how many (see above)."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = {n.output[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes: list[Any] = []
    count = 0
    for node in graph.node:
        parts = _split(node, constants, dequantized, readers) if node.op_type == "Gemm" else None
        count += parts is not None
        for part in parts or ():
            # Whose module they are: profiles name them after it.
            part.metadata_props.extend(node.metadata_props)
        nodes += [node] if parts is None else parts
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    return count


def _split(
    gemm: Any, constants: dict[str, Any], dequantized: dict[str, Any], readers: Counter[str]
) -> list[Any] | None:
    """MatMul and Add for a Gemm; None where it is not of that form."""
    from onnx import helper

    attributes = {a.name: helper.get_attribute_value(a) for a in gemm.attribute}
    plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    weight = dequantized.get(gemm.input[1])
    if not plain or attributes.get("transA") or weight is None:
        return None
    if gemm.input[0] not in dequantized or weight.input[0] not in constants:
        return None
    if attributes.get("transB") and not _transpose(weight, constants, readers):
        return None
    (result,) = gemm.output
    if len(gemm.input) < 3:
        return [helper.make_node("MatMul", gemm.input[:2], [result], name=gemm.name)]
    product = f"{result}_product"
    return [
        helper.make_node("MatMul", gemm.input[:2], [product], name=gemm.name),
        helper.make_node("Add", [product, gemm.input[2]], [result], name=f"{gemm.name}_bias"),
    ]


def _transpose(weight: Any, constants: dict[str, Any], readers: Counter[str]) -> bool:
    """Transpose a weight's integers under its DequantizeLinear, where nobody else reads them."""
    from onnx import numpy_helper

    name = weight.input[0]
    if readers[name] > 1 or readers[weight.output[0]] > 1:
        return False
    integers = numpy_helper.to_array(constants[name])
    constants[name] = numpy_helper.from_array(np.array(integers.T, order="C"), name)
    for attribute in weight.attribute:
        if attribute.name == "axis":
            attribute.i = 1 - attribute.i % 2
    return True

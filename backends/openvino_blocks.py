"""Weight-only products in the form that OpenVINO keeps compressed.

    MatMul(x, views(Multiply(Subtract(Convert(W8), z), s)))
      -->
    MatMul(x, Reshape(Multiply(Subtract(Convert(W), Convert(z)), s)), transpose_b)

    W [outputs, blocks, block] in i4, u4, i8 or u8; z likewise, left out where it is 0
    s [outputs, blocks, 1] float32; without the middle dimension and the Reshape where a row is
    one block; where its last block is short, W and x get zeros behind each row

The CPU plugin fuses this into the product: the integers stay as they are in memory and are
expanded inside the kernel. Any other arrangement of blocks (two dimensions, a transposition
behind) is expanded ahead of the product at every run. Weights of products whose other operand is
quantised are left alone: those run on integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pruna_ir.packed_weights import BlockedWeight, blocked, pack_nibbles

Array = np.ndarray[Any, Any]
_VIEWS = ("Reshape", "Transpose")
_SLICE = "Slice"


def compress_products(model: Any, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Give every weight-only product of a model its compressed form; returns how many.

    Args:
        model: changed in place.
        shapes: the inputs and outputs of products with a matrix, by name: OpenVINO lets a reshape
            in front of a product follow the other operand's size, which may be open.
    """
    count = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "MatMul" or _is_quantised(op.input_value(0)):
            continue
        turned = op.get_attributes()["transpose_b"]
        shape = shapes.get(op.get_friendly_name())
        found = _integers(op.input_value(1), shape[::-1] if shape and turned else shape)
        if found is None or any(value.ndim != 2 for value in found):
            continue
        weight = blocked(*(found if turned else [value.T for value in found]))
        _replace(op, weight)
        count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _is_quantised(output: Any) -> bool:
    node = output.get_node()
    while node.get_type_name() in _VIEWS:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _integers(output: Any, shape: tuple[int, ...] | None = None) -> list[Array] | None:
    """Integers, scales and zero points, element by element, behind views; None elsewhere.

    ``shape`` is what the output is known to have.
    """
    node = output.get_node()
    if node.get_type_name() == _SLICE:
        return _sliced(node)
    if node.get_type_name() in _VIEWS:
        how = _constant(node.input_value(1))
        if node.get_type_name() == "Transpose":
            found = _integers(node.input_value(0), shape[::-1] if shape else None)
            return None if found is None or how is None else [v.transpose(how) for v in found]
        found = _integers(node.input_value(0))
        wanted = shape if how is None else tuple(how.tolist())
        if found is None or wanted is None or 0 in wanted:
            return None
        return [value.reshape(wanted) for value in found]
    if node.get_type_name() != "Multiply":
        return None
    scale, levels = _constant(node.input_value(1)), node.input_value(0).get_node()
    zero: Array | None = np.zeros((), dtype=np.float32)
    if levels.get_type_name() == "Subtract":
        zero, levels = _constant(levels.input_value(1)), levels.input_value(0).get_node()
    if scale is None or zero is None or levels.get_type_name() != "Convert":
        return None
    integers = _constant(levels.input_value(0))
    if integers is None or integers.dtype not in (np.int8, np.uint8):
        return None
    zero = zero.astype(integers.dtype)
    return [integers, *(np.broadcast_to(value, integers.shape) for value in (scale, zero))]


def _sliced(node: Any) -> list[Array] | None:
    found = _integers(node.input_value(0))
    bounds = [_constant(node.input_value(i)) for i in range(1, len(node.inputs()))]
    if found is None or len(bounds) != 4 or any(bound is None for bound in bounds):
        return None
    where = [slice(None)] * found[0].ndim
    starts, stops, steps, axes = (np.asarray(bound).tolist() for bound in bounds)
    for axis, *bound in zip(axes, starts, stops, steps, strict=True):
        where[axis] = slice(*bound)
    return [value[tuple(where)] for value in found]


def _constant(output: Any) -> Array | None:
    node = output.get_node()
    return np.asarray(node.data) if node.get_type_name() == "Constant" else None


def _compressed(weight: BlockedWeight) -> Any:
    """The output of the expression that yields a weight [outputs, inputs]."""
    from openvino import opset13 as ops

    outputs, inputs = weight.integers.shape
    whole = weight.block == inputs
    shape = (outputs, inputs) if whole else (outputs, inputs // weight.block, weight.block)
    along = (outputs, 1) if whole else (outputs, inputs // weight.block, 1)
    value = ops.convert(_stored(weight.integers.reshape(shape), weight.bits), "f32")
    if weight.zero_point.any():
        zero = _stored(weight.zero_point.reshape(along), weight.bits)
        value = ops.subtract(value, ops.convert(zero, "f32"))
    value = ops.multiply(value, ops.constant(weight.scale.reshape(along)))
    if not whole:
        value = ops.reshape(value, ops.constant(np.array([outputs, inputs])), special_zero=False)
    return value.output(0)


def _stored(values: Array, bits: int) -> Any:
    """A constant of integers, two to a byte where they have 4 bits."""
    import openvino as ov
    from openvino import opset13 as ops

    if bits == 8:
        return ops.constant(np.ascontiguousarray(values))
    kind = ov.Type.i4 if values.dtype == np.int8 else ov.Type.u4
    # Memory of its own: a constant from an array would share the array's.
    tensor = ov.Tensor(kind, ov.Shape(list(values.shape)))
    tensor.data.reshape(-1)[:] = pack_nibbles(values.reshape(-1))
    return ops.constant(tensor)


def _replace(matmul: Any, weight: BlockedWeight) -> None:
    from openvino import opset13 as ops

    value, first = matmul.input_value(0), matmul.get_attributes()["transpose_a"]
    short = -weight.integers.shape[1] % weight.block
    if short:
        widths = [0] * value.get_partial_shape().rank.get_length()
        widths[-2 if first else -1] = short
        value = ops.pad(value, np.zeros_like(widths), np.array(widths), "constant", 0.0)
    new = ops.matmul(value, _compressed(weight.padded()), first, transpose_b=True)
    new.set_friendly_name(matmul.get_friendly_name())
    matmul.output(0).replace(new.output(0))

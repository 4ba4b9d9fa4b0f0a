"""OpenVINO: integer convolutions whose result is a single pixel, kept from a faulty kernel.

Measured with OpenVINO 2026.4.1 (its oneDNN 3.13) on x86-64 with AVX-512 VNNI: where a dynamic
batch turns out as 1 and the result of an int8 convolution is [1, C, 1, 1], a constant per channel
that is fused behind the convolution ([1, C, 1, 1] too) looks like a whole tensor to oneDNN. Its
usual int8 kernels then decline, and ``gemm_s8u8s32`` takes over, which

- sums the integers up in the buffer that holds the other operand of a fused residual add, and
  so adds the raw sums in place of that operand: results are wrong by factors up to 10^6 (a zero
  point of that operand becomes such a constant per channel, where the convolution has no bias);
- applies constants per channel before a fused FakeQuantize wrongly.

A static batch of 1 and all other sizes are right. The mend keeps such things from being fused:

    f(conv(x) + b)   ->   f(max_pool_1x1(conv(x) + b))

where every spatial size may be 1 and ``f``, a chain of operators that OpenVINO fuses, adds another
computed tensor or holds a constant per channel. The bias and functions without such constants
fuse as ever. A maximum over one pixel changes no bit, and OpenVINO does not optimise it away.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData",
                          "GroupConvolutionBackpropData"})  # fmt: skip
FUSED = frozenset(
    {
        "Abs", "Add", "Clamp", "Convert", "Divide", "Elu", "FakeQuantize", "Gelu", "HSigmoid",
        "HSwish", "HardSigmoid", "LeakyRelu", "Mish", "Multiply", "PRelu", "Relu", "Sigmoid",
        "SoftPlus", "Sqrt", "Subtract", "Swish", "Tanh",
    }
)  # fmt: skip
"""What OpenVINO fuses into a convolution, element by element."""
SUMS = frozenset({"Add", "Subtract"})
STORED = frozenset({"i8", "u8"})


def separate_single_pixels(model: Any) -> int:
    """Put a max pool of one pixel behind each convolution that needs it; returns how many.

    The shapes of the model's inputs must be set, and its values propagated.
    """
    constants = _constants(model)
    put = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() not in CONVOLUTIONS:
            continue
        if not _may_be_one_pixel(op.output(0)) or not _is_stored_integers(op.input_value(1)):
            continue
        last = _with_bias(op, constants)
        if _fuses_what_it_must_not(last, constants):
            _put_pool(last.output(0))
            put += 1
    return put


def _constants(model: Any) -> set[str]:
    """The names of the operators that depend on constants alone."""
    found: set[str] = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Parameter" and all(
            value.get_node().get_name() in found for value in op.input_values()
        ):
            found.add(op.get_name())
    return found


def _with_bias(node: Any, constants: Collection[str]) -> Any:
    """A convolution, or the add of its bias."""
    reader = _only_reader(node)
    if reader is None or reader.get_type_name() != "Add":
        return node
    return reader if len(_computed(reader, constants)) == 1 else node


def _fuses_what_it_must_not(node: Any, constants: Collection[str]) -> bool:
    """Whether a sum with a computed tensor, or a constant per channel, follows in the chain."""
    while (reader := _only_reader(node)) is not None and reader.get_type_name() in FUSED:
        if len(_computed(reader, constants)) > 1:
            return reader.get_type_name() in SUMS
        if any(_size(value) != 1 for value in reader.input_values() if _fixed(value, constants)):
            return True
        node = reader
    return False


def _only_reader(node: Any) -> Any:
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _computed(node: Any, constants: Collection[str]) -> list[Any]:
    return [value for value in node.input_values() if not _fixed(value, constants)]


def _fixed(value: Any, constants: Collection[str]) -> bool:
    return value.get_node().get_name() in constants


def _size(value: Any) -> int:
    """The number of elements; 0 where it is unknown."""
    shape = value.get_partial_shape()
    return 0 if shape.is_dynamic else int(np.prod(list(shape.to_shape())))


def _may_be_one_pixel(output: Any) -> bool:
    """Whether the batch is dynamic, and it and all spatial sizes may be 1."""
    shape = output.get_partial_shape()
    if shape.rank.is_dynamic or shape.rank.get_length() not in (3, 4, 5):
        return False
    return shape[0].is_dynamic and all(
        shape[axis].get_min_length() <= 1 for axis in (0, *range(2, shape.rank.get_length()))
    )


def _is_stored_integers(output: Any) -> bool:
    """Whether a weight is an integer constant behind its conversion, zero point and scale."""
    node = output.get_node()
    while node.get_type_name() in ("Multiply", "Subtract", "Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return (
        node.get_type_name() == "Constant"
        and node.get_output_element_type(0).get_type_name() in STORED
    )


def _put_pool(value: Any) -> None:
    from openvino import opset13 as ops

    spatial = value.get_partial_shape().rank.get_length() - 2
    ones, zeros = [1] * spatial, [0] * spatial
    readers = list(value.get_target_inputs())
    pool = ops.max_pool(value, ones, ones, zeros, zeros, ones)
    pool.set_friendly_name(f"{value.get_node().get_friendly_name()}/single_pixel")
    for reader in readers:
        reader.replace_source_output(pool.output(0))

"""Convolutions of a program as oneDNN runs them fastest: weights laid out once, ends fused.

    conv2d(x, W, b)                    -> packed(x, W', b)
    add(conv2d(x, W, b), y)            -> packed(x, W', b, + y)
    relu(...)                          -> the same, with its result rectified in place

torch lays out the weight, the input and the output of an ordinary convolution afresh on each call:
on a ResNet-50 that is half of its time. Here W' is W in oneDNN's own layout, and activations are
channels-last, which need no change in between. What stands in the middle of a fused chain is not
computed, so that nobody else may want it.

`Layouts` tells what becomes of that layout. Operators that do not care for strides take and give
channels-last values; for all others they are made contiguous, as the program had them.

Limits: float32 on CPUs, constant weights, graphs without operators that write into their
operands, values that are contiguous in the program. Results differ from the program's by rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from pruna_ir.call import bind_arguments
from pruna_ir.program import Program, dtype_of, shape_of

aten = torch.ops.aten

_KEEP_LAYOUT = frozenset(
    {
        aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
        aten.batch_norm.default, aten.cat.default, aten.conv2d.default,
    }
)  # fmt: skip
"""Beside the pointwise ones: what gives channels-last images for such."""


@dataclass(eq=False)
class PackedConvolution:
    """One convolution with its epilogue; called with what its nodes hold.

    Attributes:
        conv: the convolution.
        last: the node whose value this computes.
        other: what is added, if anything.
        relu: whether a ReLU ends it.
    """

    conv: fx.Node
    last: fx.Node
    other: fx.Node | None
    relu: bool
    weight: torch.Tensor
    bias: torch.Tensor | None
    source: fx.Node
    geometry: tuple[list[int], list[int], list[int], int]
    _packed: torch.Tensor | None = field(default=None, repr=False)

    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose values it needs."""
        return (self.source,) if self.other is None else (self.source, self.other)

    def __call__(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """The value of ``last``, [batch, channels, height, width], channels-last."""
        if not x.numel():
            return self._plain(x, other)
        padding, stride, dilation, groups = self.geometry
        if self._packed is None:
            # (torch's stub lacks the last argument)
            self._packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                self.weight.to_mkldnn(), padding, stride, dilation, groups, list(x.shape)
            )
        shared = (self._packed, self.bias, padding, stride, dilation, groups)
        convolution = torch.ops.mkldnn._convolution_pointwise
        result: torch.Tensor
        if other is None:
            result = convolution.default(x, *shared, "none", [], "")
        else:
            result = convolution.binary(x, other, *shared, "add", 1.0, None, [], None)
        # Not oneDNN's own ReLU, which makes 0 of NaN.
        return torch.relu_(result) if self.relu else result

    def _plain(self, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        padding, stride, dilation, groups = self.geometry
        result = aten.conv2d.default(
            x, self.weight, self.bias, stride, padding, dilation, groups
        )
        result = result if other is None else result + other
        return torch.relu(result) if self.relu else result


def packed_convolutions(
    program: Program, kept: Collection[fx.Node]
) -> dict[fx.Node, PackedConvolution]:
    """The convolutions that can be packed, by the last node of each.

    Args:
        program: what is run; its graph may be under rewrite.
        kept: the nodes whose values somebody wants to see.
    """
    if not torch._C._has_mkldnn or _writes(program):
        return {}
    found, wanted = {}, set(kept)
    for node in program.calls(aten.conv2d.default):
        if not _is_plain_image(node):
            continue
        packed = _packed(program, node)
        if packed is not None:
            _fuse(packed, wanted)
            found[packed.last] = packed
    return found


def _writes(program: Program) -> bool:
    """Whether an operator of the graph writes into its operands."""
    schemas = (getattr(node.target, "_schema", None) for node in program.calls())
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _is_plain_image(node: fx.Node) -> bool:
    """Whether a value is a contiguous float32 tensor of four dimensions on the CPU."""
    return dtype_of(node) == torch.float32 and _is_image(node)


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.dim() == 4
        and is_contiguous(value)
    )


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a (fake) tensor is contiguous whatever its symbolic sizes are."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def _packed(program: Program, node: fx.Node) -> PackedConvolution | None:
    """One convolution by itself; None where its weight or bias is no constant."""
    bound = bind_arguments(node)
    source, weight, bias = bound["input"], bound["weight"], bound["bias"]
    constants = [part for part in (weight, bias) if part is not None]
    if not _is_plain_image(source) or any(part.op != "get_attr" for part in constants):
        return None
    tensors = [program.tensor(str(part.target)) for part in constants]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    lists = [_pair(bound[name]) for name in ("padding", "stride", "dilation")]
    if not all(isinstance(number, int) for numbers in lists for number in numbers):
        return None
    return PackedConvolution(
        conv=node, last=node, other=None, relu=False, weight=tensors[0].detach().contiguous(),
        bias=tensors[1].detach() if bias is not None else None, source=source,
        geometry=(lists[0], lists[1], lists[2], bound["groups"]),
    )  # fmt: skip


def _pair(numbers: Any) -> list[int]:
    listed = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
    return listed * 2 if len(listed) == 1 else listed


def _fuse(packed: PackedConvolution, kept: set[fx.Node]) -> None:
    """Take in the nodes that follow, as far as nobody wants what is in between."""
    follower = _only_reader(packed.last, kept)
    if follower is not None and follower.target is aten.add.Tensor:
        other = _addend(follower, packed.last)
        if other is not None:
            packed.last, packed.other = follower, other
            # It may be a convolution too, which must then not claim the sum for itself.
            kept.add(other)
            follower = _only_reader(packed.last, kept)
    if follower is not None and follower.target is aten.relu.default:
        packed.last, packed.relu = follower, True


def _only_reader(node: fx.Node, kept: set[fx.Node]) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 and node not in kept else None


def _addend(add: fx.Node, conv: fx.Node) -> fx.Node | None:
    """What is added to a convolution's result; None where it is not a tensor of its shape."""
    bound = bind_arguments(add)
    other = next((bound[name] for name in ("self", "other") if bound[name] is not conv), None)
    if not isinstance(other, fx.Node) or bound["alpha"] != 1 or not _is_plain_image(other):
        return None
    same = zip(shape_of(other) or (), shape_of(conv) or (), strict=True)
    return other if all(statically_known_true(a == b) for a, b in same) else None


class Layouts:
    """Which values are channels-last though the program has them contiguous.

    Args:
        packed: the nodes whose values are so by themselves.
        keeping: further operators that give channels-last images for such.

    >>> layouts = Layouts(())
    """

    def __init__(self, packed: Collection[fx.Node], keeping: Collection[Any] = ()) -> None:
        self._packed = packed
        self._keeping = _KEEP_LAYOUT.union(keeping)
        self._changed: set[fx.Node] = set()

    def restores(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Which operands of a node must be made contiguous; call it on each node in order."""
        if node in self._packed:
            self._changed.add(node)
            return ()
        changed = tuple(source for source in node.all_input_nodes if source in self._changed)
        if not changed or _reads_sizes(node) or _averages_images(node):
            return ()
        if not self._keeps_layout(node) or not _is_image(node):
            return changed
        self._changed.add(node)
        return ()

    def _keeps_layout(self, node: fx.Node) -> bool:
        tags = getattr(node.target, "tags", ())
        return torch.Tag.pointwise in tags or node.target in self._keeping


def _reads_sizes(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _averages_images(node: fx.Node) -> bool:
    """Whether a node averages whole images: one number a channel has but one layout."""
    if node.target is not aten.mean.dim:
        return False
    axes = bind_arguments(node)["dim"]
    return axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]

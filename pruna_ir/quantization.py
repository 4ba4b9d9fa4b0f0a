"""Quantisation grids, what a target wants of them, and the arithmetic of scales and zero points.

An affine grid represents a real number r by an integer q (Jacob et al., CVPR 2018, equation 1):

    r = (q - zero_point) * scale        q = clamp(round(r / scale) + zero_point, qmin, qmax)

From an observed range [low, high], widened to hold 0 so that zero padding and ReLU are exact:

    asymmetric: scale = (high - low) / (qmax - qmin), zero_point = qmin - round(low / scale)
    symmetric:  scale = max(low / qmin, high / qmax), zero_point = 0

All of it in float64 with halves rounded to even; the scale is then stored in float32, and the zero
point follows from the *stored* scale. A range of nothing but zeros gets the scale 1; a scale below
the smallest normal float32 is raised to it, since runtimes flush subnormals to zero. NaN and
infinities are refused with the layer's name.

On a grid with ``powers``, the scale is the least power of two that is no smaller (Jain et al.,
MLSys 2020). Scaling by powers of two is exact in every float type, and so is every sum of fewer
than 24 bits: what a program computes then depends neither on the order of its sums nor on how a
runtime rescales its integers. Its zero point is even, so that halves, which are common then, round
to the same integer before the zero point is added as after it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from pruna_ir.call import Call, bind_arguments
from pruna_ir.errors import PassError, UsageError
from pruna_ir.program import Program, module_path

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal float32: no scale is below it."""


_aten = torch.ops.aten
MOVERS = frozenset(
    {
        _aten.cat.default, _aten.constant_pad_nd.default, _aten.max_pool1d.default,
        _aten.max_pool2d.default, _aten.max_pool3d.default, _aten.adaptive_max_pool2d.default,
        _aten.reshape.default, _aten.view.default, _aten.flatten.using_ints, _aten.transpose.int,
        _aten.permute.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default,
        _aten.unsqueeze.default, _aten.slice.Tensor, _aten.select.int, _aten.expand.default,
        _aten.pixel_shuffle.default, _aten.channel_shuffle.default, _aten.clone.default,
        _aten.contiguous.default, _aten.upsample_nearest2d.vec, _aten.upsample_nearest2d.default,
    }
)  # fmt: skip
"""Operators whose results hold values of their operands (or padding), and no others."""
PARTS = frozenset(
    {
        _aten.chunk.default, _aten.split.Tensor, _aten.split.sizes,
        _aten.split_with_sizes.default, _aten.unbind.int,
    }
)  # fmt: skip
"""Operators that return a list of parts of their operand."""


@dataclass(frozen=True)
class Grid:
    """The integers ``qmin..qmax``; ``symmetric`` fixes the zero point at 0.

    ``powers`` wants scales that are powers of two, and even zero points.

    >>> U8_ASYMMETRIC.bits, U8_ASYMMETRIC.dtype, S8_SYMMETRIC.dtype
    (8, torch.uint8, torch.int8)
    """

    qmin: int
    qmax: int
    symmetric: bool
    powers: bool = False

    def __post_init__(self) -> None:
        if not -(2**15) <= self.qmin <= 0 <= self.qmax < 2**16 or self.qmin == self.qmax:
            raise UsageError(
                f"a grid must hold 0 and lie within 16 bits, not {self.qmin}..{self.qmax}"
            )
        if self.symmetric and not self.qmin < 0 < self.qmax:
            raise UsageError(
                f"a symmetric grid needs integers on both sides of 0, not {self.qmin}..{self.qmax}"
            )

    @property
    def bits(self) -> int:
        """The bits that a value of the grid takes."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def dtype(self) -> torch.dtype:
        """The integer dtype that stores the grid."""
        if self.qmin < 0:
            return torch.int8 if self.qmin >= -128 and self.qmax <= 127 else torch.int16
        return torch.uint8 if self.qmax <= 255 else torch.uint16

    def with_bits(self, bits: int) -> Grid:
        """The grid of the same kind with other bits: signed or not, with -2**(bits - 1) or not.

        Raises:
            UsageError: such a grid has no value beside 0.

        >>> str(U8_ASYMMETRIC.with_bits(4)), str(S8_WEIGHT.with_bits(4))
        ('u4[0, 15]', 's4[-7, 7]')
        """
        if self.qmin == 0:
            return replace(self, qmax=2**bits - 1)
        half = 2 ** (bits - 1)
        low = 1 - half if self.qmin == -self.qmax else -half
        return replace(self, qmin=low, qmax=half - 1)

    def __str__(self) -> str:
        return f"{'s' if self.qmin < 0 else 'u'}{self.bits}[{self.qmin}, {self.qmax}]"


U8_ASYMMETRIC = Grid(0, 255, symmetric=False)
S8_ASYMMETRIC = Grid(-128, 127, symmetric=False)
S8_SYMMETRIC = Grid(-128, 127, symmetric=True)
S8_WEIGHT = Grid(-127, 127, symmetric=True)
"""Weights leave out -128, so that the grid is as symmetric as the range."""


@dataclass(frozen=True)
class QuantScheme:
    """How a target wants a program quantised; a backend states its own as ``scheme``.

    The defaults are what ONNX Runtime needs: it runs a convolution on integers only where input,
    weight and output are all quantised, and a product only where its operand is quantised right
    before it. TensorRT fuses by itself: ``residual="identity"``, ``layer_outputs=False``,
    ``repeat_behind_movers=False``. OpenVINO takes either.

    Attributes:
        activation: the grid of activations, one scale per tensor.
        weight: the grid of weights, one scale per output channel; symmetric.
        residual: which inputs of a residual add in a convolutional net are quantised: ``both``,
            only the ``identity`` (the one that the last convolution does not compute), ``none``.
            Residual adds of transformers never are.
        attention: quantise both operands of products of two activations (matmul, bmm).
        fused_attention: quantise query and key of fused attention, whose first product then runs
            on integers; the probabilities, and with them the value, stay float. ``plain``: only
            where it is one softmax over all keys of each query's own head, whatever its mask.
        signed_queries: queries and keys of fused attention take the signed grid with a zero point
            of 0.
        nearly_symmetric: an input of matrix products takes the signed grid with a zero point of 0
            where that makes its step at most this share larger: its integer kernels are faster.
        average_pool: quantise the inputs of average pools, so that they run on integers.
        layer_outputs: quantise the result of every quantised convolution and residual add (after
            its ReLU), even where only float operators read it.
        repeat_behind_movers: a quantised reader behind a max pool, concatenation or other operator
            that only moves values gets a fake-quant of its own, with the parameters of the
            mover's input; otherwise the target carries the quantisation through by itself.
    """

    activation: Grid
    weight: Grid = S8_WEIGHT
    residual: Literal["both", "identity", "none"] = "both"
    attention: bool = False
    fused_attention: Literal["none", "plain", "any"] = "none"
    signed_queries: bool = False
    nearly_symmetric: float = 0.0
    average_pool: bool = True
    layer_outputs: bool = True
    repeat_behind_movers: bool = True

    def __post_init__(self) -> None:
        if not self.weight.symmetric:
            raise UsageError(f"weights take a symmetric grid, not {self.weight}")


@dataclass(frozen=True)
class QuantParameters:
    """A scale (float32) and zero point (int32), [] or one per channel of ``axis``, on a grid."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    grid: Grid
    axis: int | None = None

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The grid's integers nearest to ``x``, as int32, computed in float64."""
        scale, zero = self._along(x)
        levels = torch.round(x.double() / scale) + zero
        return levels.clamp(self.grid.qmin, self.grid.qmax).to(torch.int32)

    def reals(self, q: torch.Tensor) -> torch.Tensor:
        """The float64 numbers that integers of the grid stand for."""
        scale, zero = self._along(q)
        return (q.double() - zero) * scale

    def _along(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.axis is None:
            return self.scale.double(), self.zero_point.double()
        shape = [-1] + [1] * (x.dim() - 1 - self.axis % x.dim())
        return self.scale.double().reshape(shape), self.zero_point.double().reshape(shape)


def choose_parameters(
    low: torch.Tensor | float,
    high: torch.Tensor | float,
    grid: Grid,
    layer: str,
    axis: int | None = None,
) -> QuantParameters:
    """The scale and zero point whose grid spans ``[low, high]`` and represents 0 exactly.

    Args:
        low: the least value, a number or [C]; above 0 counts as 0.
        high: the greatest value, likewise; below 0 counts as 0.
        grid: the integers.
        layer: named in the error.
        axis: the axis of the channels where ``low`` and ``high`` are [C].

    Raises:
        PassError: a bound is NaN or infinite, or ``low > high``.

    >>> parameters = choose_parameters(-1.0, 3.0, U8_ASYMMETRIC, "conv1")
    >>> float(parameters.scale), int(parameters.zero_point)
    (0.01568627543747425, 64)
    """
    least = torch.as_tensor(low, dtype=torch.float64)
    most = torch.as_tensor(high, dtype=torch.float64)
    if not (torch.isfinite(least).all() and torch.isfinite(most).all()):
        raise PassError(
            f"{layer}: its range holds NaN or infinity, which no grid can represent; look for "
            "an overflow in the model, or exclude the layer"
        )
    if (least > most).any():
        raise PassError(f"{layer}: its range is empty (low above high)")
    least, most = least.clamp(max=0.0), most.clamp(min=0.0)
    step = _scale(least, most, grid)
    scale = _stored(power_of_two(step) if grid.powers else step)
    largest = float(torch.maximum(least.abs(), most.abs()).max())
    if largest > torch.finfo(torch.float32).max or not torch.isfinite(scale).all():
        raise PassError(f"{layer}: its range goes beyond float32; exclude the layer")
    if grid.symmetric:
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero = _zero_point(least / scale.double(), grid)
    return QuantParameters(scale, zero, grid, axis)


def _scale(least: torch.Tensor, most: torch.Tensor, grid: Grid) -> torch.Tensor:
    if grid.symmetric:
        return torch.maximum(least / grid.qmin, most / grid.qmax)
    return (most - least) / (grid.qmax - grid.qmin)


def _zero_point(least: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The integer that stands for 0 where the least value is ``least`` steps (at most 0)."""
    every = 2 if grid.powers else 1
    exact = grid.qmin - every * torch.round(least / every)
    return exact.clamp(grid.qmin, grid.qmax - grid.qmax % every).to(torch.int32)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least powers of two that are no smaller, exactly; 0 for 0.

    >>> power_of_two(torch.tensor([0.3, 0.5, 0.0, 5.0], dtype=torch.float64))
    tensor([0.5000, 0.5000, 0.0000, 8.0000], dtype=torch.float64)
    """
    mantissa, exponent = torch.frexp(scale)
    raised = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(scale == 0, scale, torch.ldexp(torch.ones_like(scale), raised))


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """A float64 scale as it is stored: float32, 1 for 0, never subnormal."""
    return torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST_SCALE)).to(torch.float32)


def fake_quant_op() -> Any:
    """The operator ``pruna::fake_quant``, registered on first use."""
    from pruna_ir import registry

    return registry.load(registry.find(registry.KERNELS, "fake_quant")).op


@dataclass(frozen=True)
class QuantizedTensor:
    """One fake-quantised operand of a layer, for reports.

    Attributes:
        layer: the module path of the reading layer, or its node name.
        node: the reading node.
        operator: the reading operator, such as ``aten.conv2d``.
        operand: the reader's argument, such as ``weight``.
        bits: the bits of the grid.
        scale: the smallest and largest scale (equal where there is one); None where the program
            computes it at run time.
        zero_point: the smallest and largest zero point; None likewise.
        axis: the channel axis; None where the scale is one per tensor.
        grid: the integers, such as ``u8[0, 255]``.
    """

    layer: str
    node: str
    operator: str
    operand: str
    bits: int
    scale: tuple[float, float] | None
    zero_point: tuple[int, int] | None
    axis: int | None
    grid: str

    @property
    def ranged(self) -> str:
        """Since when the scale is known: ``ahead of time`` or ``at run time``."""
        return "at run time" if self.scale is None else "ahead of time"


def describe(program: Program) -> list[QuantizedTensor]:
    """One row per fake-quantised operand of each layer, in graph order; empty for a float program.

    An operand that reaches its layer through movers (max pool, reshape...) is described by the
    fake-quant before them; the movers themselves have no rows.
    """
    return [
        _row(program, node, operand, source)
        for node in program.calls()
        for operand, _, source in quantized_operands(node)
    ]


def quantized_operands(node: fx.Node) -> list[tuple[str, fx.Node, fx.Node]]:
    """The name and node of each fake-quantised operand of a layer, and its fake-quant.

    Empty for movers and fake-quants themselves, which are no layers.
    """
    op = fake_quant_op()
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is op:
        return []
    if node.target in MOVERS | PARTS:
        return []
    return [
        (operand, value, source)
        for operand, value in _operands(bind_arguments(node))
        if (source := _behind_movers(value)).target is op
    ]


def _behind_movers(node: fx.Node) -> fx.Node:
    """The node whose values a mover, or a chain of them, gives out."""
    while node.target in MOVERS | PARTS or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _operands(bound: Mapping[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    for name, value in bound.items():
        if isinstance(value, fx.Node):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from (
                (f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, fx.Node)
            )


def _row(program: Program, node: fx.Node, operand: str, source: fx.Node) -> QuantizedTensor:
    call = Call(program, source)
    scale, zero = call.parameter("scale"), call.parameter("zero_point")
    qmin, qmax = int(call.number("qmin")), int(call.number("qmax"))
    symmetric = qmin < 0 and zero is not None and not bool(zero.any())
    grid = Grid(qmin, qmax, symmetric=symmetric)
    return QuantizedTensor(
        layer=module_path(node) or node.name,
        node=node.name,
        operator=str(node.target).removesuffix(".default"),
        operand=operand,
        bits=grid.bits,
        scale=None if scale is None else (float(scale.min()), float(scale.max())),
        zero_point=None if zero is None else (int(zero.min()), int(zero.max())),
        axis=call.arg("axis"),
        grid=str(grid),
    )

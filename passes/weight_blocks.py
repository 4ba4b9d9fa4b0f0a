"""Weights on grids by blocks: how they stand in a program, and how their scales are chosen.

A weight of a matrix product is a matrix [outputs, inputs], cut along the inputs into blocks of
which each has a scale and a zero point of its own. It stays on the one operator:

    W                      [outputs, inputs]
    reshape                [outputs * blocks, block]
    fake_quant(axis=0)     scale, zero_point [outputs * blocks]
    reshape                [outputs, inputs]

with a transposition before and after where the weight is stored as [inputs, outputs] (``addmm``,
Hugging Face's Conv1D), and zeros in front of the first view, cut off behind the second, where the
last block of a row is not full. One block a row is the scale per output channel, without any view.

`StoredWeight` reads such a weight back. It follows elements, not patterns: every view between the
parameter and the reader moves each element somewhere, so the views are run on element numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, fx

from pruna_ir.calibration import layer_name
from pruna_ir.call import Call, bind_arguments
from pruna_ir.errors import UsageError
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.passes.linear_layers import FORMS, Layer, why_no_matrix
from pruna_ir.program import Program, shape_of
from pruna_ir.quantization import Grid, QuantParameters, choose_parameters
from pruna_ir.registry import unknown
from pruna_ir.transform import Rewrite

aten = torch.ops.aten

PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
"""The operators whose constant matrix is quantised by blocks."""
SMALLEST_BLOCK = 16
"""No runtime has kernels for smaller blocks."""
_FRACTIONS = torch.linspace(1.0, 0.5, 21, dtype=torch.float64)
_CHUNK = 1 << 22
"""Elements that are searched at a time."""
_VIEWS = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default,
        aten.t.default, aten.constant_pad_nd.default, aten.slice.Tensor,
    }
)  # fmt: skip

Scales = Literal["minmax", "mse"]


def weight_grid(bits: int, *, symmetric: bool) -> Grid:
    """The integers of weights: a symmetric 8-bit grid leaves out -128.

    >>> [str(weight_grid(bits, symmetric=s)) for bits in (8, 4) for s in (True, False)]
    ['s8[-127, 127]', 'u8[0, 255]', 's4[-8, 7]', 'u4[0, 15]']
    """
    if not symmetric:
        return Grid(0, 2**bits - 1, symmetric=False)
    return Grid(-127, 127, symmetric=True) if bits == 8 else Grid(-8, 7, symmetric=True)


def fitting_block(inputs: int, block: int) -> int:
    """The block that a row is cut into, given the wanted one (0 for the whole row).

    The wanted one is halved down to `SMALLEST_BLOCK` until it divides the row; where none does, it
    is taken as it is and the last block stays short. Never more than the row.

    >>> [fitting_block(inputs, 64) for inputs in (768, 800, 172, 48)], fitting_block(768, 0)
    ([64, 32, 64, 16], 768)
    """
    return _dividing(inputs, block) or (block if 0 < block < inputs else inputs)


def _dividing(inputs: int, block: int) -> int:
    while block >= SMALLEST_BLOCK:
        if inputs % block == 0:
            return block
        block //= 2
    return 0


def block_parameters(rows: Tensor, grid: Grid, scales: Scales, name: str) -> QuantParameters:
    """A scale and zero point for each row of [rows, block], chosen in float64.

    ``minmax`` spans the row; ``mse`` takes the fraction of it, of 21 between 1 and 0.5, at which
    the squared error is least.

    Raises:
        PassError: the weight holds NaN or infinity.
    """
    if not rows.numel():
        ones = rows.new_zeros(rows.shape[0], dtype=torch.float64)
        return choose_parameters(ones, ones, grid, name, 0)
    step = max(1, _CHUNK // rows.shape[1])
    found = [_chosen(part.double(), grid, scales, name) for part in torch.split(rows, step)]
    scale, zero = (torch.cat([getattr(p, k) for p in found]) for k in ("scale", "zero_point"))
    return QuantParameters(scale, zero, grid, 0)


def _chosen(rows: Tensor, grid: Grid, scales: Scales, name: str) -> QuantParameters:
    low, high = rows.amin(1), rows.amax(1)
    best = choose_parameters(low, high, grid, name, 0)
    if scales == "minmax":
        return best
    error = _error(rows, best)
    for fraction in _FRACTIONS[1:].tolist():
        tried = choose_parameters(low * fraction, high * fraction, grid, name, 0)
        found = _error(rows, tried)
        better = found < error
        error = torch.where(better, found, error)
        scale = torch.where(better, tried.scale, best.scale)
        zero = torch.where(better, tried.zero_point, best.zero_point)
        best = QuantParameters(scale, zero, grid, 0)
    return best


def _error(rows: Tensor, parameters: QuantParameters) -> Tensor:
    return (parameters.reals(parameters.integers(rows)) - rows).square().sum(1)


def as_rows(weight: Tensor, layer: Layer, block: int) -> Tensor:
    """A layer's weight as rows of blocks [outputs * blocks, block], short ones filled with 0."""
    matrix = layer.matrix(weight)[0]
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % block)).reshape(-1, block)


def insert_blocks(rw: Rewrite, layer: Layer, parameters: QuantParameters, block: int) -> fx.Node:
    """Let a layer read its weight on a grid by blocks; returns the fake-quant."""
    node, source = layer.node, layer.weight
    name = str(source.target)
    outputs, inputs = layer.matrix(rw.program.tensor(name))[0].shape
    turned, whole = layer.form.reads == 0, block == inputs
    value = source if whole else _cut(rw, layer, outputs, inputs, block)
    fake = rw.insert(
        FAKE_QUANT.op, before=node, like=node, x=value, axis=1 if turned and whole else 0,
        scale=rw.constant(parameters.scale, f"{name}_scale", before=node),
        zero_point=rw.constant(parameters.zero_point, f"{name}_zero_point", before=node),
        qmin=parameters.grid.qmin, qmax=parameters.grid.qmax,
    )  # fmt: skip
    value = fake if whole else _joined(rw, layer, fake, outputs, inputs)
    rw.update(node, **{layer.form.weight: value})
    return fake


def _cut(rw: Rewrite, layer: Layer, outputs: int, inputs: int, block: int) -> fx.Node:
    """The views from a parameter to rows of blocks."""
    node, value = layer.node, layer.weight
    if layer.form.reads == 0:
        value = _transposed(rw, value, node)
    if short := -inputs % block:
        value = rw.insert(
            aten.constant_pad_nd.default, before=node, like=node, self=value, pad=[0, short]
        )
    shape = [outputs * -(-inputs // block), block]
    return rw.insert(aten.reshape.default, before=node, like=node, self=value, shape=shape)


def _joined(rw: Rewrite, layer: Layer, value: fx.Node, outputs: int, inputs: int) -> fx.Node:
    """The views from rows of blocks to the layer's weight."""
    node = layer.node
    rows, block = (int(size) for size in shape_of(value) or ())
    width = rows * block // outputs
    shape = [outputs, width]
    value = rw.insert(aten.reshape.default, before=node, like=node, self=value, shape=shape)
    if width != inputs:
        value = rw.insert(
            aten.slice.Tensor, before=node, like=node, self=value, dim=1, start=0, end=inputs
        )
    return _transposed(rw, value, node) if layer.form.reads == 0 else value


def _transposed(rw: Rewrite, value: fx.Node, node: fx.Node) -> fx.Node:
    return rw.insert(aten.transpose.int, before=node, like=node, self=value, dim0=0, dim1=1)


# -- reading back --------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeight:
    """A matrix product whose weight is a constant on a grid.

    Attributes:
        node: the product.
        fake: the fake-quant of its weight.
        source: the parameter.
    """

    program: Program
    node: fx.Node
    fake: fx.Node
    source: fx.Node

    @property
    def layer(self) -> Layer:
        """The product as a layer; its weight is computed (`matrix` and `rows` serve)."""
        return Layer(self.program, self.node)

    def path(self) -> list[fx.Node]:
        """What stands between the parameter and the product, in order; the fake-quant included."""
        weight = bind_arguments(self.node)[self.layer.form.weight]
        behind, ahead = _views(weight, self.fake), _views(self._seen, self.source)
        return [*behind, self.fake, *ahead][::-1]

    @property
    def first(self) -> fx.Node:
        """The node that reads the parameter."""
        return self.path()[0]

    @property
    def grid(self) -> Grid:
        """The integers; symmetric where every zero point is 0."""
        call = Call(self.program, self.fake)
        zero = call.parameter("zero_point")
        assert zero is not None
        low, high = int(call.number("qmin")), int(call.number("qmax"))
        return Grid(low, high, symmetric=low < 0 and not bool(zero.any()))

    def weight(self) -> Tensor:
        """The float weight, [outputs, inputs], float64."""
        value = self.program.tensor(str(self.source.target)).detach()
        return self._spread(self._before(value)).double()

    def rounded(self) -> Tensor:
        """The weight as the product reads it, [outputs, inputs], float64."""
        value = self._before(self.program.tensor(str(self.source.target)).detach())
        bound = bind_arguments(self.fake)
        for key in ("scale", "zero_point"):
            bound[key] = self.program.tensor(str(bound[key].target)).detach()
        bound["x"] = value
        with torch.no_grad():
            return self._spread(FAKE_QUANT.op(**bound)).double()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """The scale and zero point of every element, [outputs, inputs], float64."""
        bound = bind_arguments(self.fake)
        values = (self.program.tensor(str(bound[key].target)) for key in ("scale", "zero_point"))
        scale, zero = (self._each(value.detach().double()) for value in values)
        return scale, zero

    def numbers(self) -> Tensor:
        """Which of the scales each element has, [outputs, inputs]."""
        scale = self.program.tensor(str(bind_arguments(self.fake)["scale"].target))
        return self._each(torch.arange(scale.numel(), device=scale.device))

    def _each(self, value: Tensor) -> Tensor:
        """One value, or one for each channel of the fake-quant, for every element."""
        bound = bind_arguments(self.fake)
        shape = tuple(int(size) for size in shape_of(bound["x"]) or ())
        along = [1] * len(shape)
        if bound["axis"] is not None:
            along[bound["axis"]] = -1
        return self._spread(value.reshape(along).expand(shape))

    def block(self) -> int:
        """How many inputs share a scale, from the start of each row on.

        0 where rows share scales, or blocks are not of one size.
        """
        numbers = self.numbers()
        outputs, inputs = numbers.shape
        changes = torch.nonzero(numbers[0].diff())
        size = int(changes[0]) + 1 if len(changes) else inputs
        count = -(-inputs // size)
        firsts = numbers[:, ::size]
        regular = torch.equal(firsts.repeat_interleave(size, 1)[:, :inputs], numbers)
        return size if regular and len(set(firsts.flatten().tolist())) == outputs * count else 0

    def stored(self, matrix: Tensor) -> Tensor:
        """A weight [outputs, inputs] in the parameter's own shape and order."""
        old = self.program.tensor(str(self.source.target))
        numbers = torch.arange(old.numel(), device=old.device).reshape(old.shape)
        places = self._spread(self._before(numbers))
        new = torch.empty(old.numel(), dtype=matrix.dtype, device=old.device)
        new[places.reshape(-1)] = matrix.reshape(-1)
        return new.reshape(old.shape)

    def _before(self, value: Tensor) -> Tensor:
        """The parameter as the fake-quant sees it."""
        return _run(reversed(list(_views(self._seen, self.source))), value)

    @property
    def _seen(self) -> fx.Node:
        source = bind_arguments(self.fake)["x"]
        assert isinstance(source, fx.Node)
        return source

    def _spread(self, value: Tensor) -> Tensor:
        """What the fake-quant yields, as [outputs, inputs]."""
        layer = self.layer
        views = list(_views(bind_arguments(self.node)[layer.form.weight], self.fake))
        return layer.matrix(_run(reversed(views), value))[0]


def _views(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while node is not end:
        yield node
        (node,) = node.all_input_nodes


def _run(views: Iterator[fx.Node], value: Tensor) -> Tensor:
    for view in views:
        args, kwargs = fx.map_arg((view.args, view.kwargs), lambda _: value)  # noqa: B023
        value = view.target(*args, **kwargs)  # type: ignore[operator]
    return value


def stored_weight(program: Program, node: fx.Node) -> StoredWeight | None:
    """The weight of a product, where it is a constant matrix on a grid; None elsewhere."""
    if node.target not in PRODUCTS:
        return None
    fake = _behind_views(bind_arguments(node)[FORMS[node.target].weight])
    if fake.target is not FAKE_QUANT.op:
        return None
    source = _behind_views(bind_arguments(fake)["x"])
    constants = (bind_arguments(fake)[key] for key in ("scale", "zero_point"))
    if source.op != "get_attr" or any(value.op != "get_attr" for value in constants):
        return None
    found = StoredWeight(program, node, fake, source)
    return found if found.weight().dim() == 2 else None


def _behind_views(node: fx.Node) -> fx.Node:
    while node.target in _VIEWS:
        (node,) = node.all_input_nodes
    return node


# -- choosing layers -----------------------------------------------------------------------------


def excluded(path: str, globs: tuple[str, ...]) -> str:
    """The glob that covers a module path; empty where none does."""
    hit = (g for g in globs if fnmatchcase(path, g) or fnmatchcase(path, f"{g}.*"))
    return next(hit, "")


def check_globs(globs: tuple[str, ...], paths: Collection[str]) -> None:
    """Refuse a glob that covers no layer.

    Raises:
        UsageError: with the nearest layer's name.
    """
    for glob in globs:
        if not any(excluded(path, (glob,)) for path in paths):
            raise UsageError(f"exclude: {unknown('layer', glob, paths)}")


def why_not_stored(layer: Layer, exclude: tuple[str, ...], *, tied: bool) -> str:
    """Why a product's weight is not put on a grid; empty where it can be."""
    if hit := excluded(layer_name(layer.node), exclude):
        return f"excluded by '{hit}'"
    if layer.weight.op != "get_attr":
        return "its weight is computed; where from constants, run fold-constants first"
    if not layer.weight.meta["val"].dtype.is_floating_point:
        return "its weight is no float tensor"
    why = why_no_matrix(layer)
    if "also read by" in why:
        return "" if tied else f"{why}; tied=true quantises it for this reader alone"
    return why


def check_block(name: str, block: int) -> None:
    """Refuse a block that no runtime has kernels for.

    Raises:
        UsageError: it is neither 0 nor a power of two from 16 to 256.
    """
    if block and (block & (block - 1) or not SMALLEST_BLOCK <= block <= 256):
        raise UsageError(
            f"{name}: block must be 16, 32, 64, 128 or 256 (or 0 for one scale per channel), "
            f"not {block}"
        )

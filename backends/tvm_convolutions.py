"""CPU schedules of convolutions on blocked tensors, [n, C/16, H, W, 16].

Weights are packed to [O/16, I/b, kh, kw, b, 16] (once, at load). A register tile holds up to 16
vectors, which are O blocks by output columns, over the whole reduction; what follows the
convolution element by element is computed where the tile is written:

    acc[o, x, :] += data[n, c/16, y*s + ky*d, (x0 + x)*s + kx*d, c%16] * packed[o, c, ky, kx, :]
    out[n, o, y, x0 + x, :] = epilogue(acc[o, x, :])

Groups are merged until a block of outputs belongs to one group (the packed weights hold zeros for
the rest); depthwise convolutions multiply lane by lane instead.

Limits: heights and widths are constants; a width without a divisor that fits into registers is
computed up to the next multiple, and its epilogue runs apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pruna_ir.backends.tvm_dot import BFLOAT16, INT8, dot, widened, word
from pruna_ir.backends.tvm_loops import LANES, extent

ACCUMULATE, PAD = "conv2d_blocked", "conv2d_pad"
_PACK = "conv2d_pack"
_BLOCKS, _COLUMNS = "tile_blocks", "tile_columns"
_OUT_ELEMENTWISE_FUSABLE = 4
_DOTS = {kind.depth: kind for kind in (INT8, BFLOAT16)}


@dataclass(frozen=True)
class Convolution:
    """The constants of a two-dimensional convolution.

    Attributes:
        inputs: channels of the data.
        outputs: channels of the result.
        kernel: height and width of the window.
        padding: top, left, bottom, right.
        quad: input channels that one multiplication takes: 1, or as many as a dot product.
    """

    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    quad: int = 1

    @property
    def is_depthwise(self) -> bool:
        """Whether every output channel reads the input channel of its own number, and no other."""
        return self.groups == self.inputs == self.outputs and self.groups > 1

    @property
    def blocks(self) -> int:
        """Blocks of output channels."""
        return -(-self.outputs // LANES)

    @property
    def merged(self) -> int:
        """How many groups are computed as one."""
        inputs, outputs = self.inputs // self.groups, self.outputs // self.groups
        fitting = (
            m
            for m in _divisors(self.groups)
            if outputs * m % LANES == inputs * m % self.quad == 0
        )
        return next(fitting, self.groups)

    @property
    def depth(self) -> int:
        """Input channels that one block of outputs reads, filled up to a multiple of `quad`."""
        return -(-self.inputs // self.groups * self.merged // self.quad) * self.quad

    @property
    def step(self) -> int:
        """Input channels of one step of the reduction: a power of two that divides `depth`."""
        return next(b for b in (16, 8, 4, 2, 1) if self.depth % b == 0)

    def first_channel(self, block: Any) -> Any:
        """The first input channel that a block of outputs reads."""
        if self.merged == self.groups:
            return 0
        return block * LANES // (self.outputs // self.groups * self.merged) * self.depth

    def size(self, axis: int, size: int) -> int:
        """Rows (axis 0) or columns (1) of the result for those of the data."""
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        padded = size + self.padding[axis] + self.padding[axis + 2]
        return (padded - reach) // self.strides[axis] + 1


def _divisors(value: int) -> Iterator[int]:
    return (d for d in range(1, value + 1) if value % d == 0)


@dataclass(frozen=True)
class Tile:
    """The part of a result that is held in registers: O blocks by columns."""

    blocks: int
    columns: int


def tile(blocks: int, columns: int, vectors: int) -> Tile:
    """The tile that the rule chooses; the arguments are those of `ranked_tiles`."""
    return ranked_tiles(blocks, columns, vectors)[0]


def ranked_tiles(blocks: int, columns: int, vectors: int) -> list[Tile]:
    """The tiles for a result of some O blocks and columns, that of the least cost first.

    Args:
        blocks: blocks of output channels.
        columns: the width of the result.
        vectors: how many accumulators of 16 channels the registers hold.
    """
    candidates = [
        Tile(b, c)
        for b in (1, 2, 4, 8)
        if blocks % b == 0
        for c in range(1, min(columns, vectors) + 1)
        if _fits(b, c, vectors)
    ]
    return sorted(candidates, key=lambda t: (_cost(t, columns), t.blocks))


def _fits(blocks: int, columns: int, vectors: int) -> bool:
    """Whether the sums fit, and beside them a vector of weights for each block.

    With sixteen sums, half of AVX-512's registers are left for weights; AVX2's are all but full.
    """
    held = blocks * columns
    return held <= vectors and (vectors >= 16 or held + blocks <= vectors + 1)


def _cost(candidate: Tile, columns: int) -> float:
    """Relative time: columns for nothing, few sums in flight, streams of weights, loads."""
    b, c = candidate.blocks, candidate.columns
    waste = -(-columns // c) * c / columns
    latency = max(1.0, 8 / (b * c))
    apart = 1.0 if columns % c == 0 else 1.1
    streams = 1.0 if b <= 2 else 1.15
    return waste * latency * apart * streams * (1 + 0.1 * (b + c) / (b * c))


def accumulators(features: Callable[[str], bool]) -> int:
    """How many vectors of 16 sums the registers hold beside operands.

    Args:
        features: whether the processor has an instruction set, by LLVM's name.
    """
    return 16 if features("avx512f") else 6


# -- computations --------------------------------------------------------------------------------


def pack(convolution: Convolution, weight: Any) -> Any:
    """Weights [O, I/groups, kh, kw] as [O/16, I/b, kh, kw, b, 16] (depthwise: no I, no b).

    Those of dot products are words of `quad` weights each, [O/16, I/b, kh, kw, b/quad, 16].
    """
    from tvm import te, tirx

    kh, kw = convolution.kernel
    zero = tirx.const(0, weight.dtype)

    def depthwise(block: Any, y: Any, x: Any, lane: Any) -> Any:
        channel = block * LANES + lane
        inside = channel < convolution.outputs
        value = tirx.if_then_else(inside, weight[channel, 0, y, x], zero)
        return value.astype("int32") if convolution.quad == INT8.depth else value

    if convolution.is_depthwise:
        return te.compute((convolution.blocks, kh, kw, LANES), depthwise, name=_PACK)
    step, quad = convolution.step, convolution.quad

    def element(block: Any, outer: Any, y: Any, x: Any, inner: Any, lane: Any) -> Any:
        first, channel = outer * step + inner * quad, block * LANES + lane
        values = [_weight(convolution, weight, channel, first + i, y, x) for i in range(quad)]
        return word(values) if quad > 1 else values[0]

    shape = (convolution.blocks, convolution.depth // step, kh, kw, step // quad, LANES)
    return te.compute(shape, element, name=_PACK)


def _weight(
    convolution: Convolution, weight: Any, channel: Any, source: Any, y: Any, x: Any
) -> Any:
    """The weight of an output channel for the input channel ``source`` of its block; else 0."""
    from tvm import tirx

    merged = convolution.merged
    each = convolution.inputs // convolution.groups
    inside = channel < convolution.outputs
    if convolution.depth > each * merged:
        inside = tirx.all(inside, source < each * merged)
    if merged > 1:
        per_group = convolution.outputs // convolution.groups
        own = tirx.floormod(tirx.floordiv(channel, per_group), merged)
        inside = tirx.all(inside, tirx.floordiv(source, each) == own)
    value = weight[channel, tirx.floormod(source, each), y, x]
    return tirx.if_then_else(inside, value, tirx.const(0, weight.dtype))


def _padded(convolution: Convolution, data: Any, columns: int, zero: int) -> Any:
    """The data with ``zero`` around it, wide enough for that many columns of the result."""
    from tvm import te, tirx

    top, left, bottom, right = convolution.padding
    height, width = int(data.shape[2]), int(data.shape[3])
    reach = (columns - 1) * convolution.strides[1]
    reach += (convolution.kernel[1] - 1) * convolution.dilation[1] + 1
    wide = max(reach, width + left + right)
    if (top, left, bottom) == (0, 0, 0) and wide == width:
        return data
    shape = list(data.shape)
    shape[2], shape[3] = height + top + bottom, wide

    def element(n: Any, c: Any, y: Any, x: Any, *lane: Any) -> Any:
        inside = tirx.all(y >= top, y < height + top, x >= left, x < width + left)
        value = data[(n, c, y - top, x - left, *lane)]
        return tirx.if_then_else(inside, value, tirx.const(zero, data.dtype))

    return te.compute(shape, element, name=PAD)


@dataclass(frozen=True)
class Place:
    """A convolution on data of a size.

    Attributes:
        blocked: whether the data is [n, C/16, H, W, 16] and not [n, C, H, W].
        dtype: of the data.
    """

    convolution: Convolution
    height: int
    width: int
    blocked: bool
    dtype: str = "float32"

    def tiles(self, vectors: int) -> list[Tile]:
        """Every tile for it, that of the least cost first."""
        columns = self.convolution.size(1, self.width)
        return ranked_tiles(_tiled_blocks(self.convolution), columns, vectors)


def rule(place: Place, vectors: int) -> Tile:
    """The tile that the rule chooses."""
    return place.tiles(vectors)[0]


def convolve(
    convolution: Convolution, vectors: int, choose: Callable[[Place, int], Tile] = rule,
    zero: int = 0,
) -> Callable[[Any, Any], Any]:
    """The computation of a convolution of data, [n, C/16, H, W, 16] or [n, C, H, W], and weights.

    Dot products read bytes or halves, [n, C/16, H, W, 16], or words of `quad` channels,
    [n, C/quad, H, W]. Depthwise convolutions of halves widen them and multiply float32.

    Args:
        convolution: its constants.
        vectors: how many accumulators the registers hold.
        choose: its tile.
        zero: the element of the data that stands for 0.
    """
    from tvm import te

    def compute(data: Any, packed: Any) -> Any:
        height, wide = int(data.shape[2]), int(data.shape[3])
        rows, width = convolution.size(0, height), convolution.size(1, wide)
        blocked, dtype = len(data.shape) > 4, str(data.dtype)
        held = choose(Place(convolution, height, wide, blocked, dtype), vectors)
        columns = -(-width // held.columns) * held.columns
        source = _padded(convolution, data, columns, zero)
        axes, product = _product(convolution, source, packed)
        shape = (data.shape[0], convolution.blocks, rows, columns, LANES)
        accumulated = te.compute(
            shape,
            lambda *at: te.sum(product(*at), axis=axes),
            name=ACCUMULATE,
            attrs={_BLOCKS: held.blocks, _COLUMNS: held.columns},
        )
        if columns == width:
            return accumulated
        return te.compute((*shape[:3], width, LANES), lambda *at: accumulated[at], name="crop")

    return compute


def _tiled_blocks(convolution: Convolution) -> int:
    """The O blocks that may share a tile: those that read the same inputs."""
    if convolution.is_depthwise:
        return 1
    return convolution.blocks // (convolution.groups // convolution.merged)


def _product(
    convolution: Convolution, source: Any, packed: Any
) -> tuple[list[Any], Callable[..., Any]]:
    """The axes of the reduction and the product that is summed."""
    from tvm import te

    (kh, kw), step = convolution.kernel, convolution.step
    (sy, sx), (dy, dx) = convolution.strides, convolution.dilation
    quad, kind = convolution.quad, _DOTS.get(convolution.quad)
    sizes = {"outer": convolution.depth // step, "ky": kh, "kx": kw, "inner": step // quad}
    if convolution.is_depthwise:
        sizes = {"ky": kh, "kx": kw}
    axes = {name: te.reduce_axis((0, size), name) for name, size in sizes.items() if size > 1}
    axes = axes or {"ky": te.reduce_axis((0, 1), "ky")}
    at = {name: axes.get(name, 0) for name in ("outer", "ky", "kx", "inner")}

    def depthwise(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        row, column = y * sy + at["ky"] * dy, x * sx + at["kx"] * dx
        value, weight = source[n, o, row, column, lane], packed[o, at["ky"], at["kx"], lane]
        if str(source.dtype) == BFLOAT16.data:
            return widened(value) * weight
        return dot(kind, value.astype("int32"), weight) if kind else value * weight

    def element(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        channel = convolution.first_channel(o) + at["outer"] * step + at["inner"] * quad
        row, column = y * sy + at["ky"] * dy, x * sx + at["kx"] * dx
        if len(source.shape) == 4:
            value = source[n, channel // quad, row, column]
        else:
            value = source[n, channel // LANES, row, column, channel % LANES]
        weight = packed[o, at["outer"], at["ky"], at["kx"], at["inner"], lane]
        return dot(kind, value, weight) if kind else value * weight

    return list(axes.values()), depthwise if convolution.is_depthwise else element


ATTRIBUTES = {"op_pattern": _OUT_ELEMENTWISE_FUSABLE}
"""Attributes of a convolution's function: element-wise readers are to be fused into it."""


# -- schedules -----------------------------------------------------------------------------------


def schedule_convolution(schedule: Any, block: Any) -> None:
    """Schedule a function that holds one convolution, its padding and what was fused behind it.

    Element-wise blocks have been inlined into the last one before.
    """
    root = schedule.get_sblock("root")
    names = [schedule.get(b).name_hint for b in schedule.get_child_blocks(root)]
    behind = schedule.get_child_blocks(root)[names.index(ACCUMULATE) + 1 :]
    shapes = [[extent(schedule, v) for v in schedule.get_loops(b)][:5] for b in (block, *behind)]
    fused = len(behind) == 1 and shapes[0] == shapes[1]
    _schedule_padding(schedule, root)
    if fused:
        schedule.set_scope(block, 0, "local")
        last = behind[0]
    else:
        last = schedule.cache_write(block, 0, "local")
        for other in behind:
            _schedule_apart(schedule, other)
    _schedule_tiles(schedule, block, last)


def _schedule_padding(schedule: Any, root: Any) -> None:
    for block in schedule.get_child_blocks(root):
        if schedule.get(block).name_hint == PAD:
            _schedule_apart(schedule, block)


def _schedule_apart(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    if extent(schedule, loops[-1]) == LANES:
        schedule.vectorize(loops[-1])
    schedule.parallel(schedule.fuse(*loops[:3]))


def _schedule_tiles(schedule: Any, block: Any, last: Any) -> None:
    """Compute a tile of sums in registers where the last block writes it."""
    annotations = schedule.get(block).annotations
    reductions = len(schedule.get_loops(block)) - 5
    n, o, y, x, lane = schedule.get_loops(last)
    o, o_inner = schedule.split(o, [None, int(annotations[_BLOCKS])])
    x, x_inner = schedule.split(x, [None, int(annotations[_COLUMNS])])
    schedule.reorder(n, o, y, x, o_inner, x_inner, lane)
    schedule.compute_at(block, x, preserve_unit_loops=True)
    inner = schedule.get_loops(block)[4:]
    spatial, reduce = inner[:-reductions], inner[-reductions:]
    schedule.reorder(*reduce, *spatial)
    for loop in (*spatial[:-1], o_inner, x_inner):
        schedule.unroll(loop)
    schedule.vectorize(spatial[-1])
    schedule.vectorize(lane)
    schedule.parallel(schedule.fuse(n, o, y))
    initial = schedule.decompose_reduction(block, schedule.get_loops(block)[2])
    loops = schedule.get_loops(initial)[-len(spatial) :]
    for loop in loops[:-1]:
        schedule.unroll(loop)
    schedule.vectorize(loops[-1])

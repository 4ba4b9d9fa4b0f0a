"""Single operators for random networks, in every spelling: float32[batch, width, 6, 6] both ways.

Operators that ``torch.export`` yields only after decomposition are called by their ATen name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.kernels import fake_quant
from tests.coupling.images import Applied, Layer, conv, sequence

aten = torch.ops.aten


def _twelve(function: Callable[[Tensor], Tensor]) -> Layer:
    """The function behind a convolution to 12 channels."""
    return lambda width: sequence(conv(width, 12, 1), Applied(function))


class Linear(nn.Module):
    """A product with a parameter over the channels, in one of many spellings."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(width, 6) / 3)
        self.bias = nn.Parameter(torch.randn(6))
        if spelling in ("dot", "vdot"):
            self.other = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        y = getattr(self, self.spelling)(rows, n)
        return y.reshape(n, h, w, 6).permute(0, 3, 1, 2)

    def mm(self, rows: Tensor, _: int) -> Tensor:
        return torch.mm(rows, self.weight)

    def addmm(self, rows: Tensor, _: int) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight)

    def matmul(self, rows: Tensor, n: int) -> Tensor:
        return rows.view(n, 36, -1) @ self.weight

    def transposed(self, rows: Tensor, _: int) -> Tensor:
        return torch.mm(self.weight.t(), rows.t()).T

    def swapped(self, rows: Tensor, _: int) -> Tensor:
        return F.linear(rows, self.weight.swapaxes(0, 1), self.bias)

    def numpy(self, rows: Tensor, _: int) -> Tensor:
        return F.linear(rows, torch.ops.aten.numpy_T(self.weight), self.bias)

    def bmm(self, rows: Tensor, n: int) -> Tensor:
        return torch.bmm(rows.view(n, 36, -1), self.weight.expand(n, -1, -1))

    def baddbmm(self, rows: Tensor, n: int) -> Tensor:
        return torch.baddbmm(self.bias, rows.view(n, 36, -1), self.weight.expand(n, -1, -1))

    def mv(self, rows: Tensor, _: int) -> Tensor:
        return torch.mv(rows, self.weight[:, 0]).unsqueeze(1) * self.bias

    def dot(self, rows: Tensor, _: int) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight) * torch.dot(self.bias, self.other)

    def einsum(self, rows: Tensor, _: int) -> Tensor:
        return torch.einsum("nc,cd->nd", rows, self.weight)

    def outer(self, rows: Tensor, _: int) -> Tensor:
        return torch.mm(rows, self.weight) @ torch.outer(self.bias, self.bias)

    def ger(self, rows: Tensor, _: int) -> Tensor:
        return torch.mm(rows, self.weight) @ torch.ger(self.bias, self.bias)

    def vdot(self, rows: Tensor, _: int) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight) * torch.vdot(self.bias, self.other)


class Shifted(nn.Module):
    """The input and a tensor that the graph makes."""

    def __init__(self, width: int, make: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.width, self.make = width, make

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + self.make(x, self.width)


class Constant(nn.Module):
    """The input and a constant, which capture lifts by a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([0.5, 1.5, 2.5, 0.5, 1.0, -1.0])


class FakeQuantised(nn.Module):
    """Rounded to a grid, one for all channels or one a channel."""

    def __init__(self, width: int, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(torch.rand(() if axis is None else width) * 0.05 + 0.05)
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quant.fake_quant(x, self.scale, self.zero_point, self.axis, -127, 127)


class RunningNorm(nn.Module):
    """Batch norm by the name that decomposition gives it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        call = aten._native_batch_norm_legit_no_training
        return call(x, n.weight, n.bias, n.running_mean, n.running_var, 0.1, 1e-5)[0]


class NativeNorm(nn.Module):
    """Layer norm and group norm by their native names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        rows = x.permute(0, 2, 3, 1)
        y = aten.native_layer_norm(rows, list(n.normalized_shape), n.weight, n.bias, n.eps)[0]
        return y.permute(0, 3, 1, 2)


class Convolution(nn.Module):
    """The one convolution that all others decompose to."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.groups = conv(width, width, groups=groups), groups

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv
        return aten.convolution(
            x, c.weight, c.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], self.groups  # noqa: FBT003
        )


def _gated(x: Tensor) -> Tensor:
    """Comparisons, logic and selections."""
    mask = ((x > -1) & (x < 1)) | (x > 2)
    mask = mask ^ aten.bitwise_not(x > 0)
    x = torch.where(mask, x, 0.1 * x).masked_fill(x > 3, 0.5)
    return torch.where((x > -1).__and__(x < 2).__or__(x > 3).__xor__(x > 4), x, x + 1)


def _copies(x: Tensor) -> Tensor:
    """Everything that returns its operand."""
    x = aten.alias(x.contiguous().clone().detach())
    x = F.dropout(F.alpha_dropout(F.feature_alpha_dropout(x, training=False)), training=False)
    x = F.dropout2d(F.alpha_dropout(x, training=False), training=False)
    x = aten.native_dropout(x, 0.5, False)[0]  # noqa: FBT003
    x = x.to(torch.float64).to(torch.float32).type_as(x)
    return aten.copy(x, aten._to_copy(x + 1, dtype=torch.float32))


def _activations(x: Tensor) -> Tensor:
    y = F.hardswish(x) + F.hardsigmoid(x) + F.logsigmoid(x) + F.gelu(x) + F.elu(x)
    return torch.nan_to_num(y + F.softplus(x) + F.mish(x) + x.clamp(-1, 1) + x.sin().exp())


def _likes(x: Tensor) -> Tensor:
    y = torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 0.5)
    y = y + 0 * torch.rand_like(x) + aten.fill(torch.empty_like(x), 1.0)
    return x + y * x.mean((2, 3), keepdim=True).expand_as(x)


def _statistics(x: Tensor) -> Tensor:
    """Statistics along space, which keeps its size."""
    y = x.mean(2, keepdim=True) + x.sum(3, keepdim=True) / 9 + x.var((2, 3), keepdim=True)
    y = y + x.std((2, 3), keepdim=True) + x.amax(2, keepdim=True) - x.amin(3, keepdim=True)
    y = y + torch.linalg.vector_norm(x, dim=2, keepdim=True) + x.logsumexp(3, keepdim=True)
    y = y + x.max(3, keepdim=True)[0] + x.min(2, keepdim=True)[0] + x.median(2, keepdim=True)[0]
    y = y + (x / 2).prod(2, keepdim=True) + (x > 2).any(2, keepdim=True)
    return x + 0.1 * (y + (x > -2).all(3, keepdim=True))


def _sequences(x: Tensor) -> Tensor:
    """Operators along space that depend on the order."""
    y = x.cumsum(2) + (0.5 * x).cumprod(3) + x.sort(2)[0] + x.flip(2) + x.roll(1, 3)
    y = y + F.pad(x.diff(dim=3), (0, 1)) + x.topk(6, 2)[0] + x.argsort(3) / 6
    y = y + x.argmax(2, keepdim=True) / 6 + x.argmin(3, keepdim=True) / 6
    return x + 0.1 * y + x.softmax(2) + x.log_softmax(3) / 9


def _normalised_weights(x: Tensor) -> Tensor:
    y = aten._softmax(x, 3, False) + aten._log_softmax(x, 2, False) / 9  # noqa: FBT003
    return x + y


def _channel_statistics(x: Tensor) -> Tensor:
    """Statistics along the channels: those of the survivors."""
    y = x.mean(1, keepdim=True) + x.std(1, keepdim=True, unbiased=False)
    y = y + torch.var(x, 1, correction=0, keepdim=True) + sum(
        torch.std_mean(x, 1, keepdim=True, unbiased=False)
    )
    y = y + x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    y = y + x.max(1, keepdim=True)[0] - x.min(1)[0].unsqueeze(1) + x.max() * x.min()
    y = y + x.logsumexp(1, keepdim=True) + torch.tanh(x).prod(1, keepdim=True)
    y = y + (x > 1).any(1, keepdim=True) + (x > -1).all(1, keepdim=True)
    y = y + torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * torch.sigmoid(0.1 * (y + x.sum((1, 2, 3), keepdim=True) / 50))


def _rectangles(x: Tensor) -> Tensor:
    """Windows over space in every form that keeps its size."""
    y = aten._adaptive_avg_pool2d(x, [6, 6]) + F.adaptive_max_pool2d(x, (3, 6)).repeat(1, 1, 2, 1)
    y = y + aten.max_pool2d_with_indices(x, [3, 3], [1, 1], [1, 1])[0]
    y = y + F.lp_pool2d(x.abs() + 0.1, 2, 3, 1)[:, :, :1, :1]
    return y + F.pad(x[:, :, 1:-1], (1, 1, 2, 2), "reflect")[:, :, 1:-1, 1:-1].mean(2, True)  # noqa: FBT003


def _padded(x: Tensor) -> Tensor:
    y = F.pad(x, (1, 0, 0, 1), "reflect") + F.pad(x, (1, 0, 0, 1), "replicate")
    y = y + aten.reflection_pad2d(x, [1, 0, 0, 1]) + aten.replication_pad2d(x, [1, 0, 0, 1])
    y = y + F.pad(x, (1, 0, 0, 1), "circular") + F.pad(x, (1, 0, 0, 1), value=0.5)
    return F.pad(y, (0, -1, -1, 0))


def _resized(x: Tensor) -> Tensor:
    half = F.interpolate(x, scale_factor=0.5, mode="area")
    y = x
    for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"):
        y = y + F.interpolate(half, size=(6, 6), mode=mode)
    for mode in ("bilinear", "bicubic"):
        y = y + F.interpolate(half, size=(6, 6), mode=mode, antialias=True)
    return y


def _reshaped(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = x.flatten(2).unflatten(2, (h, w)).view_as(x).reshape_as(x)
    y = aten._unsafe_view(y, [n, c, h * w]).view(n, c, h, w).movedim(1, -1)
    y = y.transpose(1, 2).swapaxes(1, 2).permute(0, 3, 1, 2)
    return y.unsqueeze(0).squeeze(0).squeeze() + torch.ravel(y).view(n, c, h, w)


def _parts(x: Tensor) -> Tensor:
    """12 channels taken apart and put together."""
    a, b = x.tensor_split(2, 1)
    c, d, e = aten.unsafe_split(b, 2, 1)
    f, g = x.split((5, 7), 1)
    return aten.concat([a, c + d, e, f.narrow(1, 1, 3), g[:, 1::2], x.select(1, 2)[:, None]], 1)


def _indexed(x: Tensor) -> Tensor:
    places = torch.tensor([5, 0, 3, 2, 1, 4], device=x.device)
    return x[:, :, places] + x.index_select(3, places) + x[:, :, :, places][:, :, places]


def _stacked(x: Tensor) -> Tensor:
    rows = torch.stack(x.unbind(2), 2)
    channels = torch.stack([x, rows * 2, x + 1], 2).mean(2)
    return torch.stack([rows, channels], -1).sum(-1)


def _sampled(x: Tensor) -> Tensor:
    step = torch.linspace(-0.9, 0.9, 6)
    grid = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1)
    grid = grid.expand(x.shape[0], -1, -1, -1)
    y = F.grid_sample(x, grid, align_corners=False)
    return y + aten.grid_sampler_2d(x, grid * 0.5, 0, 0, False)  # noqa: FBT003


def _rolled_windows(x: Tensor) -> Tensor:
    """``unfold`` along space: overlapping rows."""
    return x + F.pad(x.unfold(3, 3, 1).mean(-1), (1, 1))


def _written(x: Tensor) -> Tensor:
    """Parts of a copy written in place."""
    y = x.clone()
    y[:, :, 2:4] = x[:, :, :2] * 2
    y[:, :, 0] = 1.0
    y[:, :, :, 1].mul_(2)
    return y


def _gathered(x: Tensor) -> Tensor:
    places = torch.arange(5, -1, -1).view(1, 1, 6, 1).expand(x.shape)
    return x + torch.gather(x, 2, places)


def _channels_reversed(x: Tensor) -> Tensor:
    return x + x.flip(1)


def _complex(x: Tensor) -> Tensor:
    """Pairs of columns turned as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(3, (3, 2)).contiguous())
    turn = torch.polar(torch.ones(3), torch.arange(3.0))
    return torch.view_as_real(pairs * turn).flatten(3)


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * 0.5, s=(6, 6), norm="ortho")


def _shuffled(x: Tensor) -> Tensor:
    return F.channel_shuffle(x, 3) + F.channel_shuffle(aten.native_channel_shuffle(x, 3), 4)


_LINEARS = (
    "mm", "addmm", "matmul", "transposed", "swapped", "numpy", "bmm", "baddbmm", "mv", "dot",
    "einsum", "outer", "ger", "vdot",
)  # fmt: skip

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "activations": _activations,
    "gates": _gated,
    "copies": _copies,
    "likes": _likes,
    "statistics": _statistics,
    "channel-statistics": _channel_statistics,
    "sequences": _sequences,
    "weights": _normalised_weights,
    "windows": _rectangles,
    "padded": _padded,
    "resized": _resized,
    "reshaped": _reshaped,
    "indexed": _indexed,
    "stacked": _stacked,
    "sampled": _sampled,
    "unfolded": _rolled_windows,
    "written": _written,
    "gathered": _gathered,
    "channels-reversed": _channels_reversed,
    "complex": _complex,
    "spectrum": _spectrum,
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(2, 1, 1),
    "repeat-interleave": lambda x: x.repeat_interleave(2, 1),
    "channel-cumsum": lambda x: x.cumsum(1),
    "channel-indices": lambda x: x[:, [1, 0, 1]],
    "channel-slices": lambda x: torch.cat([x[:, 1:-1], x[:, ::2], x[:, 1:2]], 1),
    "channel-rolled": lambda x: x + x.roll(1, 1),
    "fake-quantised-tensor": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -99, 99),
}

OPERATORS: dict[str, Layer] = {
    **{
        name: lambda _, function=function: Applied(function)
        for name, function in _FUNCTIONS.items()
    },
    **{f"linear-{name}": partial(Linear, spelling=name) for name in _LINEARS},
    "parts": _twelve(_parts),
    "channel-shuffle": _twelve(_shuffled),
    "zeros": lambda w: Shifted(w, lambda _, c: torch.zeros(c, 1, 1) + torch.ones(c, 1, 6)),
    "full": lambda w: Shifted(w, lambda x, c: torch.full((x.shape[0], c, 1, 6), 0.5)),
    "empty": lambda w: Shifted(w, lambda _, c: aten.fill(torch.empty(c, 6, 6), 0.5)),
    "new": lambda w: Shifted(
        w,
        lambda x, c: x.new_zeros(c, 6, 1) + x.new_ones(c, 1, 6) + x.new_full((c, 1, 1), 0.5)
        + aten.fill(x.new_empty((c, 1, 1)), 1.0),
    ),
    "constant": lambda w: sequence(conv(w, 6, 1), Constant()),
    "fake-quantised": partial(FakeQuantised, axis=None),
    "fake-quantised-channels": partial(FakeQuantised, axis=1),
    "running-norm": RunningNorm,
    "native-norm": NativeNorm,
    "convolution": Convolution,
    "convolution-depthwise": lambda w: Convolution(w, w),
}  # type: ignore[dict-item]
"""Layers of single operators by name."""

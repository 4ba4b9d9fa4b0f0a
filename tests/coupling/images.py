"""Image layers for random networks: float32[batch, width, 6, 6] in, the same space out.

Each is a small copy of a block that published architectures are made of; a layer takes the width
that it finds and may return another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

Layer = Callable[[int], nn.Module]


class Applied(nn.Module):
    """A function of the input and of layers that it names ``self.0``, ``self.1``..."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    """A convolution that keeps the space."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(width, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), conv(5, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(scale))))


class ChannelAttention(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)).unsqueeze(1)
        return x * torch.sigmoid(self.conv(pooled)).transpose(1, 2).unsqueeze(-1)


class SpatialAttention(nn.Module):
    """Statistics over channels weigh the places (CBAM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(pooled))


class CoordinateAttention(nn.Module):
    """Both axes pooled, joined along space, mixed, split again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.norm = conv(width, 4, 1), nn.BatchNorm2d(4)
        self.rows, self.columns = conv(4, width, 1), conv(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        y = F.hardswish(self.norm(self.mix(torch.cat([rows, columns], 2))))
        rows, columns = y.split([height, width], 2)
        scale = self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()
        return x * scale


class SelectiveKernel(nn.Module):
    """A softmax over branches, channel by channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, 6), conv(width, 6, 1)
        self.down, self.up = nn.Linear(6, 4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], 1)
        pooled = branches.sum(1).mean((2, 3))
        weights = self.up(F.relu(self.down(pooled))).view(-1, 2, 6, 1, 1).softmax(1)
        return (branches * weights).sum(1)


class SplitAttention(nn.Module):
    """Radix-wise softmax over the groups of one convolution (ResNeSt)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(width, 12), nn.BatchNorm2d(12)
        self.down, self.up = conv(6, 4, 1), conv(4, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        parts = y.reshape(y.shape[0], 2, 6, *y.shape[2:])
        weights = self.up(F.relu(self.down(parts.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(y.shape[0], 2, 6, 1, 1).softmax(1)
        return (parts * weights).sum(1)


class NonLocal(nn.Module):
    """Attention between places, spelt with convolutions and matmul."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = conv(width, 4, 1), conv(width, 4, 1), conv(width, 5, 1)
        self.out = conv(5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        y = torch.bmm(v, torch.softmax(torch.bmm(q.transpose(1, 2), k), -1).transpose(1, 2))
        return x + self.out(y.view(*y.shape[:2], *x.shape[2:]))


class Concat(nn.Module):
    """[conv(x), x, conv(x) of another width]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, 3, 1), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), x, F.silu(self.b(x))], 1)


class Dense(nn.Module):
    """DenseNet: every layer reads all earlier ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width + 4)])
        self.convs = nn.ModuleList([conv(width, 4), conv(width + 4, 4)])
        self.transition = conv(width + 8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.transition(torch.cat(features, 1))


class Res2Net(nn.Module):
    """Four parts of one convolution; each is added to the next before its own convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out = conv(width, 12, 1), conv(12, width, 1)
        self.convs = nn.ModuleList([conv(3, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.inner(x).relu(), 3, 1)
        results, y = [parts[0]], parts[0]
        for part, layer in zip(parts[1:], self.convs, strict=True):
            y = layer(part if len(results) == 1 else y + part).relu()
            results.append(y)
        return x + self.out(torch.cat(results, 1))


class CrossStage(nn.Module):
    """CSP: half of the channels pass through a block, the others around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.block, self.leave = conv(width, 10, 1), Residual(5), conv(10, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        around, through = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([self.block(through), around], 1))


class DualPath(nn.Module):
    """DPN: some channels are added, others are joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv(width, 9, 1), conv(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        return torch.cat([a[:, :6] + b[:, :6], a[:, 6:], b[:, 6:]], 1)


class SplitMerge(nn.Module):
    """Uneven split; one part is convolved, the other stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [width // 2 + 1, width - width // 2 - 1]
        self.conv = conv(self.sizes[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.split(self.sizes, 1)
        return torch.cat([right, self.conv(left)], 1)


class Shuffle(nn.Module):
    """ShuffleNet v2: two halves, a depthwise branch, a shuffle of two groups."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = conv(width, 8, 1)
        self.branch = nn.Sequential(
            conv(4, 4, 1), nn.ReLU(), conv(4, 4, groups=4), nn.BatchNorm2d(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).chunk(2, dim=1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Ghost(nn.Module):
    """Cheap depthwise copies joined to their originals, cut to the wanted width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.primary, self.cheap = conv(width, 4, 1), conv(4, 4, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, :7]


class PadChannels(nn.Module):
    """A zero-padded shortcut (ResNet for CIFAR, option A)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width + 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, 1, 2)))


class Twice(nn.Module):
    """One convolution applied twice: its inputs and outputs are the same channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class TiedDecoder(nn.Module):
    """A convolution and the transposed convolution with the same weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, width, 3, 3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.weight, padding=1))
        return x + F.conv_transpose2d(y, self.weight, padding=1)


class StandardisedConv(nn.Module):
    """A convolution whose weight is normalised in the graph, in one of three spellings."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(6, width, 3, 3))
        self.gain = nn.Parameter(torch.rand(6, 1, 1, 1) + 0.5)

    def standardised(self) -> Tensor:
        weight = self.weight
        if self.spelling == "batch-norm":
            flat = weight.reshape(1, 6, -1)
            gain = self.gain.view(-1)
            flat = F.batch_norm(flat, None, None, gain, training=True, momentum=0.0, eps=1e-6)
            return flat.reshape_as(weight)
        if self.spelling == "var-mean":
            var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True, unbiased=False)
            return (weight - mean) * torch.rsqrt(var + 1e-6) * self.gain
        mean = weight.mean((1, 2, 3), keepdim=True)
        return self.gain * (weight - mean) / (weight.std((1, 2, 3), keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.standardised(), padding=1)


class ConditionalConv(nn.Module):
    """Each sample has its own mixture of kernels, as one convolution with batch-many groups."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route, self.width = nn.Linear(width, 2), width
        self.experts = nn.Parameter(torch.randn(2, 4 * width * 9) / 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.matmul(torch.sigmoid(self.route(x.mean((2, 3)))), self.experts)
        weight = weight.view(n * 4, c, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n)
        return y.view(n, 4, h, w)


class ConvNext(nn.Module):
    """Depthwise convolution, layer norm and MLP on channels last, layer scale, response norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(width, width, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)
        self.gamma, self.beta = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(7))
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        norm = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = self.gamma * (y * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.beta + y
        return x + (self.down(y) * self.scale).permute(0, 3, 1, 2)


class Windows(nn.Module):
    """Swin: cyclic shift, windows of 3x3, a table of relative positions, a mask of the shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 24)
        self.out = nn.Linear(8, width)
        self.table = nn.Parameter(torch.randn(25, 2))
        places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
        offsets = places.flatten(1)[:, :, None] - places.flatten(1)[:, None, :] + 2
        self.register_buffer("index", offsets[0] * 5 + offsets[1])
        region = torch.arange(36).view(6, 6) // 18
        region = region.view(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9)
        mask = (region[:, None] != region[:, :, None]).float() * -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(n, 2, 3, 2, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
        q, k, v = self.qkv(y).reshape(-1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * 0.5
        bias = self.table[self.index.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous()
        scores = (scores + bias.unsqueeze(0)).view(n, 4, 2, 9, 9) + self.mask[None, :, None]
        y = torch.softmax(scores.view(-1, 2, 9, 9), -1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, 9, 8))
        y = y.view(n, 2, 2, 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return (x + torch.roll(y, (1, 1), (1, 2))).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """The four pixels of each 2x2 patch joined as channels, normalised and reduced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        y = self.reduce(self.norm(torch.cat(parts, -1))).permute(0, 3, 1, 2)
        return F.interpolate(y, size=(6, 6), mode="nearest")


class Unfolded(nn.Module):
    """Each place weighs its 3x3 neighbours with weights computed from itself (involution)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights, self.values = conv(width, 9, 1), conv(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        weights = self.weights(x).softmax(1).view(n, 1, 9, h, w)
        patches = F.unfold(self.values(x), 3, padding=1).view(n, 6, 9, h, w)
        return (patches * weights).sum(2)


class Folded(nn.Module):
    """Patches with a vector each, put back together by overlapping sums (outlook attention)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 36)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.expand(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).flatten(2)
        return F.fold(patches, (6, 6), 3, padding=1)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def standardised(spelling: str) -> Layer:
    return lambda w: StandardisedConv(w, spelling)


IMAGES: dict[str, Layer] = {
    "conv": lambda w: conv(w, 6, bias=False),
    "conv-strided": lambda w: sequence(nn.Conv2d(w, 6, 3, 2, 1), nn.Upsample(scale_factor=2.0)),
    "conv-same": lambda w: nn.Conv2d(w, 5, (3, 2), padding="same"),
    "batch-norm": nn.BatchNorm2d,
    "group-norm": lambda w: sequence(conv(w, 8, 1), nn.GroupNorm(2, 8)),
    "group-norm-thirds": lambda w: sequence(conv(w, 9, 1), nn.GroupNorm(3, 9, affine=False)),
    "group-norm-one": lambda w: nn.GroupNorm(1, w),
    "group-norm-each": lambda w: nn.GroupNorm(w, w),
    "instance-norm": lambda w: nn.InstanceNorm2d(w, affine=True),
    "instance-norm-running": lambda w: nn.InstanceNorm2d(w, affine=True, track_running_stats=True),
    "layer-norm-channels": lambda w: Applied(
        lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), nn.LayerNorm(w)
    ),
    "layer-norm-whole": lambda _: Applied(
        lambda x: F.layer_norm(x, x.shape[1:])
    ),
    "normalise": lambda _: Applied(lambda x: F.normalize(x, dim=1)),
    "softmax-channels": lambda _: Applied(lambda x: x * x.softmax(1)),
    "response-norm": lambda _: nn.LocalResponseNorm(3),
    "residual": Residual,
    "squeeze-excite": SqueezeExcite,
    "channel-attention": ChannelAttention,
    "spatial-attention": SpatialAttention,
    "coordinate-attention": CoordinateAttention,
    "selective-kernel": SelectiveKernel,
    "split-attention": SplitAttention,
    "non-local": NonLocal,
    "concat": Concat,
    "dense": Dense,
    "res2net": Res2Net,
    "cross-stage": CrossStage,
    "dual-path": DualPath,
    "split": SplitMerge,
    "shuffle": Shuffle,
    "ghost": Ghost,
    "pad-channels": PadChannels,
    "twice": Twice,
    "tied-decoder": TiedDecoder,
    "standardised-batch-norm": standardised("batch-norm"),
    "standardised-var-mean": standardised("var-mean"),
    "standardised-std": standardised("std"),
    "weight-norm": lambda w: parametrizations.weight_norm(conv(w, 6)),
    "spectral-norm": lambda w: parametrizations.spectral_norm(conv(w, 6)),
    "conditional-conv": ConditionalConv,
    "convnext": ConvNext,
    "windows": Windows,
    "patch-merging": PatchMerging,
    "unfold": Unfolded,
    "fold": Folded,
    "depthwise": lambda w: sequence(
        conv(w, 2 * w, groups=w), nn.BatchNorm2d(2 * w), nn.Hardswish(), conv(2 * w, 7, 1)
    ),
    "grouped": lambda w: sequence(conv(w, 8, 1), nn.ReLU6(), conv(8, 12, groups=2)),
    "grouped-thirds": lambda w: sequence(
        conv(w, 6, 1), nn.LeakyReLU(), conv(6, 9, groups=3), nn.BatchNorm2d(9), conv(9, 5, 1)
    ),
    "transposed": lambda w: sequence(nn.ConvTranspose2d(w, 5, 2), nn.AvgPool2d(2, 1)),
    "transposed-grouped": lambda w: sequence(
        conv(w, 6, 1), nn.ConvTranspose2d(6, 8, 3, padding=1, groups=2), nn.ReLU()
    ),
    "transposed-depthwise": lambda w: sequence(
        nn.ConvTranspose2d(w, w, 3, padding=1, groups=w), nn.ReLU()
    ),
    "pixel-shuffle": lambda w: sequence(conv(w, 20, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)),
    "pixel-unshuffle": lambda w: sequence(
        nn.PixelUnshuffle(2), conv(4 * w, 16), nn.PixelShuffle(2)
    ),
    "glu": lambda w: sequence(conv(w, 10, 1), nn.GLU(1)),
    "prelu": nn.PReLU,
    "prelu-one": lambda _: nn.PReLU(),
}
"""Image layers by name."""

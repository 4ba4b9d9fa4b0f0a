"""Random small networks out of the rule table, for property tests of pruning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

Layer = Callable[[int], nn.Module]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, width, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Squeeze(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(scale))))


class Concat(nn.Module):
    """[x, conv(x), conv(x) of another width]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 3, 1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), x, F.silu(self.b(x))], 1)


class SplitMerge(nn.Module):
    """Uneven split; one part is convolved, the other stays (CSP, ShuffleNet v2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [width // 2 + 1, width - width // 2 - 1]
        self.conv = nn.Conv2d(self.sizes[0], 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.split(self.sizes, 1)
        return torch.cat([right, self.conv(left)], 1)


class Chunked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return a * torch.sigmoid(b)


class Sliced(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, 1 : self.width - 1], x[:, ::2], x[:, 2:3]], 1)


class Shuffle(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class PadChannels(nn.Module):
    """A zero-padded shortcut (ResNet for CIFAR, option A)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width + 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, 1, 2)))


class Shared(nn.Module):
    """One convolution applied twice: its inputs and outputs are the same channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.relu(self.conv(x)))


class Statistic(nn.Module):
    """Spatial attention from statistics over channels (CBAM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(pooled))


def depthwise(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, 2 * width, 3, padding=1, groups=width), nn.BatchNorm2d(2 * width),
        nn.Hardswish(), nn.Conv2d(2 * width, 7, 1),
    )  # fmt: skip


def grouped(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU6(), nn.Conv2d(8, 12, 3, 1, 1, groups=2))


def even_shuffle(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, 6, 1), Shuffle(), nn.PReLU(6), nn.Conv2d(6, 6, 3, 1, 1, groups=6)
    )


CONV_LAYERS: dict[str, Layer] = {
    "conv": lambda w: nn.Conv2d(w, 6, 3, padding=1, bias=False),
    "bn": nn.BatchNorm2d,
    "relu": lambda _: nn.ReLU(),
    "gelu": lambda _: nn.GELU(),
    "pool": lambda _: nn.MaxPool2d(2, 1, 1),
    "group-norm": lambda w: nn.Sequential(nn.Conv2d(w, 8, 1), nn.GroupNorm(2, 8)),
    "one-group-norm": lambda w: nn.GroupNorm(1, w),
    "transposed": lambda w: nn.ConvTranspose2d(w, 5, 2),
    "glu": lambda w: nn.Sequential(nn.Conv2d(w, 10, 1), nn.GLU(1)),
    "pixel-shuffle": lambda w: nn.Sequential(nn.Conv2d(w, 20, 1), nn.PixelShuffle(2)),
    "residual": Residual,
    "squeeze": Squeeze,
    "concat": Concat,
    "split": SplitMerge,
    "chunk": Chunked,
    "slice": Sliced,
    "shuffle": even_shuffle,
    "pad": PadChannels,
    "shared": Shared,
    "statistic": Statistic,
    "depthwise": depthwise,
    "grouped": grouped,
}


class Attention(nn.Module):
    """Self-attention in one of several spellings; 3 heads of 4."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 36)
        if spelling == "shared-keys":
            self.qkv, self.keys = nn.Linear(width, 12), nn.Linear(width, 8)
        if spelling == "normed":
            self.head_norm = nn.LayerNorm(4)
        self.out = nn.Linear(12, width)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, s, _ = x.shape
        if self.spelling == "shared-keys":
            # One key and value head serves all query heads (multi-query attention).
            q = self.qkv(x).view(n, s, 3, 4).transpose(1, 2)
            k, v = self.keys(x).view(n, s, 2, 1, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k.expand(n, 3, s, 4), v.expand(n, 3, s, 4)
        if self.spelling == "split":
            q, k, v = (
                part.view(n, s, 3, 4).transpose(1, 2) for part in self.qkv(x).split(12, -1)
            )
        else:
            q, k, v = self.qkv(x).reshape(n, s, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.spelling == "normed":
            q, k = self.head_norm(q), self.head_norm(k)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        q, k, v = self.heads(self.norm(x))
        if self.spelling == "flat":
            q, k, v = (t.reshape(n * 3, s, 4) for t in (q, k, v))
        if self.spelling in ("matmul", "flat"):
            y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        if self.spelling == "flat":
            y = y.view(n, 3, s, 4)
        return x + self.out(y.transpose(1, 2).reshape(n, s, 12))


class SingleHead(nn.Module):
    """Attention without heads: the head size is pruned, the scale stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class FeedForward(nn.Module):
    """A gated FFN behind an RMS norm spelt in operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.gate, self.up = nn.Linear(width, 9, bias=False), nn.Linear(width, 9)
        self.down = nn.Linear(9, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Conv1D(nn.Module):
    """A linear layer as addmm with [in, out] weights on flattened tokens (GPT-2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 10) / 3)
        self.bias = nn.Parameter(torch.randn(10))
        self.back = nn.Linear(10, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], 10)
        return self.back(torch.tanh(inner))


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


TOKEN_LAYERS: dict[str, Layer] = {
    **{
        f"attention-{spelling}": lambda w, spelling=spelling: Attention(w, spelling)
        for spelling in ("fused", "split", "matmul", "flat", "shared-keys", "normed")
    },
    "single-head": SingleHead,
    "ffn": FeedForward,
    "conv1d": Conv1D,
    "class-token": ClassToken,
    "layer-norm": nn.LayerNorm,
    "linear": lambda w: nn.Linear(w, 8),
}  # type: ignore[dict-item]


class Network(nn.Module):
    """Convolutions, then tokens where there are any, then a head; float32[batch, 3, 6, 6]."""

    def __init__(self, convs: list[str], tokens: list[str], ending: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ending, self.has_tokens = ending, bool(tokens)
        x = torch.randn(2, 3, 6, 6)
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1)])
        x = self.convs[0](x)
        for name in convs:
            layer = CONV_LAYERS[name](x.shape[1])
            self.convs.append(layer)
            x = layer(x)
        self.tokens = nn.ModuleList()
        if tokens:
            x = x.flatten(2).transpose(1, 2)
        for name in tokens:
            layer = TOKEN_LAYERS[name](x.shape[-1])
            self.tokens.append(layer)
            x = layer(x)
        self.head = nn.Linear(self.features(x).shape[1], 4)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.2, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        self.eval()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_tokens:
            return x[:, 0] if self.ending == "first" else x.mean(1)
        return x.flatten(1) if self.ending == "flatten" else x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.convs:
            x = layer(x)
        if self.has_tokens:
            x = x.flatten(2).transpose(1, 2)
        for layer in self.tokens:
            x = layer(x)
        return self.head(self.features(x))


networks = st.builds(
    Network,
    st.lists(st.sampled_from(sorted(CONV_LAYERS)), max_size=5),
    st.lists(st.sampled_from(sorted(TOKEN_LAYERS)), max_size=3),
    st.sampled_from(["first", "mean", "flatten"]),
    st.integers(0, 99),
)
"""Networks of up to 8 layers."""

"""Token layers for random networks: float32[batch, tokens, width] in, tokens out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.coupling.images import Applied, Layer, sequence

HEADS = 3
SIZE = 4
INNER = HEADS * SIZE


def _merged(y: Tensor) -> Tensor:
    """[batch, heads, tokens, size] to [batch, tokens, heads * size]."""
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], INNER)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: halves of the head size turned against each other."""
    a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    """Self-attention in one of several spellings; 3 heads of 4, and the residual around it."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * INNER), nn.Linear(INNER, width)
        if spelling in ("qk-layer-norm", "qk-rms-norm"):
            norm = nn.LayerNorm if spelling == "qk-layer-norm" else nn.RMSNorm
            self.q_norm, self.k_norm = norm(SIZE), norm(SIZE)
        if spelling == "talking":
            self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)
        if spelling == "rotary":
            angle = torch.arange(50.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())
        if spelling == "cross-covariance":
            self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        if spelling == "biased":
            self.bias = nn.Parameter(torch.randn(1, HEADS, 1, 1))
            self.slope = nn.Embedding(8, HEADS)
        if spelling == "cosine":
            self.logit_scale = nn.Parameter(torch.rand(HEADS, 1, 1))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, s, _ = x.shape
        if self.spelling == "split":
            q, k, v = (
                p.view(n, s, HEADS, SIZE).transpose(1, 2) for p in self.qkv(x).split(INNER, -1)
            )
        elif self.spelling == "interleaved":
            q, k, v = self.qkv(x).view(n, s, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)
        else:
            qkv = self.qkv(x).reshape(n, s, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.norm(x))
        spelt = getattr(self, self.spelling.replace("-", "_"), F.scaled_dot_product_attention)
        return x + self.out(_merged(spelt(q, k, v)))

    def qk_layer_norm(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)

    qk_rms_norm = qk_layer_norm

    def matmul(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _scores(q, k) @ v

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2], device=q.device)
        scores = (q @ k.transpose(-1, -2)).masked_fill(places[:, None] < places, float("-inf"))
        return torch.softmax(scores, -1) @ v

    def causal_flag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    def flat(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads merged into the batch."""
        n, h, s, d = q.shape
        q, k, v = (t.reshape(n * h, s, d) for t in (q, k, v))
        return torch.bmm(_scores(q, k), v).view(n, h, s, d)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.5
        return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)

    def talking(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Linear layers mix the scores of all heads, before and after the softmax."""
        scores = self.before((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1)).softmax(2)
        return self.after(scores).permute(0, 3, 1, 2) @ v

    def rotary(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = self.cos[: q.shape[2]], self.sin[: q.shape[2]]
        return F.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v)

    def cross_covariance(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention between the channels of a head, normalised over the tokens (XCiT)."""
        q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = (q @ k.transpose(-1, -2)) * self.temperature
        return (scores.softmax(-1) @ v).transpose(-1, -2)

    def linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """k^T v first; no softmax over pairs."""
        q, k = F.elu(q) + 1, F.elu(k) + 1
        total = q @ k.sum(2, keepdim=True).transpose(-1, -2)
        return (q @ (k.transpose(-1, -2) @ v)) / (total + 1e-3)

    def biased(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A learnt bias a head and one by bucketed distance (T5)."""
        places = torch.arange(q.shape[2], device=q.device)
        buckets = (places[:, None] - places).abs().clamp(max=7)
        bias = self.slope(buckets).permute(2, 0, 1).unsqueeze(0) + self.bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def cosine(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores of normalised queries and keys (Swin v2)."""
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v


class SharedKeys(nn.Module):
    """Four query heads of 4 read two key and value heads (GQA), or one (multi-query)."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.spelling, self.number = spelling, 1 if spelling == "one" else 2
        self.q = nn.Linear(width, 16)
        self.k, self.v = (nn.Linear(width, 4 * self.number, bias=False) for _ in range(2))
        self.out = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        q = self.q(x).view(n, s, 4, 4).transpose(1, 2)
        k, v = (f(x).view(n, s, self.number, 4).transpose(1, 2) for f in (self.k, self.v))
        if self.spelling == "flag":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (self.repeated(t) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(n, s, 16))

    def repeated(self, t: Tensor) -> Tensor:
        n, h, s, d = t.shape
        if self.spelling == "repeat":
            return t.repeat_interleave(2, 1)
        return t[:, :, None].expand(n, h, 4 // h, s, d).reshape(n, 4, s, d)


class SingleHead(nn.Module):
    """Attention without heads: the head size is pruned, the scale stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


class Latents(nn.Module):
    """Cross-attention of learnt queries to the tokens (Perceiver, DETR)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q = self.latents.expand(x.shape[0], -1, -1)
        return q + self.attention(q, x, x, need_weights=False)[0]


class FeedForward(nn.Module):
    """A gated FFN behind an RMS norm spelt in operators."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.gate, self.up = nn.Linear(width, 9, bias=False), nn.Linear(width, 9)
        self.down = nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TiedFeedForward(nn.Module):
    """Down is up, transposed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.up(x)) @ self.up.weight


class Experts(nn.Module):
    """A mixture of experts whose weights lie in one tensor, routed by a softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route = nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(3, width, 5) / 3)
        self.down = nn.Parameter(torch.randn(3, 5, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(torch.einsum("bsc,ech->bseh", x, self.up))
        weights = self.route(x).softmax(-1)
        return x + torch.einsum("bseh,ehc,bse->bsc", inner, self.down, weights)


class GroupedExperts(nn.Module):
    """Experts on rows that are sorted by expert, as transformers calls them (Mixtral)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers.integrations import moe  # noqa: F401

        self.route = nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(3, width, 5) / 3)
        self.down = nn.Parameter(torch.randn(3, 5, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        share, chosen = self.route(rows).softmax(-1).max(-1)
        chosen, order = chosen.sort()
        ends = (chosen[:, None] <= torch.arange(3)).sum(0)
        product = torch.ops.transformers.grouped_mm_fallback
        inner = F.gelu(product(rows[order], self.up, ends))
        result = product(inner, self.down, ends)[order.argsort()]
        return (result * share[:, None]).view(x.shape)


class Conv1D(nn.Module):
    """A linear layer as addmm with [in, out] weights on flattened tokens (GPT-2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 10) / 3)
        self.bias = nn.Parameter(torch.randn(10))
        self.back = nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], 10)
        return self.back(torch.tanh(inner))


class ClassToken(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


class ResizedPositions(nn.Module):
    """A grid of position embeddings, resized to the number of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 9, width))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.position.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(x.shape[1], 1), mode="bicubic", antialias=False)
        return x + grid.permute(0, 2, 3, 1).flatten(1, 2)


class Modulated(nn.Module):
    """Scale, shift and gate computed from the mean token (adaptive layer norm)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, gate = self.condition(F.silu(x.mean(1))).unsqueeze(1).chunk(3, -1)
        return x + gate * self.mix(self.norm(x) * (1 + scale) + shift)


class TokenMixer(nn.Module):
    """Convolution over the tokens as a linear layer on the transposed tokens (MLP-Mixer)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.pool = nn.LayerNorm(width), nn.AdaptiveAvgPool1d(6)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.norm(x).transpose(1, 2))
        return x + self.down(F.gelu(self.up(y))).transpose(1, 2)


class SpatialGate(nn.Module):
    """Half of the channels, normalised and mixed over the tokens, gates the other half (gMLP)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(width, 10), nn.LayerNorm(5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.enter(x).chunk(2, -1)
        return self.leave(a * (self.norm(b).mean(1, keepdim=True) + 1))


class Adapter(nn.Module):
    """A linear layer with a low-rank side path (LoRA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 8)
        self.a, self.b = nn.Parameter(torch.randn(width, 4)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.a @ self.b) * 0.25


class Gram(nn.Module):
    """Channels weighed by their products with one another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.einsum("bsc,bcd->bsd", y, torch.einsum("bsc,bsd->bcd", y, y) / 36)


class Distances(nn.Module):
    """Tokens weighed by their distances from learnt centres."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, width))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(-torch.cdist(x, self.centres[None].expand(x.shape[0], -1, -1)), -1)
        return x + weights @ self.centres


def _attention(spelling: str) -> Layer:
    return lambda width: Attention(width, spelling)


def _shared_keys(spelling: str) -> Layer:
    return lambda width: SharedKeys(width, spelling)


ATTENTIONS = (
    "fused", "split", "interleaved", "matmul", "causal", "causal-flag", "flat", "einsum",
    "talking", "rotary", "cross-covariance", "linear", "biased", "cosine", "qk-layer-norm",
    "qk-rms-norm",
)  # fmt: skip

TOKENS: dict[str, Layer] = {
    **{f"attention-{spelling}": _attention(spelling) for spelling in ATTENTIONS},
    **{f"keys-{name}": _shared_keys(name) for name in ("one", "expand", "repeat", "flag")},
    "single-head": SingleHead,
    "latents": Latents,
    "encoder": lambda w: sequence(
        nn.Linear(w, 8),
        nn.TransformerEncoderLayer(8, 2, 7, 0.0, F.gelu, batch_first=True, norm_first=True),
    ),
    "ffn": FeedForward,
    "ffn-tied": TiedFeedForward,
    "experts": Experts,
    "grouped-experts": GroupedExperts,
    "conv1d": Conv1D,
    "class-token": ClassToken,
    "positions": ResizedPositions,
    "modulated": Modulated,
    "token-mixer": TokenMixer,
    "spatial-gate": SpatialGate,
    "adapter": Adapter,
    "gram": Gram,
    "distances": Distances,
    "layer-norm": nn.LayerNorm,
    "layer-norm-plain": lambda w: nn.LayerNorm(w, elementwise_affine=False),
    "rms-norm": nn.RMSNorm,
    "rms-norm-plain": lambda w: nn.RMSNorm(w, eps=1e-5, elementwise_affine=False),
    "normalised": lambda _: Applied(lambda x: F.normalize(x, dim=-1)),
    "softmax": lambda _: Applied(lambda x: x * x.softmax(-1)),
    "linear": lambda w: nn.Linear(w, 8),
    "mlp": lambda w: sequence(nn.Linear(w, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, w)),
    "bilinear": lambda w: Applied(lambda x, layer: layer(x, x), nn.Bilinear(w, w, 6)),
}
"""Token layers by name."""

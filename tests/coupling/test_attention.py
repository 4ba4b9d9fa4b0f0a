"""What attention loses: whole heads, query heads alone, or indices of the size of a head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import capture
from pruna_ir.coupling import couple, remove
from pruna_ir.equivalence import relative_error, run_float64
from pruna_ir.errors import UsageError
from pruna_ir.masked_reference import masked_reference
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.transform import Context, Rewrite, apply


class GroupedQueries(nn.Module):
    """4 query heads of size 6 share 2 key and value heads; rotary positions in the middle."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 12), nn.Linear(5, 12)
        self.out = nn.Linear(24, 3)
        self.register_buffer("frequencies", torch.rand(3))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(7.0), self.frequencies)
        angle = torch.cat([angle, angle], -1)
        half = torch.cat([-x[..., 3:], x[..., :3]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        q = self.rotated(self.q(x).view(n, s, 4, 6).transpose(1, 2))
        k = self.rotated(self.k(x).view(n, s, 2, 6).transpose(1, 2))
        v = self.v(x).view(n, s, 2, 6).transpose(1, 2)
        if self.spelling == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (
                t[:, :, None].expand(n, 2, 2, s, 6).reshape(n, 4, s, 6) for t in (k, v)
            )
            if self.spelling == "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.4
                y = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
            else:
                y = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, s, 24))


class ChannelAttention(nn.Module):
    """Attention between the channels of a head (XCiT), or linear in the tokens; 3 heads of 4."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12)
        self.temperature = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        q, k, v = (p(x).view(n, s, 3, 4).permute(0, 2, 3, 1) for p in (self.q, self.k, self.v))
        if self.spelling == "cross-covariance":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = (q @ k.transpose(-1, -2) * self.temperature).softmax(-1) @ v
        else:
            context = k.softmax(-1) @ v.transpose(-1, -2) * self.temperature
            y = context.transpose(-1, -2) @ q.softmax(-2)
        return self.out(y.permute(0, 3, 1, 2).reshape(n, s, 12))


class Weighted(nn.Module):
    """Two streams mixed by a convolution whose kernel has one element."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.mix = nn.Conv1d(2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        streams = torch.stack([self.a(x[:, 0]), self.b(x[:, 1])], 1)
        return self.out(self.mix(streams).squeeze(1))


class Selected(nn.Module):
    """Scores of 4 heads of size 3, masked or gathered by a tensor that is repeated for each."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12)
        self.out = nn.Linear(12, 3)
        self.register_buffer("mask", torch.rand(7, 7) > 0.6)
        self.register_buffer("floor", torch.tensor(-1e9))
        self.register_buffer("places", torch.randint(0, 7, (7, 7)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, _ = x.shape
        q, k, v = (p(x).view(n, s, 4, 3).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        if self.spelling == "masked":
            scores = scores.masked_fill(self.mask.expand(n, 4, s, s), -1e9)
        elif self.spelling == "chosen":
            scores = torch.where(self.mask.expand(n, 4, s, s), scores, self.floor)
        else:
            scores = scores.gather(-1, self.places.expand(n, 4, s, s))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, s, 12))


SPELLINGS = ("sdpa", "matmul", "einsum")
MODULES = {
    **{name: lambda name=name: GroupedQueries(name) for name in SPELLINGS},
    **{name: lambda name=name: ChannelAttention(name) for name in ("cross-covariance", "linear")},
    "weighted": Weighted,
    **{name: lambda name=name: Selected(name) for name in ("masked", "chosen", "gathered")},
}


def removed(spelling: str, attention: str):
    """What half of every free group takes away, checked against the oracle."""
    torch.manual_seed(0)
    module = MODULES[spelling]()
    program = apply(Canonicalize(), capture(module, (torch.randn(2, 7, 5),))).program
    coupling = couple(program, attention)
    free = [group for group in coupling.groups if group.reason is None]
    plan = coupling.plan(u for group in free for u in group.units[: len(group.units) // 2])
    rw = Rewrite(program, "remove", Context())
    remove(rw, coupling, plan)
    (expected,) = masked_reference(program, program.examples, plan.removed)
    (actual,) = run_float64(rw.finish(), program.examples)
    assert relative_error(actual, expected) < 1e-12
    return {f"{name}[{dim}]": indices for name, dim, indices in plan.items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads_go_with_their_whole_group(spelling):
    gone = removed(spelling, "heads")
    assert gone["q.weight[0]"] == tuple(range(12))
    assert gone["k.weight[0]"] == gone["v.weight[0]"] == tuple(range(6))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_query_heads_go_alone_as_many_of_every_group(spelling):
    gone = removed(spelling, "queries")
    assert gone["q.weight[0]"] == gone["out.weight[1]"] == (*range(6), *range(12, 18))
    assert not {"k.weight[0]", "v.weight[0]"} & set(gone)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_size_of_a_head_shrinks_in_every_head(spelling):
    gone = removed(spelling, "size")
    # Rotary positions couple an index with its partner in the other half.
    assert gone["frequencies[0]"] == (0,)
    assert gone["k.weight[0]"] == (0, 3, 6, 9)
    assert gone["q.weight[0]"] == (0, 3, 6, 9, 12, 15, 18, 21)
    assert gone["v.weight[0]"] == (0, 1, 2, 6, 7, 8)


@pytest.mark.parametrize("spelling", ["cross-covariance", "linear"])
def test_attention_between_channels_loses_whole_heads(spelling):
    gone = removed(spelling, "heads")
    assert gone["q.weight[0]"] == gone["k.weight[0]"] == gone["v.weight[0]"] == (0, 1, 2, 3)
    assert gone["temperature[0]"] == (0,)


@pytest.mark.parametrize("spelling", ["cross-covariance", "linear"])
def test_attention_between_channels_loses_channels_of_every_head(spelling):
    gone = removed(spelling, "size")
    assert gone["q.weight[0]"] == gone["k.weight[0]"] == gone["v.weight[0]"] == (0, 1, 4, 5, 8, 9)
    assert "temperature[0]" not in gone


@pytest.mark.parametrize("spelling", ["masked", "chosen", "gathered"])
def test_what_is_repeated_for_every_head_does_not_hold_the_heads(spelling):
    gone = removed(spelling, "heads")
    assert gone["q.weight[0]"] == gone["v.weight[0]"] == gone["out.weight[1]"] == tuple(range(6))


def test_a_convolution_of_one_element_passes_the_channels_beside_it():
    assert removed("weighted", "heads")["a.weight[0]"] == (0, 1, 2)


def test_an_unknown_granularity_is_refused():
    program = capture(nn.Linear(3, 4), (torch.randn(2, 3),))
    with pytest.raises(UsageError, match="attention granularity 'head'.*did you mean 'heads'"):
        couple(program, "head")

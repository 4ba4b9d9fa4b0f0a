"""Attention in the spellings that models have: functions of a net's masks, and of q, k and v."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F  # noqa: N812

sdpa = F.scaled_dot_product_attention


def products(net, q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v


def scaled_query(net, q, k, v):
    return torch.softmax((q * 0.7) @ (k / 2).mT, -1) @ v


def einsum(net, q, k, v):
    s = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return torch.einsum("bhqk,bhkd->bqhd", s.softmax(-1), v)


def tokens_first(net, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def heads_outside(net, q, k, v):
    s = torch.einsum("bhqd,bhkd->hbqk", q, k)
    return torch.einsum("hbqk,bhkd->bhqd", s.softmax(-1), v)


def keys_first(net, q, k, v):
    s = k @ q.mT  # [..., keys, queries]
    return s.softmax(-2).mT @ v


def values_first(net, q, k, v):
    return v.mT @ torch.softmax(q @ k.mT, -1).mT


def permuted(net, q, k, v):
    k = k.transpose(1, 2)
    return torch.softmax(q @ k.permute(0, 2, 3, 1), -1) @ v


def three_dimensions(net, q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def baddbmm(net, q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(net.bias[:1], q, k.mT, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v)


def filled(net, q, k, v):
    hidden = (q[..., :1] > k.mT[..., :1, :]) & ~net.causal
    return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v


def where_lowest(net, q, k, v):
    scores = torch.where(net.causal, q @ k.mT, torch.finfo(torch.float32).min)
    return scores.softmax(-1) @ v


def biased(net, q, k, v):
    return (net.bias + q @ k.mT + net.added).softmax(-1) @ v


def torch_bias(net, q, k, v):
    return sdpa(q, k, v, net.bias)


def torch_grouped(net, q, k, v):
    return sdpa(q, k[:, :1], v[:, :1], scale=0.3, enable_gqa=True)


def repeated(net, q, k, v):
    return sdpa(q, k[:, :1].repeat_interleave(3, 1), v[:, :1].repeat_interleave(3, 1))


def expanded(net, q, k, v):
    k, v = (
        t[:, :1][:, :, None].expand(-1, 1, 3, 5, 4).reshape(-1, 3, 5, 4) for t in (k, v)
    )
    return sdpa(q, k, v)

"""Self-attention with its projections as one operator: the attention block of a transformer.

    query, key, value = split(x qkv_weight^T + qkv_bias), cut into heads
    mixed = softmax(query key^T * scale + mask) value, heads joined again
    y = mixed out_weight^T + out_bias

Vaswani et al., Attention Is All You Need (2017), section 3.2.2 (multi-head attention); heads of
queries may share heads of keys and values (Ainslie et al., GQA, 2023). The scores' masks are those
of ``attention``.

The weights of queries, keys and values lie below each other in one matrix, so that one product
computes all three. Heads are views of its result: nothing is copied before torch's fused
attention, nor between that and the last product. A missing bias of one of the three is zeros.

What stands between projection and product in other models (rotary embeddings, norms of queries and
keys, caches) is no part of the operator; those keep ``attention`` between layers. Neither is the
residual: a block that adds it in the last product's own loop (oneDNN) took 1.00 to 1.02 of the
time of one that adds it behind (0.93 for one token with one thread).

``tests/benchmarks/attention_block_speed.py``: run by torch, a model with blocks is 1.02
(ViT-Tiny), 1.07 (GPT-2, 64 tokens) and 1.10 times (BERT, 128 tokens) as fast as with layers and
``attention`` on two threads, 1.01 to 1.02 times on one. The ``eager`` runtime packs weights: there
the operator would be 0.93 to 0.99 times as fast, so it is spelt out, at 0.98 to 1.05.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pruna_ir.errors import UsageError
from pruna_ir.kernels.attention import (
    attend,
    causal_mask,
    check_mask,
    repeat_heads,
    size_of,
    value_of,
)
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default

_SCHEMA = (
    "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor? mask, int heads, int key_heads, bool causal, float scale) -> Tensor"
)


@torch.library.custom_op("pruna::attention_block", mutates_args=(), schema=_SCHEMA)
def attention_block(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    heads: int,
    key_heads: int,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Multi-head self-attention from its input to its output projection.

    Args:
        x: [..., tokens, in], any floating dtype.
        qkv_weight: [heads * size + key_heads * size + key_heads * value_size, in]: the rows of
            queries, of keys and of values, each head by head.
        qkv_bias: [the same rows] or None.
        out_weight: [out, heads * value_size].
        out_bias: [out] or None.
        mask: broadcasts to [..., heads, tokens, tokens]: true where a query sees a key, or of the
            dtype of ``x`` and added to the scores. None hides nothing.
        heads: of queries.
        key_heads: of keys and of values; each serves ``heads / key_heads`` heads of queries in a
            row.
        causal: token i sees the tokens 0 to i alone; excludes a mask.
        scale: what the products are multiplied by, commonly 1 / sqrt(size).

    Returns:
        [..., tokens, out], the dtype of ``x``; differentiable in all tensors.

    Raises:
        UsageError: a mask is given and ``causal`` is set.
        RuntimeError: shapes or dtypes do not fit.

    >>> x, ones = torch.tensor([[2.0], [4.0]]), torch.ones(1, 1)
    >>> qkv = torch.tensor([[0.0], [0.0], [1.0]])
    >>> attention_block(x, qkv, None, ones, None, None, 1, 1, True, 1.0).flatten()
    tensor([2., 3.])
    """
    _check(x, qkv_weight, qkv_bias, out_weight, out_bias, heads, key_heads)
    _check_mask(x, mask, heads, causal=causal)
    linear = _onednn if _onednn_applies(x, qkv_weight, out_weight) else _aten.linear.default
    qkv = linear(x, qkv_weight, qkv_bias)
    query, key, value = _parts(qkv, qkv_weight, out_weight, heads, key_heads)
    mixed = _SDPA(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=heads != key_heads
    )
    y: torch.Tensor = linear(_joined(mixed), out_weight, out_bias)
    return y


def attention_block_reference(
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    mask: Any,
    heads: int,
    key_heads: int,
    causal: bool,
    scale: float,
) -> Any:
    """The operator's meaning in ATen operators."""
    def mixed(query: Any, key: Any, value: Any) -> Any:
        seen = causal_mask(x, size_of(x, -2), size_of(x, -2)) if causal else None
        return attend(query, key, value, mask, seen, scale)

    return _around(mixed, x, qkv_weight, qkv_bias, out_weight, out_bias, heads, key_heads)


def attention_block_decomposition(
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    mask: Any,
    heads: int,
    key_heads: int,
    causal: bool,
    scale: float,
) -> Any:
    """The operator as two linear layers around ATen's own attention, keys repeated."""
    def mixed(query: Any, key: Any, value: Any) -> Any:
        return _SDPA(query, key, value, mask, is_causal=causal, scale=float(scale))

    return _around(mixed, x, qkv_weight, qkv_bias, out_weight, out_bias, heads, key_heads)


def _around(
    mixed: Callable[[Any, Any, Any], Any],
    x: Any,
    qkv_weight: Any,
    qkv_bias: Any,
    out_weight: Any,
    out_bias: Any,
    heads: int,
    key_heads: int,
) -> Any:
    """Both layers around an attention with a head of keys for every head of queries."""
    qkv = _aten.linear.default(x, qkv_weight, qkv_bias)
    query, key, value = _parts(qkv, qkv_weight, out_weight, heads, key_heads)
    rank, groups = len(value_of(x).shape) + 1, heads // key_heads
    key, value = repeat_heads(key, groups, rank), repeat_heads(value, groups, rank)
    return _aten.linear.default(_joined(mixed(query, key, value)), out_weight, out_bias)


def _parts(
    qkv: Any, qkv_weight: Any, out_weight: Any, heads: int, key_heads: int
) -> tuple[Any, Any, Any]:
    """Queries, keys and values, each [..., heads, tokens, size], in place."""
    size, value_size = _head_sizes(qkv_weight, out_weight, heads, key_heads)
    found, start = [], 0
    for count, width in ((heads, size), (key_heads, size), (key_heads, value_size)):
        part = _aten.slice.Tensor(qkv, -1, start, start + count * width)
        cut = _aten.unflatten.int(part, -1, [count, width])
        found.append(_aten.transpose.int(cut, -3, -2))
        start += count * width
    return found[0], found[1], found[2]


def _joined(mixed: Any) -> Any:
    """[..., heads, tokens, size] to [..., tokens, heads * size]."""
    return _aten.flatten.using_ints(_aten.transpose.int(mixed, -3, -2), -2, -1)


def _head_sizes(qkv_weight: Any, out_weight: Any, heads: int, key_heads: int) -> tuple[int, int]:
    """The size of a head of queries and of keys, and that of a head of values."""
    value_size = int(value_of(out_weight).shape[1]) // heads
    rows = int(value_of(qkv_weight).shape[0]) - key_heads * value_size
    return rows // (heads + key_heads), value_size


def _onednn_applies(*tensors: torch.Tensor) -> bool:
    return bool(torch._C._has_mkldnn) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def _check(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    heads: int,
    key_heads: int,
) -> None:
    torch._check(
        heads > 0 and key_heads > 0 and heads % key_heads == 0,
        lambda: f"attention_block: {heads} heads of queries cannot share {key_heads} of keys",
    )
    size, value_size = _head_sizes(qkv_weight, out_weight, heads, key_heads)
    rows = heads * size + key_heads * (size + value_size)
    torch._check(
        x.dim() >= 2
        and qkv_weight.shape[1] == x.shape[-1]
        and qkv_weight.shape[0] == rows > 0
        and out_weight.shape[1] == heads * value_size,
        lambda: f"attention_block: x is {list(x.shape)}, qkv_weight {list(qkv_weight.shape)}, "
        f"out_weight {list(out_weight.shape)} with {heads} heads and {key_heads} of keys",
    )
    _check_bias("qkv_bias", qkv_bias, qkv_weight)
    _check_bias("out_bias", out_bias, out_weight)
    given = [t for t in (x, qkv_weight, qkv_bias, out_weight, out_bias) if t is not None]
    dtypes = {t.dtype for t in given}
    torch._check(
        len(dtypes) == 1,
        lambda: f"attention_block: dtypes differ: {', '.join(sorted(map(str, dtypes)))}",
    )


def _check_bias(name: str, bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    torch._check(
        bias is None or bias.shape == weight.shape[:1],
        lambda: f"attention_block: {name} is {list(bias.shape)}, its weight {list(weight.shape)}",  # type: ignore[union-attr]
    )


def _check_mask(
    x: torch.Tensor, mask: torch.Tensor | None, heads: int, *, causal: bool
) -> None:
    if causal and mask is not None:
        raise UsageError("attention_block takes a mask or causal=True, not both; combine them")
    if mask is not None:
        scores = [*x.shape[:-2], heads, x.shape[-2], x.shape[-2]]
        check_mask("attention_block", mask, scores, x.dtype)


@attention_block.register_fake
def _(
    x: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    heads: int,
    key_heads: int,
    causal: bool,
    scale: float,  # noqa: ARG001
) -> torch.Tensor:
    _check(x, qkv_weight, qkv_bias, out_weight, out_bias, heads, key_heads)
    _check_mask(x, mask, heads, causal=causal)
    return x.new_empty([*x.shape[:-1], out_weight.shape[0]])


differentiate_reference("pruna::attention_block", attention_block_reference)

KERNEL = Kernel(
    torch.ops.pruna.attention_block.default, attention_block_reference,
    decomposition=attention_block_decomposition,
)  # fmt: skip

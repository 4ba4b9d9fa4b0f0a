"""Scaled dot-product attention as one operator: every spelling of it, grouped queries included.

    scores = query @ transpose(key) * scale        (+ mask, or -inf where a mask is false)
    result = softmax(scores) @ value

Vaswani et al., Attention Is All You Need (2017), equation 1; grouped queries as in Ainslie et al.,
GQA (2023): ``heads`` queries share ``heads / groups`` keys and values. A query that its mask hides
from every key gives zeros, where the formula alone would divide zero by zero.

The fast path is torch's fused attention, which never stores the scores; it reads grouped keys in
place, where models repeat them in memory. On a CPU it gains with length and with masks (at 1024
tokens a third of the formula's time); for some hundred tokens without a mask it is at par.

Projections are no part of this operator: rotary embeddings, normalised queries or caches stand
between projection and product in most models of today. Where nothing does, ``attention_block`` has
them too, with what that gains. The layer behind reads heads behind queries, so that nothing is
copied there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pruna_ir.errors import UsageError
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) -> Tensor"
)


@torch.library.custom_op("pruna::attention", mutates_args=(), schema=_SCHEMA)
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Softmax-weighted sums of values, one for each query.

    Args:
        query: [..., heads, queries, size], any floating dtype.
        key: [..., heads / groups, keys, size]; each head serves ``groups`` heads of queries in
            a row.
        value: [..., heads / groups, keys, out].
        mask: broadcasts to [..., heads, queries, keys]: true where a query sees a key, or of the
            dtype of ``query`` and added to the scores. None hides nothing.
        causal: query i sees the keys 0 to i alone; excludes a mask.
        scale: what the products are multiplied by, commonly 1 / sqrt(size).

    Returns:
        [..., heads, queries, out], the dtype of ``query``; differentiable in all tensors. In
        memory the heads stand behind the queries, where the layer after it wants them.

    Raises:
        UsageError: a mask is given and ``causal`` is set.
        RuntimeError: shapes or dtypes do not fit.

    >>> q = torch.zeros(1, 2, 1)
    >>> attention(q, q, torch.tensor([[[2.0], [4.0]]]), None, True, 1.0).flatten()
    tensor([2., 3.])
    """
    _check(query, key, value, mask, causal=causal)
    y: torch.Tensor = _SDPA(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=_groups(query, key) > 1
    )
    return y.transpose(-3, -2).contiguous().transpose(-3, -2) if y.dim() > 2 else y.contiguous()


def attention_reference(
    query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float
) -> Any:
    """The operator's meaning in ATen operators, as two matrix products and a softmax.

    The one place where attention is spelt out: passes and backends inline it.
    """
    key, value = _repeated(query, key, value)
    seen = causal_mask(query, size_of(query, -2), size_of(key, -2)) if causal else None
    return attend(query, key, value, mask, seen, scale)


def attend(query: Any, key: Any, value: Any, mask: Any, seen: Any, scale: float) -> Any:
    """Attention with a head of keys for every head of queries, as products and a softmax.

    Args:
        query: [..., heads, queries, size].
        key: [..., heads, keys, size].
        value: [..., heads, keys, out].
        mask: as in `attention`; not beside ``seen``.
        seen: [queries, keys], of which every row has a true: what a query sees; or None.
        scale: what the products are multiplied by.
    """
    scores = _aten.mul.Tensor(
        _aten.matmul.default(query, _aten.transpose.int(key, -2, -1)), float(scale)
    )
    if seen is not None:
        scores = _aten.masked_fill.Scalar(scores, _aten.logical_not.default(seen), -math.inf)
    if mask is None:
        return _aten.matmul.default(_aten.softmax.int(scores, -1), value)
    # A row that is hidden wholly is shown for the softmax, whose value and gradient would be NaN,
    # and its result is zeroed; masks are small beside the scores.
    if value_of(mask).dtype is torch.bool:
        hidden = _aten.logical_not.default(_aten.any.dim(mask, -1, keepdim=True))
        hides = _aten.logical_not.default(_aten.logical_or.default(mask, hidden))
        scores = _aten.masked_fill.Scalar(scores, hides, -math.inf)
    else:
        hidden = _aten.eq.Scalar(_aten.amax.default(mask, [-1], keepdim=True), -math.inf)
        scores = _aten.add.Tensor(scores, _aten.masked_fill.Scalar(mask, hidden, 0.0))
    result = _aten.matmul.default(_aten.softmax.int(scores, -1), value)
    return _aten.masked_fill.Scalar(result, hidden, 0.0)


def attention_decomposition(
    query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float
) -> Any:
    """The operator as ATen's own, keys repeated: the form that backends know attention in."""
    key, value = _repeated(query, key, value)
    return _SDPA(query, key, value, mask, is_causal=causal, scale=float(scale))


def value_of(tensor: Any) -> torch.Tensor:
    """A tensor, or the fake one of a proxy's node."""
    return tensor.node.meta["val"] if hasattr(tensor, "node") else tensor  # type: ignore[no-any-return]


def _groups(query: Any, key: Any) -> int:
    """How many heads of queries share a head of keys."""
    ours, theirs = value_of(query).shape, value_of(key).shape
    if len(ours) < 3:
        return 1
    torch._check(
        theirs[-3] > 0 and ours[-3] % theirs[-3] == 0,
        lambda: f"attention: {ours[-3]} heads of queries cannot share {theirs[-3]} heads of keys",
    )
    return int(ours[-3] // theirs[-3])


def _repeated(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Key and value with a head of their own for every head of queries."""
    groups = _groups(query, key)
    rank = len(value_of(query).shape)
    return repeat_heads(key, groups, rank), repeat_heads(value, groups, rank)


def repeat_heads(tensor: Any, groups: int, rank: int) -> Any:
    """[..., heads, n, size] of this rank with every head ``groups`` times in a row."""
    if groups == 1:
        return tensor
    sizes = [-1] * (rank + 1)
    sizes[-3] = groups
    expanded = _aten.expand.default(_aten.unsqueeze.default(tensor, -3), sizes)
    return _aten.flatten.using_ints(expanded, -4, -3)


def causal_mask(like: Any, queries: Any, keys: Any) -> Any:
    """[queries, keys], true where a query may see a key, on the device of a tensor."""
    return _aten.tril.default(_aten.new_ones.default(like, [queries, keys], dtype=torch.bool))


def size_of(tensor: Any, axis: int) -> Any:
    """A known size as a number, another as what computes it."""
    if isinstance(tensor, torch.Tensor):
        return tensor.shape[axis]
    known = tensor.node.meta.get("val")
    size = None if known is None else known.shape[axis]
    return size if isinstance(size, int) else _aten.sym_size.int(tensor, axis)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
) -> None:
    if causal and mask is not None:
        raise UsageError("attention takes a mask or causal=True, not both; combine them first")
    fits = (
        query.dim() == key.dim() == value.dim() >= 2
        and query.shape[-1] == key.shape[-1]
        and query.shape[:-3] == key.shape[:-3]
        and key.shape[:-1] == value.shape[:-1]
    )
    torch._check(
        fits,
        lambda: f"attention: query is {list(query.shape)}, key {list(key.shape)}, "
        f"value {list(value.shape)}",
    )
    torch._check(
        query.dtype == key.dtype == value.dtype,
        lambda: f"attention: query is {query.dtype}, key {key.dtype}, value {value.dtype}",
    )
    _groups(query, key)
    if mask is not None:
        check_mask("attention", mask, [*query.shape[:-1], key.shape[-2]], query.dtype)


def check_mask(operator: str, mask: torch.Tensor, scores: list[int], dtype: torch.dtype) -> None:
    """Refuse a mask that does not fit scores of these sizes.

    Raises:
        RuntimeError: it is neither bool nor of ``dtype``, or does not broadcast.
    """
    torch._check(
        mask.dtype in (torch.bool, dtype),
        lambda: f"{operator}: the mask is {mask.dtype}, neither bool nor {dtype}",
    )
    torch._check(
        mask.dim() <= len(scores)
        and all(m in (1, s) for m, s in zip(reversed(mask.shape), reversed(scores), strict=False)),
        lambda: f"{operator}: the mask is {list(mask.shape)}, the scores are {scores}",
    )


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,  # noqa: ARG001
) -> torch.Tensor:
    _check(query, key, value, mask, causal=causal)
    if query.dim() == 2:
        return query.new_empty([query.shape[0], value.shape[-1]])
    *lead, heads, queries, _ = query.shape
    return query.new_empty([*lead, queries, heads, value.shape[-1]]).transpose(-3, -2)


differentiate_reference("pruna::attention", attention_reference)

KERNEL = Kernel(
    torch.ops.pruna.attention.default, attention_reference, decomposition=attention_decomposition
)

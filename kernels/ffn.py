"""The feed-forward block of a transformer as one operator.

    h = act(x w1^T + b1)                          without a gate
    h = act(x gate_weight^T + gate_bias) * (x w1^T + b1)    with one
    y = h w2^T + b2 [+ residual]

``act`` is one of `ACTIVATIONS`. Shazeer, GLU Variants Improve Transformer (2020), equations 5 and
6, has the gated forms.

The fast path of a CPU (float32 inference with oneDNN) computes matrix product, bias and GELU, SiLU
or sigmoid in one oneDNN call, through ``mkldnn::_linear_pointwise``, and adds the residual in the
loop of the last product: 2% to 16% of a block's time (768 wide, 64 tokens and 1); at a width of
2048 that gains 5% with one thread and loses 6% with two. A GPU has ``triton_ffn``.

The norm before a block is no part of the operator: matrix products of oneDNN and cuBLAS do not
normalise what they read, so fusing it could at most save a call. In blocks of 192 to 2048
channels a layer norm took 0% to 5% of the time with one thread, up to 9% with two; an RMS norm,
six calls in torch, 1% to 6% from 64 tokens on with one thread and up to 27% for one token with
two. Spelt in fewer of torch's calls, it took between 0.8 and 1.0 of its time.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.errors import UsageError
from pruna_ir.kernels import triton_ffn
from pruna_ir.kernels.activations import IN_PLACE, REFERENCE, check_activation
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate_weight, "
    "Tensor? gate_bias, str activation, Tensor? residual=None) -> Tensor"
)

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "hardswish", "sigmoid")
"""The names that ``activation`` may have; ``activations.py`` says what they are."""

_POST_OPS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "sigmoid": ("sigmoid", ""),
}
"""oneDNN's names of the activations that it computes in its loop; its relu makes 0 of NaN."""


@torch.library.custom_op("pruna::ffn", mutates_args=(), schema=_SCHEMA)
def ffn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two linear layers around an activation, gated where ``gate_weight`` is given.

    Args:
        x: [..., in], any floating dtype.
        w1: [hidden, in].
        b1: [hidden] or None.
        w2: [out, hidden].
        b2: [out] or None.
        gate_weight: [hidden, in] or None.
        gate_bias: [hidden] or None.
        activation: one of `ACTIVATIONS`.
        residual: [..., out], added to the result, or None.

    Returns:
        [..., out], the dtype of ``x``; differentiable in all tensors.

    Raises:
        UsageError: the activation is unknown, or a gate's bias stands without its weight.
        RuntimeError: shapes or dtypes do not fit.

    >>> eye = torch.eye(2)
    >>> ffn(torch.tensor([[1.0, -1.0]]), eye, None, eye, None, None, None, "relu")
    tensor([[1., 0.]])
    """
    _check(x, w1, w2, gate_weight, gate_bias, activation)
    _check_residual(x, w2, residual)
    tensors = (x, w1, b1, w2, b2, gate_weight, gate_bias)
    if triton_ffn.applies(*tensors, residual):
        return triton_ffn.ffn(*tensors, activation, residual)
    run = _onednn if _onednn_applies(x, w1, w2) else ffn_reference
    result: torch.Tensor = run(*tensors, activation, residual)
    return result


def ffn_reference(
    x: Any,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    gate_weight: Any,
    gate_bias: Any,
    activation: str,
    residual: Any = None,
) -> Any:
    """The operator's meaning in ATen operators."""
    act = REFERENCE[activation]
    h = _aten.linear.default(x, w1, b1)
    if gate_weight is None:
        h = act(h)
    else:
        h = _aten.mul.Tensor(act(_aten.linear.default(x, gate_weight, gate_bias)), h)
    y = _aten.linear.default(h, w2, b2)
    return y if residual is None else _aten.add.Tensor(y, residual)


def _onednn_applies(*tensors: torch.Tensor) -> bool:
    return bool(torch._C._has_mkldnn) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in tensors
    )


def _onednn(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    if gate_weight is None:
        h = _activated(x, w1, b1, activation)
    else:
        h = _activated(x, gate_weight, gate_bias, activation)
        h = h.mul_(linear.default(x, w1, b1, "none", [], ""))
    result: torch.Tensor = (
        linear.default(h, w2, b2, "none", [], "")
        if residual is None
        else linear.binary(h, residual, w2, b2, "add")
    )
    return result


def _activated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """A linear layer and its activation."""
    post_op, algorithm = _POST_OPS.get(activation, ("none", ""))
    linear = torch.ops.mkldnn._linear_pointwise.default
    h: torch.Tensor = linear(x, weight, bias, post_op, [], algorithm)
    return h if activation in _POST_OPS else IN_PLACE[activation](h)


def _check(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> None:
    check_activation("ffn", activation, [], ACTIVATIONS)
    if gate_weight is None and gate_bias is not None:
        raise UsageError("ffn has a gate_bias, but no gate_weight")
    hidden, width = w1.shape
    torch._check(
        x.shape[-1] == width and w2.shape[-1] == hidden,
        lambda: f"ffn: x is {list(x.shape)}, w1 {list(w1.shape)}, w2 {list(w2.shape)}",
    )
    torch._check(
        gate_weight is None or gate_weight.shape == w1.shape,
        lambda: f"ffn: gate_weight is {list(gate_weight.shape)}, w1 {list(w1.shape)}",  # type: ignore[union-attr]
    )


def _check_residual(x: torch.Tensor, w2: torch.Tensor, residual: torch.Tensor | None) -> None:
    torch._check(
        residual is None
        or (residual.shape == (*x.shape[:-1], w2.shape[0]) and residual.dtype == x.dtype),
        lambda: f"ffn: the residual is {residual.dtype} {list(residual.shape)}, the result "  # type: ignore[union-attr]
        f"{x.dtype} {[*x.shape[:-1], w2.shape[0]]}",
    )


@ffn.register_fake
def _(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,  # noqa: ARG001
    w2: torch.Tensor,
    b2: torch.Tensor | None,  # noqa: ARG001
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(x, w1, w2, gate_weight, gate_bias, activation)
    _check_residual(x, w2, residual)
    return x.new_empty([*x.shape[:-1], w2.shape[0]])


differentiate_reference("pruna::ffn", ffn_reference)

KERNEL = Kernel(torch.ops.pruna.ffn.default, ffn_reference)

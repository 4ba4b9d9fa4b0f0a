"""The feed-forward block of a transformer as one operator.

    h = act(x w1^T + b1)                          without a gate
    h = act(x gate_weight^T + gate_bias) * (x w1^T + b1)    with one
    y = h w2^T + b2

``act`` is one of gelu (exact), gelu_tanh, relu, silu. Shazeer, GLU Variants Improve Transformer
(2020), equations 5 and 6, has the gated forms.

The fast path of a CPU (float32 inference with oneDNN) computes matrix product, bias and activation
in one oneDNN call, through ``mkldnn::_linear_pointwise``; that of a GPU is ``triton_ffn``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pruna_ir.errors import UsageError
from pruna_ir.kernels import triton_ffn
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? gate_weight, "
    "Tensor? gate_bias, str activation) -> Tensor"
)

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": _aten.gelu.default,
    "gelu_tanh": lambda h: _aten.gelu.default(h, approximate="tanh"),
    "relu": _aten.relu.default,
    "silu": _aten.silu.default,
}

_POST_OPS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
"""oneDNN's names of the activations."""

ACTIVATIONS = tuple(_ACTIVATIONS)
"""The names that ``activation`` may have."""


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
    tensors = (x, w1, b1, w2, b2, gate_weight, gate_bias)
    if triton_ffn.applies(*tensors):
        return triton_ffn.ffn(*tensors, activation)
    run = _onednn if _onednn_applies(x, w1, w2) else ffn_reference
    result: torch.Tensor = run(*tensors, activation)
    return result


def ffn_reference(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, gate_weight: Any, gate_bias: Any, activation: str
) -> Any:
    """The operator's meaning in ATen operators."""
    act = _ACTIVATIONS[activation]
    h = _aten.linear.default(x, w1, b1)
    if gate_weight is None:
        h = act(h)
    else:
        h = _aten.mul.Tensor(act(_aten.linear.default(x, gate_weight, gate_bias)), h)
    return _aten.linear.default(h, w2, b2)


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
) -> torch.Tensor:
    linear = torch.ops.mkldnn._linear_pointwise.default
    post_op, algorithm = _POST_OPS[activation]
    if gate_weight is None:
        h = linear(x, w1, b1, post_op, [], algorithm)
    else:
        h = linear(x, gate_weight, gate_bias, post_op, [], algorithm)
        h = h.mul_(linear(x, w1, b1, "none", [], ""))
    result: torch.Tensor = linear(h, w2, b2, "none", [], "")
    return result


def _check(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> None:
    if activation not in _ACTIVATIONS:
        raise UsageError(f"ffn has no activation '{activation}'; it has {', '.join(ACTIVATIONS)}")
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
) -> torch.Tensor:
    _check(x, w1, w2, gate_weight, gate_bias, activation)
    return x.new_empty([*x.shape[:-1], w2.shape[0]])


differentiate_reference("pruna::ffn", ffn_reference, tensors=7)

KERNEL = Kernel(torch.ops.pruna.ffn.default, ffn_reference)

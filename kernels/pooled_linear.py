"""The head of an image classifier: the mean over all positions, then a linear layer.

    p[n, c] = mean over all spatial positions of x[n, c, ...]
    y = act(p weight^T + bias)

``act`` is one of `pruna_ir.kernels.activations`. Lin et al., Network in Network (2014), section
3.2, has global average pooling.

The fast path of a CPU (float32 inference with oneDNN) reads images in the layout that they have,
contiguous or channels-last, and ends in oneDNN's product.
"""

from __future__ import annotations

from typing import Any

import torch

from pruna_ir.kernels.activations import IN_PLACE, REFERENCE, check_activation
from pruna_ir.kernels.kernel import Kernel, differentiate_reference

_aten = torch.ops.aten

_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, str activation='none', "
    "float[] activation_args=[]) -> Tensor"
)


@torch.library.custom_op("pruna::pooled_linear", mutates_args=(), schema=_SCHEMA)
def pooled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    activation_args: list[float] = [],  # noqa: B006 (the schema's default)
) -> torch.Tensor:
    """``act(linear(mean of x over its positions))``, differentiable in all three tensors.

    Args:
        x: [batch, channels, ...spatial] with one spatial dimension or more, any floating dtype.
        weight: [out, channels], the dtype of ``x``.
        bias: [out] or None.
        activation: one of `activations.ACTIVATIONS`.
        activation_args: ``[min, max]`` for hardtanh, ``[slope]`` for leaky_relu, empty otherwise.

    Returns:
        [batch, out], the dtype of ``x``.

    Raises:
        UsageError: the activation is unknown or has the wrong number of arguments.
        RuntimeError: shapes or dtypes do not fit.

    >>> x = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
    >>> pooled_linear(x, torch.tensor([[1.0, 10.0]]), None)
    tensor([[52.]])
    """
    _check(x, weight, bias, activation, activation_args)
    if not _onednn_applies(x, weight):
        result: torch.Tensor = pooled_linear_reference(
            x, weight, bias, activation, activation_args
        )
        return result
    pooled = torch.mean(x, _positions(x))
    y = torch.ops.mkldnn._linear_pointwise.default(pooled, weight, bias, "none", [], "")
    return IN_PLACE[activation](y, *activation_args)  # type: ignore[no-any-return]


def pooled_linear_reference(
    x: Any, weight: Any, bias: Any, activation: str = "none", activation_args: Any = ()
) -> Any:
    """The operator's meaning in ATen operators."""
    pooled = _aten.mean.dim(x, _positions(x))
    y = _aten.linear.default(pooled, weight, bias)
    return REFERENCE[activation](y, *activation_args)


def _positions(x: Any) -> list[int]:
    """The spatial dimensions of a tensor, or of the one that a proxy stands for."""
    rank = (x.node.meta["val"] if hasattr(x, "node") else x).dim()
    return list(range(2, rank))


def _onednn_applies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return bool(torch._C._has_mkldnn) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0 for t in (x, weight)
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    activation_args: list[float],
) -> None:
    check_activation("pooled_linear", activation, activation_args)
    torch._check(
        x.dim() >= 3 and weight.dim() == 2 and x.shape[1] == weight.shape[1],
        lambda: f"pooled_linear: x is {list(x.shape)} and weight is {list(weight.shape)}",
    )
    torch._check(
        bias is None or bias.shape == weight.shape[:1],
        lambda: f"pooled_linear: bias is {list(bias.shape)}, weight {list(weight.shape)}",  # type: ignore[union-attr]
    )
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    torch._check(
        len(dtypes) == 1,
        lambda: f"pooled_linear: dtypes differ: {', '.join(sorted(map(str, dtypes)))}",
    )


@pooled_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    activation_args: list[float] = [],  # noqa: B006 (the schema's default)
) -> torch.Tensor:
    _check(x, weight, bias, activation, activation_args)
    return x.new_empty([x.shape[0], weight.shape[0]])


differentiate_reference("pruna::pooled_linear", pooled_linear_reference)

KERNEL = Kernel(torch.ops.pruna.pooled_linear.default, pooled_linear_reference)

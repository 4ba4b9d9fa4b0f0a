"""Depthwise convolution in float64, as shifted sums; torch's own is hundreds of times slower.

    y[n, c m + k, p] = sum over taps t of x[n, c, stride p + dilation t - padding] w[c m + k, t]

float64 has no vectorised grouped convolution in torch on CPUs (seconds a layer at 224x224), and
lifted checks run many. The sum is the definition, tap by tap; it rounds like any other order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ShiftedDepthwise(TorchDispatchMode):
    """While active, float64 depthwise convolutions run as shifted sums.

    >>> x, w = torch.randn(2, 3, 7, 8).double(), torch.randn(6, 1, 3, 2).double()
    >>> expected = torch.conv2d(x, w, stride=2, padding=1, groups=3)
    >>> with ShiftedDepthwise():
    ...     found = torch.conv2d(x, w, stride=2, padding=1, groups=3)
    >>> torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    True
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One operator; all but float64 depthwise convolutions run as they are."""
        if func is aten.convolution.default and _is_depthwise(*args):
            x, weight, bias, stride, padding, dilation = args[:6]
            return shifted_sum(x, weight, bias, stride, padding, dilation)
        return func(*args, **(kwargs or {}))


def _is_depthwise(
    x: torch.Tensor, weight: torch.Tensor, _bias: Any, _stride: Any, _padding: Any, _dilation: Any,
    transposed: bool, _output_padding: Any, groups: int,
) -> bool:  # fmt: skip
    return (
        x.dtype == torch.float64 and not transposed and weight.shape[1] == 1
        and groups == x.shape[1] and groups > 1 and x.dim() == weight.dim()
    )  # fmt: skip


def shifted_sum(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """The depthwise convolution of x [n, c, *space] with weight [c m, 1, *kernel]."""
    rank, multiplier = x.dim() - 2, weight.shape[0] // x.shape[1]
    stride, padding, dilation = (
        tuple(v) * rank if len(v) == 1 else tuple(v) for v in (stride, padding, dilation)
    )
    kernel = weight.shape[2:]
    sizes = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(rank)
    ]
    padded = torch.nn.functional.pad(x, [p for v in reversed(padding) for p in (v, v)])
    if multiplier > 1:
        padded = padded.repeat_interleave(multiplier, 1)
    total = x.new_zeros(x.shape[0], weight.shape[0], *sizes)
    taps = weight.reshape(weight.shape[0], -1)
    for number, tap in enumerate(itertools.product(*(range(k) for k in kernel))):
        window = padded
        for d, at in enumerate(tap):
            first = dilation[d] * at
            last = first + stride[d] * (sizes[d] - 1)
            window = aten.slice.Tensor(window, 2 + d, first, last + 1, stride[d])
        total.addcmul_(window, taps[:, number].reshape(-1, *[1] * rank))
    return total if bias is None else total + bias.reshape(-1, *[1] * rank)

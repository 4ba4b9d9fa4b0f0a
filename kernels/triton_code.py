"""What the Triton kernels share: when they run, how large their tiles are, and activations.

Triton is imported when a kernel is first used; importing these modules does not need it. A
kernel's code is a function inside of a function; Triton's interpreter looks for the names that it
reads among the globals of its module, so they are put there first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

tl: Any = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the floating kernels compute in; sums are kept in float32."""

_AMPERE = (8, 0)


def runs_on(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton is installed and all tensors are on one NVIDIA GPU, Ampere or later."""
    given = [t for t in tensors if t is not None]
    return (
        all(t.is_cuda and t.device == given[0].device and t.numel() > 0 for t in given)
        and find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(given[0].device) >= _AMPERE
    )


def precision(dtype: torch.dtype, *, convolution: bool) -> str:
    """How float32 factors are multiplied: as torch's own settings say."""
    if dtype is not torch.float32:
        return "ieee"
    if convolution:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tiles(
    rows: int, columns: int, device: torch.device, *, widest: int = 128
) -> tuple[int, int]:
    """(rows, columns) of a tile: at least 16, and small enough to occupy the GPU.

    At most 128 rows and ``widest`` columns: in float32, three stages of two such operands then
    fit the shared memory of every GPU from Ampere on (99 KiB).
    """
    row, column = (max(16, 1 << (n - 1).bit_length()) for n in (rows, columns))
    row, column = min(row, 128), min(column, widest)
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    while -(-rows // row) * -(-columns // column) < processors and max(row, column) > 32:
        row, column = (row // 2, column) if row >= column else (row, column // 2)
    return row, column


@cache
def jit() -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``."""
    decorator: Callable[[Callable[..., Any]], Any] = import_module("triton").jit
    return decorator


@cache
def language() -> Any:
    """``triton.language``."""
    return import_module("triton.language")


@cache
def activation() -> Any:
    """The Triton function of every activation by name; NaN stays NaN."""
    global tl
    tl = language()

    @jit()
    def activate(x, name: tl.constexpr, a, b):  # type: ignore[no-untyped-def]
        if name == "relu":
            x = tl.where(x < 0, 0.0, x)
        elif name == "hardtanh":
            x = tl.where(x < a, a, tl.where(x > b, b, x))
        elif name == "leaky_relu":
            x = tl.where(x < 0, x * a, x)
        elif name == "hardswish":
            shifted = x + 3
            shifted = tl.where(shifted < 0, 0.0, tl.where(shifted > 6, 6.0, shifted))
            x = x * shifted / 6
        elif name == "silu" or name == "quick_gelu":
            x = x * tl.sigmoid(x if name == "silu" else 1.702 * x)
        elif name == "sigmoid":
            x = tl.sigmoid(x)
        elif name == "gelu":
            x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
        elif name == "gelu_tanh":
            # 0.5 (1 + tanh(u)) = sigmoid(2 u)
            x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x

    return activate

"""Spell hardswish in operators that every runtime has.

    hardswish(x) = x * clamp(x + 3, 0, 6) / 6

Source: Howard et al., Searching for MobileNetV3, ICCV 2019, section 5.2. PyTorch computes float16
and bfloat16 hardswish in float32 and rounds once; four operators would round four times, so those
are left as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pruna_ir import Effect, Pass, Rewrite
from pruna_ir.program import dtype_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandHardswish(Pass):
    """Replace ``hardswish(x)`` by an addition, a clamp, a product and a scaling.

    Rewrite:
        y = hardswish(x)  -->  y = (x * hardtanh(x + 3, 0, 6)) / 6

    Requires: float32 or float64.

    Options:
        reciprocal: scale by multiplying with 1/6, for runtimes where division is slow.
    """

    name: ClassVar[str] = "expand-hardswish"
    effect: ClassVar[Effect] = Effect.ROUNDING
    api_version: ClassVar[int] = 1

    reciprocal: bool = False

    def rewrite(self, rw: Rewrite) -> None:
        """Expand every hardswish in scope."""
        for node in rw.calls(_aten.hardswish.default):
            dtype = dtype_of(node)
            if dtype not in (torch.float32, torch.float64):
                rw.skip(node, f"computes in {dtype}, where four roundings are worse than one")
                continue
            rw.applied(node, "expanded into four operators")
            function = _multiplied if self.reciprocal else _divided
            rw.inline(node, function, {"x": rw.call(node).producer("self")})


def _gated(x: Any) -> Any:
    return _aten.mul.Tensor(x, _aten.hardtanh.default(_aten.add.Tensor(x, 3.0), 0.0, 6.0))


def _divided(x: Any) -> Any:
    return _aten.div.Tensor(_gated(x), 6.0)


def _multiplied(x: Any) -> Any:
    return _aten.mul.Tensor(_gated(x), 1.0 / 6.0)

"""Four bugs that common tools let pass, planted into our own passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pruna_ir.coupling.rule import Rule, Site
from pruna_ir.coupling.table import RULES
from pruna_ir.coupling.value import Value
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.transform import Effect, Pass, Rewrite

aten = torch.ops.aten


class Branches(nn.Module):
    """Two branches, concatenated; every planted bug has something to break.

    Input float32[batch, 3, 9, 9].
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.left_bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.right, self.right_bn = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.join = nn.Conv2d(13, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = torch.relu(self.left_bn(self.left(x)))
        right = nn.functional.relu6(self.right_bn(self.right(x)))
        joined = torch.relu(self.join(torch.cat([left, right], 1)))
        return self.head(joined.mean((2, 3)))


@dataclass(frozen=True)
class WrongEpsilon(FoldBatchNorm):
    """Folds with an epsilon of 1e-6 where the model says 1e-5."""

    name: ClassVar[str] = "fold-with-wrong-epsilon"
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        for node in rw.calls(aten.batch_norm.default):
            rw.update(node, eps=1e-6)
        super().rewrite(rw)


@dataclass(frozen=True)
class DroppedRelu(FuseConvBnRelu):
    """Fuses convolution and relu, and forgets the relu."""

    name: ClassVar[str] = "fuse-and-drop-relu"
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        super().rewrite(rw)
        for node in rw.calls(torch.ops.pruna.conv_act.default):
            if rw.call(node).arg("activation") == "relu":
                rw.update(node, activation="none")


@dataclass(frozen=True)
class Relu6AsRelu(Pass):
    """Takes relu6 for relu, which inputs in [0, 1) do not show."""

    name: ClassVar[str] = "relu6-as-relu"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        for node in rw.calls(aten.hardtanh.default, aten.relu6.default):
            source = rw.call(node).producer("self")
            rw.replace(node, rw.insert(aten.relu.default, before=node, like=node, self=source))


@dataclass(frozen=True)
class OffByOne(PruneChannels):
    """Prunes with a rule of concatenation that is off by one."""

    name: ClassVar[str] = "prune-off-by-one"
    api_version: ClassVar[int] = 1

    def rewrite(self, rw: Rewrite) -> None:
        right = RULES["aten::cat"]

        def wrong(site: Site) -> Value:
            value = right.couple(site)
            assert isinstance(value, Value)
            blocks = tuple(replace(b, ids=np.roll(b.ids, 1, axis=-1)) for b in value.blocks)
            return replace(value, blocks=blocks)

        RULES["aten::cat"] = Rule(wrong, right.resize)
        try:
            super().rewrite(rw)
        finally:
            RULES["aten::cat"] = right

"""Networks with every kind of group, in float64, and what a naive reference needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.data import TensorData
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.scored_members import Candidates
from pruna_ir.transform import Context, apply


class Images(nn.Module):
    """Convolutions (plain, grouped, depthwise), batch norms, a residual sum, flattened columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Conv2d(8, 5, 1)
        self.bn_mix = nn.BatchNorm2d(5)
        self.hidden = nn.Linear(5 * 4, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.grouped(x) + x)
        x = torch.relu(self.bn_mix(self.mix(self.deep(x))))
        x = F.adaptive_avg_pool2d(x, 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class Norm(nn.Module):
    """RMS norm, spelled out as transformers does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Language(nn.Module):
    """One block with grouped-query attention, a gated FFN and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm, self.norm_ffn, self.norm_out = Norm(12), Norm(12), Norm(12)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.o = nn.Linear(12, 12, bias=False)
        self.gate, self.up, self.down = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attended(self.norm(x))
        y = self.norm_ffn(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm_out(x))

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, 4, 3).transpose(1, 2)
        k = self.k(x).view(batch, seq, 2, 1, 3).expand(batch, seq, 2, 2, 3)
        v = self.v(x).view(batch, seq, 2, 1, 3).expand(batch, seq, 2, 2, 3)
        k, v = (t.reshape(batch, seq, 4, 3).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, seq, 12))


class Scored:
    """A network, its program, the groups that may be pruned, and 7 samples of data."""

    def __init__(self, name: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = {"images": Images, "language": Language}[name]().double().eval()
        for child in self.module.modules():
            if isinstance(child, nn.BatchNorm2d):
                nn.init.uniform_(child.running_mean, -0.2, 0.2)
                nn.init.uniform_(child.running_var, 0.5, 2)
                nn.init.uniform_(child.weight, 0.5, 1.5)
        self.labels: torch.Tensor | None
        if name == "images":
            self.inputs = torch.randn(7, 3, 6, 5, dtype=torch.float64)
            self.labels = torch.randint(0, 4, (7,))
        else:
            self.inputs = torch.randint(0, 11, (7, 6))
            self.labels = None
        captured = capture(self.module, (self.inputs[:2],))
        self.program = apply(Canonicalize(), captured).program
        self.coupling = couple(self.program)
        self.groups = [
            group
            for group in self.coupling.groups
            if group.reason is None and any(m.produced for m in group.members)
        ]

    def data(self, batch_size: int = 3) -> TensorData:
        return TensorData((self.inputs,), self.labels, batch_size)

    def context(self, batch_size: int = 3) -> Context:
        return Context(data=self.data(batch_size), seed=3)

    def candidates(self) -> Candidates:
        return Candidates(self.program, self.coupling, self.groups, self.context())

    def unit_entries(self, member, unit: int, tensor: torch.Tensor) -> torch.Tensor:
        """The entries of a tensor that belong to one unit."""
        index = member.indices[unit].tolist()
        return torch.cat([tensor.select(member.dim, i).flatten() for i in index])

    def members(self, group):
        """The members whose tensors are parameters, each parameter once."""
        seen = {}
        for member in group.members:
            parameter = dict(self.module.named_parameters(remove_duplicate=False)).get(
                member.tensor
            )
            if parameter is not None:
                seen.setdefault((id(parameter), member.dim), member)
        return list(seen.values())

    def readers(self, group) -> Iterator[tuple[nn.Module, list[list[int]]]]:
        """The layers that read a group's channels, with the channels of each unit."""
        for member in self.members(group):
            parameter = self.module.get_parameter(member.tensor)
            if member.dim != 1:
                continue
            for layer in self.module.modules():
                if getattr(layer, "weight", None) is not parameter:
                    continue
                if isinstance(layer, nn.Linear):
                    yield layer, member.indices.tolist()
                elif isinstance(layer, nn.Conv2d):
                    local = layer.in_channels // layer.groups
                    yield layer, [
                        [g * local + j for g in range(layer.groups) for j in unit]
                        for unit in member.indices.tolist()
                    ]

    def reads(self) -> dict[nn.Module, torch.Tensor]:
        """What each layer reads on all data, [positions, channels]."""
        found: dict[nn.Module, torch.Tensor] = {}

        def keep(layer, args):
            found[layer] = args[0].movedim(1, -1) if args[0].dim() == 4 else args[0]

        hooks = [
            layer.register_forward_pre_hook(keep)
            for layer in self.module.modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        ]
        with torch.no_grad():
            self.module(self.inputs)
        for hook in hooks:
            hook.remove()
        return {layer: x.reshape(-1, x.shape[-1]) for layer, x in found.items()}

    def sample_loss(self, module: nn.Module, number: int) -> torch.Tensor:
        """The loss of one sample: its label's, or the mean over the next tokens."""
        logits = module(self.inputs[number : number + 1])
        if self.labels is not None:
            return -torch.log_softmax(logits[0], -1)[self.labels[number]]
        chances = torch.log_softmax(logits[0, :-1], -1)
        return -torch.stack(
            [chances[t, self.inputs[number, t + 1]] for t in range(len(chances))]
        ).mean()


@cache
def shared(name: str) -> Scored:
    """One `Scored` for all tests of a process that leave it as it is."""
    return Scored(name)


def assert_same(actual: list[np.ndarray], expected: list[list[float]], tolerance: float = 1e-9):
    """Scores agree, relative to the largest of each group."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        other = np.asarray(other, np.float64)
        assert one.dtype == np.float64
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()

"""Layers over one axis, float32[batch, width, 12], or three, float32[batch, width, 4, 3, 3].

Both keep their space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from tests.coupling.images import Applied, Layer, sequence

aten = torch.ops.aten


class Recurrent(nn.Module):
    """An LSTM, GRU or plain recurrence along the places."""

    def __init__(self, width: int, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.layer = kind(width, 5, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2))[0].transpose(1, 2)


class LastState(nn.Module):
    """The last hidden state of a two-layer LSTM, added to every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(width, 4, 2), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.layer(x.permute(2, 0, 1))
        return x + self.out(hidden[-1] + cell[-1]).unsqueeze(-1)


class Cells(nn.Module):
    """Four steps of a cell over the places, from states made like the input."""

    def __init__(self, width: int, kind: type[nn.RNNCellBase], **options: object) -> None:
        super().__init__()
        self.cell = kind(width, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        states = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        steps = []
        for place in range(4):
            states = self.cell(x[:, :, place], states)
            steps.append(states[0] * states[1] if isinstance(states, tuple) else states)
        return torch.stack(steps, 2).repeat_interleave(3, 2)


class StartedRecurrent(nn.Module):
    """A two-layer GRU from states that a linear layer gives both layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.layer = nn.Linear(width, 10), nn.GRU(width, 5, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states = self.start(x.mean(2)).view(-1, 2, 5).transpose(0, 1).contiguous()
        return self.layer(x.transpose(1, 2), states)[0].transpose(1, 2)


class GatedDilated(nn.Module):
    """WaveNet: tanh times sigmoid of dilated convolutions, and the residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filter, self.gate = (
            parametrizations.weight_norm(nn.Conv1d(width, 5, 2, dilation=2)) for _ in range(2)
        )
        self.out = nn.Conv1d(5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (2, 0))
        return x + self.out(torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded)))


class Snake(nn.Module):
    """x + sin^2(a x) / a with an a for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(1, width, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.a * x).pow(2) / (self.a + 1e-9)


class Conformer(nn.Module):
    """Pointwise, gated, depthwise, normalised, pointwise convolutions around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(width, 10, 1), nn.GLU(1), nn.Conv1d(5, 5, 3, padding=1, groups=5),
            nn.BatchNorm1d(5), nn.SiLU(), nn.Conv1d(5, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TemporalShift(nn.Module):
    """Some channels shifted along time, both ways, before a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        part = x.shape[1] // 3
        left = F.pad(x[:, :part, 1:], (0, 0, 0, 0, 0, 1))
        right = F.pad(x[:, part : 2 * part, :-1], (0, 0, 0, 0, 1, 0))
        return self.conv(torch.cat([left, right, x[:, 2 * part :]], 1))


def _padded_line(x: Tensor) -> Tensor:
    y = F.pad(x, (1, 1), "reflect") + F.pad(x, (1, 1), "replicate")
    y = y + aten.reflection_pad1d(x, [1, 1]) + aten.replication_pad1d(x, [1, 1])
    return F.avg_pool1d(y, 3, 1) + aten.max_pool1d_with_indices(y, 3, 1)[0]


def _resized_line(x: Tensor) -> Tensor:
    half = F.adaptive_avg_pool1d(x, 6)
    y = F.interpolate(half, size=12) + F.interpolate(half, size=12, mode="linear")
    y = y + F.interpolate(half, size=12, mode="nearest-exact")
    return y + F.adaptive_max_pool1d(x, 12)


def _resized_volume(x: Tensor) -> Tensor:
    half = F.adaptive_avg_pool3d(x, (2, 3, 3))
    for mode in ("trilinear", "nearest", "nearest-exact"):
        x = x + F.interpolate(half, size=(4, 3, 3), mode=mode)
    return x


def _padded_volume(x: Tensor) -> Tensor:
    y = F.pad(x, (1,) * 6, "reflect") + F.pad(x, (1,) * 6, "replicate")
    y = y + aten.reflection_pad3d(x, [1] * 6) + aten.replication_pad3d(x, [1] * 6)
    return y[:, :, 1:-1, 1:-1, 1:-1]


def _pooled_volume(x: Tensor) -> Tensor:
    y = aten._adaptive_avg_pool3d(x, [4, 3, 3]) + F.adaptive_max_pool3d(x, (4, 3, 3))
    return y + aten.max_pool3d_with_indices(x, [3, 3, 3], [1, 1, 1], [1, 1, 1])[0]


def _sampled_volume(x: Tensor) -> Tensor:
    grid = torch.linspace(-0.8, 0.8, 108).view(1, 4, 3, 3, 3).expand(x.shape[0], -1, -1, -1, -1)
    return x + aten.grid_sampler_3d(x, grid, 0, 0, False)  # noqa: FBT003


def _volume(width: int, outputs: int, **options: object) -> nn.Conv3d:
    return nn.Conv3d(width, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


LINES: dict[str, Layer] = {
    "conv": lambda w: nn.Conv1d(w, 6, 3, padding=1),
    "conv-grouped": lambda w: sequence(nn.Conv1d(w, 6, 1), nn.Conv1d(6, 4, 3, 1, 1, groups=2)),
    "depthwise": lambda w: nn.Conv1d(w, w, 3, padding=1, groups=w),
    "transposed": lambda w: nn.ConvTranspose1d(w, 5, 3, padding=1),
    "transposed-grouped": lambda w: sequence(
        nn.Conv1d(w, 6, 1), nn.ConvTranspose1d(6, 6, 3, padding=1, groups=3)
    ),
    "transposed-depthwise": lambda w: nn.ConvTranspose1d(w, w, 3, padding=1, groups=w),
    "norm": lambda w: sequence(nn.BatchNorm1d(w), nn.PReLU(w)),
    "group-norm": lambda w: sequence(nn.Conv1d(w, 8, 1), nn.GroupNorm(4, 8)),
    "pool": lambda _: sequence(nn.MaxPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1)),
    "padded": lambda _: Applied(_padded_line),
    "resized": lambda _: Applied(_resized_line),
    "lstm": lambda w: Recurrent(w, nn.LSTM),
    "lstm-both-ways": lambda w: Recurrent(w, nn.LSTM, bidirectional=True, num_layers=2),
    "lstm-last": LastState,
    "gru": lambda w: Recurrent(w, nn.GRU, num_layers=2),
    "gru-plain": lambda w: Recurrent(w, nn.GRU, bias=False),
    "rnn": lambda w: Recurrent(w, nn.RNN),
    "rnn-relu": lambda w: Recurrent(w, nn.RNN, nonlinearity="relu"),
    "lstm-cell": lambda w: Cells(w, nn.LSTMCell),
    "gru-cell": lambda w: Cells(w, nn.GRUCell, bias=False),
    "rnn-cell": lambda w: Cells(w, nn.RNNCell),
    "rnn-relu-cell": lambda w: Cells(w, nn.RNNCell, nonlinearity="relu"),
    "gru-started": StartedRecurrent,
    "gated-dilated": GatedDilated,
    "snake": Snake,
    "conformer": Conformer,
}
"""Layers along one axis by name."""

VOLUMES: dict[str, Layer] = {
    "conv": lambda w: _volume(w, 5),
    "conv-grouped": lambda w: sequence(nn.Conv3d(w, 6, 1), _volume(6, 4, groups=2)),
    "depthwise": lambda w: _volume(w, w, groups=w),
    "factorised": lambda w: sequence(
        nn.Conv3d(w, 5, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(5), nn.ReLU(),
        nn.Conv3d(5, 6, (3, 1, 1), padding=(1, 0, 0)),
    ),
    "transposed": lambda w: nn.ConvTranspose3d(w, 4, 3, padding=1),
    "transposed-depthwise": lambda w: nn.ConvTranspose3d(w, w, 3, padding=1, groups=w),
    "norm": lambda w: sequence(nn.BatchNorm3d(w), nn.GroupNorm(1, w)),
    "instance-norm": lambda w: nn.InstanceNorm3d(w, affine=True),
    "pool": lambda _: sequence(nn.MaxPool3d(3, 1, 1), nn.AvgPool3d(3, 1, 1)),
    "resized": lambda _: Applied(_resized_volume),
    "padded": lambda _: Applied(_padded_volume),
    "pooled": lambda _: Applied(_pooled_volume),
    "sampled": lambda _: Applied(_sampled_volume),
    "temporal-shift": TemporalShift,
}  # fmt: skip
"""Layers over three axes by name."""

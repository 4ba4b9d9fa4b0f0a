"""For every rule of the table one network that hangs on it: a convolution, the operator, a layer.

What the operator makes of the channels reaches the next layer and nothing else, so that a wrong
rule cannot hide behind a sum that couples all channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.coupling.random_networks import Network, Recipe, single

aten = torch.ops.aten

CHANNELS = 12


class Chain(nn.Module):
    """float32[batch, 3, 6, 6]: convolution to 12 channels, function, layer on dimension 1."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.function = function
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        x = function(self.first(*self.inputs(2)))
        layers = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        self.second = layers[x.dim()](x.shape[1], 4, *([] if x.dim() == 2 else [1]))
        self.eval()

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        return (torch.randn(batch, 3, 6, 6),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.function(self.first(x)))
        return y.flatten(2).mean(2) if y.dim() > 2 else y


def _line(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.flatten(2))


def _volume(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.unflatten(2, (2, 3)))


def _places() -> Tensor:
    return torch.tensor([5, 0, 3])


def _grid(x: Tensor, rank: int) -> Tensor:
    grid = torch.linspace(-0.9, 0.9, 2**rank * rank).view(1, *[2] * rank, rank)
    return grid.expand(len(x), *[-1] * (rank + 1))


def _flag(x: Tensor) -> Tensor:
    return x > 0


_KEEP = {"keepdim": True}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "log_sigmoid": F.logsigmoid,
    "nan_to_num": torch.nan_to_num,
    "dropout": lambda x: F.dropout(x, training=False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=False),
    "feature_dropout": lambda x: F.dropout2d(x, training=False),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=False),
    "native_dropout": lambda x: aten.native_dropout(x, 0.5, False)[0],  # noqa: FBT003
    "clone": torch.clone,
    "contiguous": lambda x: x.transpose(2, 3).contiguous(),
    "alias": aten.alias,
    "detach": torch.detach,
    "lift_fresh_copy": aten.lift_fresh_copy,
    "__and__": lambda x: _flag(x).__and__(x < 1).float(),
    "__or__": lambda x: _flag(x).__or__(x < -1).float(),
    "__xor__": lambda x: _flag(x).__xor__(x < -1).float(),
    "bitwise_not": lambda x: aten.bitwise_not(_flag(x)).float(),
    "where": lambda x: torch.where(_flag(x), x, x * 2),
    "masked_fill": lambda x: x.masked_fill(_flag(x), 0.5),
    "expand_as": lambda x: x.mean(2, **_KEEP).expand_as(x),
    "copy": lambda x: aten.copy(x, x * 2),
    "zeros_like": lambda x: torch.zeros_like(x) + 1,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 2.0),
    "empty_like": lambda x: aten.fill(torch.empty_like(x), 2.0),
    "rand_like": lambda x: torch.rand_like(x) * 0 + 1,
    "fill": lambda x: aten.fill(x, 2.0),
    "_weight_norm": lambda x: torch._weight_norm(x, x[:, :1, :1, :1].detach() * 0 + 2, 0),
    "fake_quantize_per_tensor_affine": lambda x: torch.fake_quantize_per_tensor_affine(
        x, 0.01, 0, -9999, 9999
    ),
    "to": lambda x: x.to(torch.float64).to(torch.float32),
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float64).float(),
    "type_as": lambda x: x.double().type_as(x),
    "softmax": lambda x: x.softmax(2),
    "_softmax": lambda x: aten._softmax(x, 2, False),  # noqa: FBT003
    "log_softmax": lambda x: x.log_softmax(2),
    "_log_softmax": lambda x: aten._log_softmax(x, 2, False),  # noqa: FBT003
    "cumsum": lambda x: x.cumsum(2),
    "cumprod": lambda x: x.cumprod(2),
    "sort": lambda x: x.sort(2)[0],
    "topk": lambda x: x.topk(3, 2)[0],
    "argsort": lambda x: x.argsort(2).float(),
    "argmax": lambda x: x.argmax(2, **_KEEP).float(),
    "argmin": lambda x: x.argmin(2, **_KEEP).float(),
    "max": lambda x: x.max(2, **_KEEP)[0],
    "min": lambda x: x.min(2, **_KEEP)[0],
    "median": lambda x: x.median(2, **_KEEP)[0],
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 2),
    "diff": lambda x: x.diff(dim=2),
    "prod": lambda x: x.prod(2, **_KEEP),
    "logsumexp": lambda x: x.logsumexp(2, **_KEEP),
    "any": lambda x: (x > 1).any(2, **_KEEP).float(),
    "all": lambda x: (x > -0.5).all(2, **_KEEP).float(),
    "mean": lambda x: x.mean(2, **_KEEP),
    "sum": lambda x: x.sum(2),
    "amax": lambda x: x.amax(2, **_KEEP),
    "amin": lambda x: x.amin(2),
    "var": lambda x: x.var(2, **_KEEP),
    "std": lambda x: x.std(2),
    "var_mean": lambda x: torch.var_mean(x, 2)[0],
    "std_mean": lambda x: torch.std_mean(x, 2)[0],
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=2, **_KEEP),
    "zeros": lambda x: x + torch.zeros(CHANNELS, 1, 6),
    "ones": lambda x: x + torch.ones(CHANNELS, 1, 6),
    "full": lambda x: x + torch.full((CHANNELS, 1, 6), 2.0),
    "empty": lambda x: x + aten.fill(torch.empty(CHANNELS, 1, 6), 2.0),
    "new_zeros": lambda x: x + x.new_zeros(CHANNELS, 1, 6),
    "new_ones": lambda x: x + x.new_ones(CHANNELS, 1, 6),
    "new_full": lambda x: x + x.new_full((CHANNELS, 1, 6), 2.0),
    "new_empty": lambda x: x + aten.fill(x.new_empty((CHANNELS, 1, 6)), 2.0),
    "max_pool1d": _line(lambda x: F.max_pool1d(x, 3)),
    "max_pool1d_with_indices": _line(lambda x: aten.max_pool1d_with_indices(x, 3)[0]),
    "avg_pool1d": _line(lambda x: F.avg_pool1d(x, 3)),
    "adaptive_avg_pool1d": _line(lambda x: F.adaptive_avg_pool1d(x, 3)),
    "adaptive_max_pool1d": _line(lambda x: F.adaptive_max_pool1d(x, 3)),
    "upsample_linear1d": _line(lambda x: F.interpolate(x, size=50, mode="linear")),
    "upsample_nearest1d": _line(lambda x: F.interpolate(x, size=50)),
    "_upsample_nearest_exact1d": _line(lambda x: F.interpolate(x, size=50, mode="nearest-exact")),
    "reflection_pad1d": _line(lambda x: aten.reflection_pad1d(x, [1, 1])),
    "replication_pad1d": _line(lambda x: aten.replication_pad1d(x, [1, 1])),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0],
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "_adaptive_avg_pool2d": lambda x: aten._adaptive_avg_pool2d(x, [2, 2]),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "upsample_bilinear2d": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
    "upsample_nearest2d": lambda x: F.interpolate(x, size=(4, 4)),
    "upsample_bicubic2d": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic"),
    "_upsample_nearest_exact2d": lambda x: F.interpolate(x, size=(4, 4), mode="nearest-exact"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(
        x, size=(4, 4), mode="bilinear", antialias=True
    ),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(
        x, size=(4, 4), mode="bicubic", antialias=True
    ),
    "reflection_pad2d": lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1]),
    "replication_pad2d": lambda x: aten.replication_pad2d(x, [1, 1, 1, 1]),
    "max_pool3d": _volume(lambda x: F.max_pool3d(x, 2)),
    "max_pool3d_with_indices": _volume(lambda x: aten.max_pool3d_with_indices(x, [2, 2, 2])[0]),
    "avg_pool3d": _volume(lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool3d": _volume(lambda x: F.adaptive_avg_pool3d(x, 2)),
    "_adaptive_avg_pool3d": _volume(lambda x: aten._adaptive_avg_pool3d(x, [2, 2, 2])),
    "adaptive_max_pool3d": _volume(lambda x: F.adaptive_max_pool3d(x, 2)),
    "upsample_trilinear3d": _volume(lambda x: F.interpolate(x, size=(4, 4, 4), mode="trilinear")),
    "upsample_nearest3d": _volume(lambda x: F.interpolate(x, size=(4, 4, 4))),
    "_upsample_nearest_exact3d": _volume(
        lambda x: F.interpolate(x, size=(4, 4, 4), mode="nearest-exact")
    ),
    "reflection_pad3d": _volume(lambda x: aten.reflection_pad3d(x, [1] * 6)),
    "replication_pad3d": _volume(lambda x: aten.replication_pad3d(x, [1] * 6)),
    "glu": lambda x: F.glu(x, 1),
    "reshape": lambda x: x.reshape(len(x), CHANNELS, 36),
    "view": lambda x: x.view(len(x), CHANNELS, 36),
    "_unsafe_view": lambda x: aten._unsafe_view(x, [len(x), CHANNELS, 36]),
    "flatten": lambda x: x.flatten(2),
    "ravel": lambda x: torch.ravel(x).view(len(x), CHANNELS, 36),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "view_as": lambda x: x.flatten(2).view_as(x),
    "unflatten": lambda x: x.unflatten(1, (3, 4)).flatten(1, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2),
    "transpose": lambda x: x.transpose(2, 3),
    "swapaxes": lambda x: x.swapaxes(2, 3),
    "t": lambda x: x.mean((2, 3)).t().transpose(0, 1),
    "numpy_T": lambda x: aten.numpy_T(x.mean((2, 3))).transpose(0, 1),
    "movedim": lambda x: x.movedim(2, 3),
    "squeeze": lambda x: x.mean(2, **_KEEP).squeeze(2),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "expand": lambda x: x.mean(2, **_KEEP).expand(len(x), CHANNELS, 6, 6),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "constant_pad_nd": lambda x: aten.constant_pad_nd(x, [0, 0, 0, 0, 1, 2]),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 3),
    "native_channel_shuffle": lambda x: aten.native_channel_shuffle(x, 3),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "slice": lambda x: x[:, 1:9],
    "narrow": lambda x: x.narrow(1, 1, 8),
    "select": lambda x: x.select(1, 11).unsqueeze(1),
    "index_select": lambda x: x.index_select(2, _places()),
    "index": lambda x: x[:, :, _places()],
    "split": lambda x: x.split(5, 1)[1],
    "split_with_sizes": lambda x: x.split([5, 7], 1)[1],
    "unsafe_split": lambda x: aten.unsafe_split(x, 5, 1)[1],
    "chunk": lambda x: x.chunk(3, 1)[1],
    "tensor_split": lambda x: x.tensor_split([5], 1)[1],
    "unbind": lambda x: x.unbind(2)[1],
    "cat": lambda x: torch.cat([x, x * 2], 1),
    "concat": lambda x: aten.concat([x, x * 2], 1),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "im2col": lambda x: F.unfold(x, 3),
    "col2im": lambda x: F.fold(x.repeat_interleave(4, 1).flatten(2), (7, 7), 2),
    "unfold": lambda x: x.unfold(2, 3, 1),
    "gather": lambda x: x.gather(2, (x > 0).long()),
    "grid_sampler": lambda x: F.grid_sample(x, _grid(x, 2), align_corners=False),
    "grid_sampler_2d": lambda x: aten.grid_sampler_2d(x, _grid(x, 2), 0, 0, False),  # noqa: FBT003
    "grid_sampler_3d": _volume(
        lambda x: aten.grid_sampler_3d(x, _grid(x, 3), 0, 0, False)  # noqa: FBT003
    ),
    "add": lambda x: x + x.flip(2),
    "mul": lambda x: x * x.flip(2),
    "relu": F.relu,
}
"""Operator name to a function of [batch, 12, 6, 6] that calls it."""

LAYERS: dict[str, Recipe] = {
    **{
        f"aten::{operator}": single(kind, name)
        for kind, operators in {
            "images": {
                "conv2d": "conv", "convolution": "convolution", "conv_transpose2d": "transposed",
                "matmul": "linear-matmul", "mm": "linear-mm", "bmm": "linear-bmm",
                "mv": "linear-mv", "dot": "linear-dot", "vdot": "linear-vdot",
                "addmm": "linear-addmm", "baddbmm": "linear-baddbmm", "einsum": "linear-einsum",
                "outer": "linear-outer", "ger": "linear-ger", "batch_norm": "batch-norm",
                "instance_norm": "instance-norm-running", "native_layer_norm": "native-norm",
                "_native_batch_norm_legit_no_training": "running-norm",
                "group_norm": "group-norm", "prelu": "prelu",
            },
            "tokens": {
                "linear": "linear", "scaled_dot_product_attention": "attention-split",
                "layer_norm": "layer-norm", "rms_norm": "rms-norm", "bilinear": "bilinear",
            },
            "lines": {
                "conv1d": "conv", "conv_transpose1d": "transposed", "lstm": "lstm", "gru": "gru",
                "rnn_tanh": "rnn", "rnn_relu": "rnn-relu", "lstm_cell": "lstm-cell",
                "gru_cell": "gru-cell", "rnn_tanh_cell": "rnn-cell",
                "rnn_relu_cell": "rnn-relu-cell",
            },
            "volumes": {"conv3d": "conv", "conv_transpose3d": "transposed"},
        }.items()
        for operator, name in operators.items()
    },
    "aten::embedding": Recipe(kind="tokens", layers=("linear",), entry="ids", ending="places"),
    "transformers::grouped_mm_fallback": single("tokens", "grouped-experts"),
    "pruna::fake_quant": single("images", "fake-quantised"),
}  # fmt: skip
"""Operator name to a recipe whose layer calls it."""


RESIZED: dict[str, Recipe] = {
    "aten::conv1d": single("lines", "depthwise"),
    "aten::conv2d": single("images", "depthwise"),
    "aten::conv3d": single("volumes", "depthwise"),
    "aten::conv_transpose1d": single("lines", "transposed-depthwise"),
    "aten::conv_transpose2d": single("images", "transposed-depthwise"),
    "aten::conv_transpose3d": single("volumes", "transposed-depthwise"),
    "aten::convolution": single("images", "convolution-depthwise"),
    "aten::group_norm": single("images", "group-norm-each"),
    "aten::scaled_dot_product_attention": single("tokens", "single-head"),
}
"""Operators whose literal arguments change in other networks than those of ``LAYERS``."""


def network_of(name: str) -> Network | Chain:
    """The network that hangs on the rule of this operator.

    Raises:
        KeyError: the rule has none yet: add a line to ``FUNCTIONS`` or ``LAYERS``.
    """
    if name in LAYERS:
        return Network(LAYERS[name])
    return Chain(FUNCTIONS[name.removeprefix("aten::")])

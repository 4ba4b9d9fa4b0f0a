"""Small networks for backend tests: float32, or quantised at every convolution and linear."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.kernels.fake_quant import fake_quant
from pruna_ir.program import Program

F = nn.functional


class Quantized(nn.Module):
    """A convolution or linear with a quantised input (int8, zero point 0) and weight."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, scale: float = 0.03) -> None:
        super().__init__()
        self.layer = layer
        rest = list(range(1, layer.weight.dim()))
        steps = layer.weight.detach().abs().amax(rest) / 127
        self.register_buffer("weight_scale", steps)
        self.register_buffer("weight_zero", torch.zeros(len(steps), dtype=torch.int32))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        x = fake_quant(x, self.scale, self.zero, None, -128, 127)
        weight = fake_quant(layer.weight, self.weight_scale, self.weight_zero, 0, -127, 127)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(
            x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )


def quantize(module: nn.Module) -> nn.Module:
    """The module with a `Quantized` in place of every convolution and linear."""
    for name, child in list(module.named_children()):
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            setattr(module, name, Quantized(child))
        else:
            quantize(child)
    return module


class SmallCnn(nn.Module):
    """Odd sizes, a grouped and a depthwise convolution, batch norm, three activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 9, 3, padding=1),
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(9, 18, 3, stride=2, groups=3, bias=False),
            nn.Hardswish(),
            nn.Conv2d(18, 18, 3, padding=1, groups=18),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Block(nn.Module):
    """A transformer block of width 24: four heads, causal attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down = nn.Linear(24, 50), nn.Linear(50, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_1(x)).reshape(batch, length, 3, 4, 6).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, 24))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {SmallCnn: (3, 17, 15), Block: (7, 24)}


def program(kind: type[nn.Module], *, int8: bool = False, seed: int = 0) -> Program:
    """A captured network with random weights, its batch dynamic."""
    torch.manual_seed(seed)
    model = kind().eval()
    return capture(quantize(model) if int8 else model, (torch.randn(2, *SHAPES[kind]),))


def inputs(kind: type[nn.Module], batch: int) -> torch.Tensor:
    """Seeded input of this batch size."""
    return torch.randn(batch, *SHAPES[kind], generator=torch.Generator().manual_seed(batch))

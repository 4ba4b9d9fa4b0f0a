"""Residual blocks: what is one, why one cannot go, and which make a layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.residual_blocks import Residuals, feature_dim
from pruna_ir.program import Program
from pruna_ir.transform import apply

IMAGE = (2, 3, 32, 32)


def canonical(module: nn.Module, *inputs: torch.Tensor) -> Program:
    return apply(Canonicalize(), capture(module.eval(), inputs)).program


def residuals(module: nn.Module, *inputs: torch.Tensor) -> Residuals:
    return Residuals(canonical(module, *inputs))


class Sum(nn.Module):
    """A small network of one residual sum, spelt by a function of x and the layers."""

    def __init__(self, forward: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.function = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.function(self, self.b(x))
        return self.b(y)


def reasons(forward: Callable[..., torch.Tensor]) -> list[str]:
    return [block.reason for block in residuals(Sum(forward), torch.randn(3, 6)).blocks]


def read_inside(m: Sum, x: torch.Tensor) -> torch.Tensor:
    h = m.a(x)
    return (x + h.relu()) * h


def nested(m: Sum, x: torch.Tensor) -> torch.Tensor:
    h = x.relu()
    return x + m.a(h + m.b(h))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: x + m.a(x), [""]),
        (lambda m, x: m.a(x).relu() + x, [""]),
        (lambda m, x: torch.add(x, m.a(x), alpha=0.5), [""]),
        # The scaled operand is the stream: x itself does not pass.
        (lambda m, x: torch.add(m.a(x), x, alpha=0.5), []),
        (lambda m, x: x + m.scale * m.a(torch.tanh(x)), [""]),
        (lambda m, x: torch.relu(x + m.a(x)) + 1.0, [""]),
        # Parallel branches are blocks of one stream each.
        (lambda m, x: (x + m.a(x)) + m.b(x), ["", ""]),
        # No stored tensor takes part: an activation, not a block.
        (lambda _m, x: x + 0.04 * x.pow(3), []),
        (lambda _m, x: x + x, []),
        # Another shape is broadcast into x.
        (lambda m, x: x + m.a(x).mean(1, keepdim=True), []),
        (lambda m, x: m.a(x) + m.b(x), []),
        (read_inside, ["linear_1, inside of its branch, is also read by mul"]),
        (nested, ["", "it holds the residual blocks add"]),
    ],
)
def test_what_is_a_residual_block(
    forward: Callable[..., torch.Tensor], expected: list[str]
) -> None:
    assert reasons(forward) == expected


def test_a_program_cannot_return_its_input() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.a(x)

    (block,) = residuals(Bare(), torch.randn(3, 6)).blocks
    assert block.reason == "without it, the program would return its input"


def test_values_beside_the_stream_may_enter_a_branch() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            table = self.b(other)
            for _ in range(2):
                x = x + self.a(x) * table
            return self.b(x)

    found = residuals(Cross(), torch.randn(3, 6), torch.randn(3, 6))
    assert [block.reason for block in found.blocks] == ["", ""]


def tv(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=5), torch.randn(IMAGE)

    return make


def swin() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5), torch.randn(IMAGE)


def convnext() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return ConvNeXt(stages, num_classes=5), torch.randn(IMAGE)


def timm_vit() -> tuple[nn.Module, torch.Tensor]:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)
    return model, torch.randn(IMAGE)


def tokens(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import transformers as t

        small = {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 20, "vocab_size": 30,
        }  # fmt: skip
        model = {
            "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8, use_cache=False,
                bos_token_id=0, eos_token_id=0)),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(
                **small, num_key_value_heads=2, use_cache=False)),
            "bert": lambda: t.BertModel(t.BertConfig(**small)),
            "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small, use_cache=False)),
            "t5": lambda: t.T5EncoderModel(t.T5Config(
                d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4, vocab_size=30)),
        }[name]()  # fmt: skip
        return model, torch.randint(0, 30, (2, 7))

    return make


# model, blocks, blocks with attention, blocks a layer, sums of two branches
MODELS = {
    "resnet18": (tv("resnet18"), 5, 0, [1] * 5, 3),
    "resnet50": (tv("resnet50"), 12, 0, [1] * 12, 4),
    "mobilenet_v2": (tv("mobilenet_v2"), 10, 0, [1] * 10, 0),
    "convnext": (convnext, 4, 0, [1] * 4, 0),
    "swin": (swin, 8, 4, [2] * 4, 0),
    "vit": (timm_vit, 6, 3, [2] * 3, 0),
    "gpt2": (tokens("gpt2"), 4, 2, [2, 2], 0),
    "llama": (tokens("llama"), 4, 2, [2, 2], 0),
    "bert": (tokens("bert"), 4, 2, [2, 2], 0),
    "neox": (tokens("neox"), 2, 2, [1, 1], 0),
    "t5": (tokens("t5"), 4, 2, [2, 2], 0),
}


@cache
def program_of(name: str) -> Program:
    torch.manual_seed(0)
    module, example = MODELS[name][0]()
    return canonical(module, example)


@pytest.mark.parametrize("name", MODELS)
def test_real_architectures(name: str) -> None:
    _, blocks, attentions, layers, sums = MODELS[name]
    found = Residuals(program_of(name))
    assert [block.reason for block in found.blocks] == [""] * blocks
    assert sum(block.attention for block in found.blocks) == attentions
    assert [len(layer) for layer in found.layers()] == layers
    assert len(found.near_misses) == sums


@pytest.mark.parametrize(("name", "dim"), [
    ("resnet18", 1), ("convnext", 1), ("swin", 3), ("vit", 2), ("llama", 2), ("bert", 2),
])  # fmt: skip
def test_features_lie_where_the_first_layer_reads_them(name: str, dim: int) -> None:
    found = Residuals(program_of(name))
    assert {feature_dim(block) for block in found.blocks} == {dim}

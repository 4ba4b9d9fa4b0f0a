"""Kinds of groups, by data flow: on real architectures and on attention in several spellings."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import couple
from pruna_ir.coupling.kinds import KINDS, TRANSFORMER, kinds_of
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.transform import apply


def kinds(module, inputs, named=None):
    """Name and number of units of every free group that a layer produces -> its kind."""
    program = apply(Canonicalize(), capture(module.eval(), inputs, named or {})).program
    coupling = couple(program)
    found = zip(coupling.groups, kinds_of(program, coupling), strict=True)
    return {
        (group.name, len(group.units)): kind
        for group, kind in found
        if group.reason is None and any(member.produced for member in group.members)
    }


def image(size=32):
    return (torch.randn(2, 3, size, size),)


def tokens():
    return {"input_ids": torch.randint(0, 50, (2, 9))}


def test_a_residual_network_has_convolution_channels_only():
    import torchvision

    found = kinds(torchvision.models.resnet18(), image())
    assert set(found.values()) == {"conv"}
    assert len(found) == 12


def test_a_vision_transformer_has_heads_hidden_neurons_and_one_width():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    assert kinds(model, image()) == {
        ("patch_embed.proj.weight[0]", 192): "width",
        ("blocks.0.attn.qkv.weight[0]", 3): "heads",
        ("blocks.0.mlp.fc1.weight[0]", 768): "ffn",
        ("blocks.1.attn.qkv.weight[0]", 3): "heads",
        ("blocks.1.mlp.fc1.weight[0]", 768): "ffn",
    }


def test_query_heads_that_share_a_key_head_and_a_gated_ffn():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    found = kinds(LlamaForCausalLM(config), (), tokens())
    assert found["model.embed_tokens.weight[1]", 48] == "width"
    assert found["model.layers.0.mlp.gate_proj.weight[0]", 80] == "ffn"
    attention = {k: v for k, v in found.items() if "self_attn" in k[0]}
    assert attention
    assert set(attention.values()) <= {"heads", "head-size"}


def test_gpt2_s_transposed_linear_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=48, n_layer=1, n_head=4, vocab_size=50, n_positions=16, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    found = kinds(GPT2LMHeadModel(config), (), tokens())
    assert Counter(found.values()) == {"width": 1, "heads": 1, "ffn": 1}
    assert found["transformer.h.0.mlp.c_fc.weight[1]", 192] == "ffn"


class Attention(nn.Module):
    """Tokens -> tokens; 3 heads of 4 between linear layers."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v = (nn.Linear(5, 12) for _ in range(3))
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        n, s, _ = x.shape
        q, k, v = (layer(x).view(n, s, 3, 4) for layer in (self.q, self.k, self.v))
        if self.spelling == "einsum":
            scores = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bjhd->bihd", scores, v)
            return self.out(y.reshape(n, s, 12))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.spelling == "matmul":
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, s, 12))


@pytest.mark.parametrize("spelling", ["fused", "matmul", "einsum"])
def test_heads_in_every_spelling(spelling):
    torch.manual_seed(0)
    found = kinds(Attention(spelling), (torch.randn(2, 7, 5),))
    assert "heads" in found.values()
    assert set(found.values()) <= {"heads", "head-size"}


def test_attention_without_heads_has_a_head_size():
    class SingleHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            y = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return self.out(y)

    found = kinds(SingleHead(), (torch.randn(2, 7, 5),))
    assert found == {("q.weight[0]", 6): "head-size", ("v.weight[0]", 4): "head-size"}


def test_layers_of_different_inputs_make_a_width_and_layers_of_one_input_do_not():
    class Gated(nn.Module):
        def __init__(self, residual):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 6)
            self.out = nn.Linear(6, 2)
            self.residual = residual

        def forward(self, x):
            y = self.a(x).sigmoid() * self.b(x)
            return self.out(y + self.c(y) if self.residual else y)

    assert set(kinds(Gated(False), (torch.randn(2, 4),)).values()) == {"ffn"}  # noqa: FBT003
    assert set(kinds(Gated(True), (torch.randn(2, 4),)).values()) == {"width"}  # noqa: FBT003


def test_convolutions_with_weights_computed_in_the_graph():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, w, self.bias)

    module = nn.Sequential(Standardised(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert kinds(module, image(4)) == {("0.weight[0]", 6): "conv"}


def test_the_names_of_kinds():
    assert set(TRANSFORMER) < set(KINDS)
    assert set(KINDS) - set(TRANSFORMER) == {"conv", "other"}

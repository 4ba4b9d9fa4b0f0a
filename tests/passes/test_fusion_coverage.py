"""The fusions of transformer blocks on families of transformers and timm: fused, or a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_attention import FuseAttention
from pruna_ir.passes.fuse_attention_blocks import FuseAttentionBlocks
from pruna_ir.passes.fuse_ffn import FuseFfn
from pruna_ir.program import Program
from pruna_ir.transform import apply
from tests.passes.corpus import targets

_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_TEXT = _SIZES | {"max_position_embeddings": 16}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "use_cache": False}
_IMAGE = _SIZES | {"image_size": 32, "patch_size": 8}


def _hf(kind: str, model: str = "Model", **options) -> nn.Module:
    import transformers

    text = {} if "image_size" in options else {"vocab_size": 99}
    config = getattr(transformers, f"{kind}Config")(**text, **options)
    return getattr(transformers, f"{kind}{model}")(config)


def _whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=8,
        max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.WhisperModel(config).get_encoder()

        def forward(self, x):
            return self.encoder(x).last_hidden_state

    return Encoder()


def _timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, **{"depth": 2} | options)


_SMALL = {"embed_dim": 32, "num_heads": 4}

_FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "roberta": (lambda: _hf("Roberta", **_TEXT, pad_token_id=1), (2, 7), 2, 2),
    "opt": (
        lambda: _hf(
            "OPT", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=16, use_cache=False,
        ),
        (2, 7), 2, 2,
    ),
    "qwen2": (lambda: _hf("Qwen2", **_GROUPED), (2, 7), 2, 2),
    "mistral": (lambda: _hf("Mistral", **_GROUPED), (2, 7), 2, 2),
    "phi3": (lambda: _hf("Phi3", **_GROUPED, pad_token_id=0), (2, 7), 2, 2),
    "modernbert": (lambda: _hf("ModernBert", **_TEXT, pad_token_id=0), (2, 7), 2, 2),
    "t5": (
        lambda: _hf(
            "T5", "EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", use_cache=False,
        ),
        (2, 7), 2, 2,
    ),
    "clip": (lambda: _hf("CLIPVision", **_IMAGE), (2, 3, 32, 32), 2, 2),
    "hf vit": (lambda: _hf("ViT", **_IMAGE), (2, 3, 32, 32), 2, 2),
    "dinov2, swiglu": (
        lambda: _hf("Dinov2", **_IMAGE, use_swiglu_ffn=True), (2, 3, 32, 32), 2, 2
    ),
    "whisper": (_whisper, (2, 8, 40), 2, 2),
    "deit": (lambda: _timm("deit_tiny_patch16_224", img_size=32), (2, 3, 32, 32), 2, 2),
    "beit": (lambda: _timm("beit_base_patch16_224", img_size=32, **_SMALL), (2, 3, 32, 32), 2, 2),
    "eva02, packed gates": (
        lambda: _timm("eva02_tiny_patch14_224", img_size=28), (2, 3, 28, 28), 2, 2
    ),
    "siglip": (
        lambda: _timm("vit_base_patch16_siglip_224", img_size=32, **_SMALL), (2, 3, 32, 32), 3, 3
    ),
}  # fmt: skip
"""Model, shape of its input, feed-forward blocks, attentions."""
_ROTATED = ("qwen2", "mistral", "phi3", "modernbert", "eva02, packed gates")
"""The families with a rotary embedding behind every projection of queries and keys."""


def _program(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(shape) if len(shape) > 2 else torch.randint(3, 99, shape)
    return apply(Canonicalize(), capture(model, (x,))).program


def _missed(*passes, program: Program) -> tuple[Program, list[str]]:
    reasons = []
    for pass_ in passes:
        result = apply(pass_, program)
        program = result.program
        reasons += [r.message for r in result.remarks if r.kind == "missed"]
    return program, reasons


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_block_is_fused(family):
    make, shape, blocks, attentions = _FAMILIES[family]
    program, reasons = _missed(FuseFfn(), FuseAttention(), program=_program(make, shape))
    found = targets(program)
    assert not reasons
    assert found.count("pruna.ffn") == blocks
    assert found.count("pruna.attention") == attentions
    assert not {"aten.softmax.int", "aten.scaled_dot_product_attention"} & set(found)
    program, reasons = _missed(FuseAttentionBlocks(), program=program)
    assert targets(program).count("pruna.attention_block") == attentions - len(reasons)
    expected = "its queries are projected from expand" if family == "siglip" else "a rotary embed"
    assert len(reasons) == (attentions if family in _ROTATED else family == "siglip")
    assert all(reason.startswith(expected) for reason in reasons)


@pytest.mark.parametrize("family", ["phi3", "clip", "whisper"])
def test_the_fused_model_is_the_same_function(family):
    make, shape, *_ = _FAMILIES[family]
    program = _program(make, shape)
    for pass_ in (FuseFfn(), FuseAttention(), FuseAttentionBlocks()):
        result = apply(pass_, program)
        assert check(pass_, program, result.program, exact=result.exact).passed
        program = result.program


_REASONS = {
    "eva02, a norm between": (
        lambda: _timm("eva02_base_patch14_224", img_size=28, depth=1, **_SMALL), (2, 3, 28, 28),
        ["what silu, mul_4, layer_norm_2 computes between two layers is no activation that ffn "
         "has"],
    ),
    "cait, heads that talk": (
        lambda: _timm("cait_xxs24_224", img_size=32, depth=1), (2, 3, 32, 32),
        ["its scores are computed by permute_2, not by a product"],
    ),
    "xcit, a learned scale": (
        lambda: _timm("xcit_nano_12_p16_224", depth=1), (2, 3, 32, 32),
        ["its scores are computed by mul_"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _REASONS)
def test_every_other_block_has_a_reason(case):
    make, shape, expected = _REASONS[case]
    _, reasons = _missed(FuseFfn(), FuseAttention(), program=_program(make, shape))
    assert len(reasons) == len(expected)
    assert all(map(str.startswith, reasons, expected))

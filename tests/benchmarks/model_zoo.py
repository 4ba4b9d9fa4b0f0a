"""The models of the coverage benchmark: how each is built, and on which inputs it is captured.

torchvision and timm models are built with random weights at their own width and depth, on small
images where the architecture takes them; transformers families by small configs. Parameters that
an initialiser leaves constant (zero heads, layer scales of 1e-6, unit norms) are drawn at random:
otherwise large parts of a network would not reach its outputs, and no check could see them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

Model = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_SMALLEST = """
    aimv2_large_patch14_224 bat_resnext26ts beit_base_patch16_224 beitv2_base_patch16_224
    botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224
    coatnext_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_zepto_rms
    convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspdarknet53
    cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny deepseek_vit_412m
    deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dm_nfnet_f0 dpn48b
    eca_resnext26ts ecaresnet26t ecaresnetlight ecaresnext26t_32x4d edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientnetv2_rw_t
    efficientvim_m1 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224
    fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b flexivit_small focalnet_tiny_srf
    gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gcvit_xxtiny gemma4_vit_167m gernet_s
    ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halo2botnet50ts_256 halonet_h1
    haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small
    hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t lamhalobotnet50ts_256
    lcnet_035 lcnetv2_small legacy_seresnet18 levit_128s lowformer_b0 mambaout_femto
    maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s16_224 mixnet_s
    mnasnet_small mobilenet_edgetpu_100 mobilenetv3_small_050 mobileone_s1 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
    nextvit_small nf_regnet_b0 nfnet_l0 pit_ti_224 pnasnet5large poolformer_s12
    poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002
    regnetz_005 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resmlp_12_224 resnest14d
    resnet10t resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts rexnet_100
    rexnetr_100 sam2_hiera_tiny samvit_base_patch16_224 sebotnet33ts_256 sedarknet21
    sehalonet33ts selecsls42 semnasnet_050 senet154 sequencer2d_s seresnet18 seresnetaa50d
    seresnext26ts seresnextaa101d_32x8d shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    test_convnext tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
    vit_tiny_patch16_dinov3_qkvb vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2
    xception41p xcit_nano_12_p8_224
"""

TIMM = tuple(_SMALLEST.split())
"""The smallest model of every timm 1.0 family (models whose names begin alike)."""

IMAGE_SIZES = (96, 128, 160, 224, 256, 299, 384)
"""Square image sizes (pixels), tried in this order until the model runs."""


def build(kind: str, name: str) -> Model:
    """A model in eval mode with inputs of batch 2: (module, args, kwargs)."""
    torch.manual_seed(0)
    if kind == "hf":
        return _transformer(name)
    module = _torchvision(name) if kind == "torchvision" else _timm(name)
    module.eval()
    enliven(module)
    return module, _images(module, kind, name), {}


def enliven(module: nn.Module) -> None:
    """Draw constant parameters and batch-norm statistics at random, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                _draw(name, tensor, generator)
        for name, tensor in module.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    if name.endswith("bias") or (tensor.dim() > 1 and not tensor.any()):
        tensor.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
    else:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


# -- torchvision and timm ------------------------------------------------------------------


def _torchvision(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if "deeplab" in name or "fcn" in name or "lraspp" in name:
        options["weights_backbone"] = None
    module: nn.Module = torchvision.models.get_model(name, **options)
    if name == "mvit_v2_s":
        # Takes clips of the size that it is told; its tables of positions are interpolated.
        module.pos_encoding.temporal_size, module.pos_encoding.spatial_size = 4, (16, 16)
    return module


def _timm(name: str) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(name)
    return module


def _images(module: nn.Module, kind: str, name: str) -> tuple[torch.Tensor, ...]:
    """Inputs that the module runs on: images, image pairs or clips."""
    if kind == "torchvision" and name.startswith("raft"):
        return tuple(torch.rand(2, 3, 128, 128) * 2 - 1 for _ in range(2))
    fixed = _fixed_size(module, kind, name)
    if fixed is not None:
        return (torch.randn(2, *fixed),)
    if kind == "torchvision" and name in _videos():
        return _first_that_runs(module, ((2, 3, t, s, s) for t, s in _CLIPS))
    return _first_that_runs(module, ((2, 3, size, size) for size in IMAGE_SIZES))


_CLIPS = ((8, 64), (16, 112), (16, 224))
"""Frames and pixels of the clips tried."""


def _videos() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(torchvision.models.video))


def _fixed_size(module: nn.Module, kind: str, name: str) -> tuple[int, ...] | None:
    if kind == "torchvision":
        return (3, 224, 224) if name.startswith(("vit_", "maxvit")) else None
    settings = getattr(module, "default_cfg", {})
    return tuple(settings["input_size"]) if settings.get("fixed_input_size") else None


def _first_that_runs(
    module: nn.Module, shapes: Iterable[tuple[int, ...]]
) -> tuple[torch.Tensor, ...]:
    last: Exception | None = None
    for shape in shapes:
        x = torch.randn(shape)
        try:
            with torch.no_grad():
                module(x)
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
            last = error
            continue
        return (x,)
    raise RuntimeError(f"runs on none of the input shapes; the last one: {last}")


# -- transformers ----------------------------------------------------------------------------

_TEXT = {"input_ids": (2, 24)}
_IMAGE = {"pixel_values": (2, 3, 64, 64)}
_SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160,
    "vocab_size": 211,
}  # fmt: skip
_GQA = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
_VIT = {**_SMALL, "image_size": 64, "patch_size": 16}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bert": ("BertModel", _SMALL, _TEXT),
    "bert-mlm": ("BertForMaskedLM", _SMALL, _TEXT),
    "bert-classifier": ("BertForSequenceClassification", _SMALL, _TEXT),
    "roberta": ("RobertaForMaskedLM", _SMALL, _TEXT),
    "distilbert": (
        "DistilBertForMaskedLM", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 160,
        "vocab_size": 211}, _TEXT,
    ),
    "electra": ("ElectraForPreTraining", {**_SMALL, "embedding_size": 32}, _TEXT),
    "albert": ("AlbertForMaskedLM", {**_SMALL, "embedding_size": 32}, _TEXT),
    "gpt2": (
        "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 211}, _TEXT,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", _SMALL, _TEXT),
    "opt": (
        "OPTForCausalLM", {**_SMALL, "ffn_dim": 160, "word_embed_proj_dim": 64}, _TEXT,
    ),
    "llama": ("LlamaForCausalLM", _GQA, _TEXT),
    "llama-tied": ("LlamaForCausalLM", {**_GQA, "tie_word_embeddings": True}, _TEXT),
    "mistral": ("MistralForCausalLM", {**_GQA, "head_dim": 16}, _TEXT),
    "qwen2": ("Qwen2ForCausalLM", _GQA, _TEXT),
    "qwen3": ("Qwen3ForCausalLM", {**_GQA, "head_dim": 16}, _TEXT),
    "gemma": ("GemmaForCausalLM", {**_GQA, "head_dim": 16}, _TEXT),
    "gemma2": ("Gemma2ForCausalLM", {**_GQA, "head_dim": 16}, _TEXT),
    "phi3": ("Phi3ForCausalLM", _GQA, _TEXT),
    "vit": ("ViTForImageClassification", _VIT, _IMAGE),
    "deit": ("DeiTForImageClassification", _VIT, _IMAGE),
    "dinov2": ("Dinov2ForImageClassification", _VIT, _IMAGE),
    "dinov2-features": ("Dinov2Model", _VIT, _IMAGE),
    "beit": ("BeitForImageClassification", _VIT, _IMAGE),
    "swin": (
        "SwinForImageClassification", {"image_size": 64, "patch_size": 4, "embed_dim": 24,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, _IMAGE,
    ),
    "swinv2": (
        "Swinv2ForImageClassification", {"image_size": 64, "patch_size": 4, "embed_dim": 24,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, _IMAGE,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", {"hidden_sizes": [16, 32, 40, 64],
        "decoder_hidden_size": 64}, _IMAGE,
    ),
    "clip-vision": ("CLIPVisionModelWithProjection", {**_VIT, "projection_dim": 32}, _IMAGE),
    "clip-text": (
        "CLIPTextModelWithProjection", {**_SMALL, "projection_dim": 32, "eos_token_id": 2}, _TEXT,
    ),
    "whisper-encoder": (
        "WhisperEncoder", {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 160, "num_mel_bins": 16, "max_source_positions": 48},
        {"input_features": (2, 16, 96)},
    ),
    "t5-encoder": ("T5EncoderModel", {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2,
        "num_heads": 4, "vocab_size": 211}, _TEXT),
    "t5": (
        "T5ForConditionalGeneration", {"d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2,
        "num_heads": 4, "vocab_size": 211},
        {"input_ids": (2, 24), "decoder_input_ids": (2, 12)},
    ),
}  # fmt: skip
"""Name to (model class, changes to its default config, input shapes)."""


def _transformer(name: str) -> Model:
    import transformers

    class_name, changes, inputs = TRANSFORMERS[name]
    home = transformers
    if class_name == "WhisperEncoder":
        from transformers.models.whisper import modeling_whisper as home
    cls = getattr(home, class_name)
    config = cls.config_class(**changes)
    config.use_cache = False
    module = cls(config).eval()
    enliven(module)
    tensors = {
        key: torch.randn(shape) if key.startswith(("pixel", "input_features"))
        else torch.randint(3, 200, shape)
        for key, shape in inputs.items()
    }  # fmt: skip
    return module, (), tensors

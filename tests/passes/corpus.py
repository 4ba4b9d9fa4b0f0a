"""Models that the tests of several passes run on: real architectures, small and seeded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Program
from pruna_ir.transform import apply


def _image(make: Callable[[], nn.Module], size: int = 32) -> Program:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return capture(model, (torch.randn(2, 3, size, size),))


def _text(make: Callable[[], nn.Module]) -> Program:
    torch.manual_seed(0)
    return capture(make(), (torch.randint(0, 99, (2, 7)),))


def _resnet() -> Program:
    from torchvision.models.resnet import BasicBlock, ResNet

    return _image(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))


def _mobilenet_v3() -> Program:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    settings = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),  # noqa: FBT003
        InvertedResidualConfig(16, 5, 32, 24, True, "HS", 2, 1, 1.0),  # noqa: FBT003
        InvertedResidualConfig(24, 3, 32, 24, False, "HS", 1, 1, 1.0),  # noqa: FBT003
    ]
    return _image(lambda: MobileNetV3(settings, last_channel=32, num_classes=5))


def _efficientnet() -> Program:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    settings = [MBConvConfig(1, 3, 1, 16, 8, 1, 1, 1), MBConvConfig(4, 5, 2, 8, 16, 2, 1, 1)]
    return _image(lambda: EfficientNet(settings, 0.2, num_classes=5, last_channel=32))


def _densenet() -> Program:
    import torchvision

    return _image(lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5))


def _vit() -> Program:
    import torchvision

    return _image(lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64))


def _swin() -> Program:
    import torchvision

    return _image(
        lambda: torchvision.models.SwinTransformer([2, 2], 16, [1, 2], [2, 2], [3, 3])
    )


def _timm_vit() -> Program:
    import timm

    options = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    make = timm.models.vision_transformer.VisionTransformer
    return _image(lambda: make(32, 8, **options))


def _gpt2() -> Program:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _text(lambda: transformers.GPT2LMHeadModel(config))


def _bert() -> Program:
    import transformers

    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return _text(lambda: transformers.BertModel(config))


def _llama() -> Program:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, use_cache=False, max_position_embeddings=16,
    )  # fmt: skip
    return _text(lambda: transformers.LlamaForCausalLM(config))


_MAKERS: dict[str, Callable[[], Program]] = {
    "resnet": _resnet,
    "mobilenet_v3": _mobilenet_v3,
    "efficientnet": _efficientnet,
    "densenet": _densenet,
    "vit": _vit,
    "swin": _swin,
    "timm_vit": _timm_vit,
    "gpt2": _gpt2,
    "bert": _bert,
    "llama": _llama,
}

NAMES = tuple(_MAKERS)


@cache
def captured(name: str) -> Program:
    """The program as it comes from capture."""
    return _MAKERS[name]()


@cache
def canonical(name: str) -> Program:
    """The program in canonical form."""
    return apply(Canonicalize(), captured(name)).program


def targets(program: Program) -> list[str]:
    """The operators of a program, in order."""
    return [str(node.target).removesuffix(".default") for node in program.calls()]

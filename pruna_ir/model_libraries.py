"""Model libraries: torchvision, timm and transformers models by name, built locally.

Nothing is downloaded and no remote code is trusted; weights are random unless they lie beside a
transformers config. Example inputs have the size that the library states for the model.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruna_ir.errors import CaptureError, ToolchainError, UsageError
from pruna_ir.factories import Model, near, users_code
from pruna_ir.spec import PassSpec, Value, parse_pipeline
from pruna_ir.weights import load_weights, put_weights

BATCH_SIZE = 2
"""Of example inputs: ``torch.export`` would take a batch of 1 for a constant."""
SEQUENCE = 64
FRAMES = 16


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ToolchainError(
            f"{package} is needed for this model and cannot be imported ({error}); "
            "pip install 'pruna-ir[models]'"
        ) from error


def _torchvision(name: str) -> Model:
    models = _import("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise CaptureError(f"torchvision has no model '{name}'{near(name, known)}")
    # Without this the two Inception models warn of a change of their default.
    extra: dict[str, Any] = (
        {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # By default it would be downloaded.
        extra["weights_backbone"] = None
    module = users_code(
        lambda: models.get_model(name, weights=None, **extra), f"torchvision:{name} failed"
    )
    transform = models.get_model_weights(name).DEFAULT.transforms()
    sizes = getattr(transform, "crop_size", None) or getattr(transform, "resize_size", None)
    if sizes is None:
        return Model(module)
    height, width = (list(sizes) * 2)[:2]
    video = type(transform).__name__ == "VideoClassification"
    shape = (BATCH_SIZE, 3, *((FRAMES,) if video else ()), height, width)
    return Model(module, (torch.randn(shape),))


def _timm(name: str) -> Model:
    timm = _import("timm")
    if not timm.is_model(name):
        raise CaptureError(f"timm has no model '{name}'{near(name, timm.list_models())}")
    module = users_code(lambda: timm.create_model(name, pretrained=False), f"timm:{name} failed")
    size = tuple(module.pretrained_cfg["input_size"])
    return Model(module, (torch.randn(BATCH_SIZE, *size),))


def _transformers(text: str) -> Model:
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    path = Path(text)
    # A folder that merely bears an architecture's name, such as an output folder, is none.
    local = path.exists() and (
        text not in transformers.CONFIG_MAPPING or (path / "config.json").is_file()
    )
    config = _config_file(transformers, path) if local else _config(transformers, text)
    _set(config, "use_cache", value=False)
    module = _build(transformers, config)
    if local and path.is_dir():
        _weights_beside(module, path)
    args, kwargs = _token_inputs(module, config)
    return Model(module, args, kwargs)


def _config_file(transformers: Any, path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptureError(f"{file}: is not a readable config: {error}") from error
    kind = fields.pop("model_type", "") if isinstance(fields, dict) else ""
    if kind not in transformers.CONFIG_MAPPING:
        raise CaptureError(
            f"{file}: model_type {kind!r} is not known to transformers "
            f"{transformers.__version__}; code that a model brings along is never run"
        )
    # Where the architecture's own code lives elsewhere, it is not loaded.
    fields.pop("auto_map", None)
    return users_code(
        lambda: transformers.AutoConfig.for_model(kind, **fields), f"{file} is not a valid config"
    )


def _config(transformers: Any, text: str) -> Any:
    name, options = _options(text)
    if name not in transformers.CONFIG_MAPPING:
        hint = near(name, transformers.CONFIG_MAPPING)
        raise CaptureError(
            f"transformers has no architecture '{name}'{hint}; names of the model hub need a "
            "local folder: nothing is downloaded"
        )
    config = transformers.AutoConfig.for_model(name)
    for key, value in options:
        if not hasattr(config, key):
            fields = [n for n in vars(config) if not n.startswith("_")]
            raise CaptureError(f"the config of {name} has no field '{key}'{near(key, fields)}")
        _set(config, key, value=value)
    return config


def _options(text: str) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """``gpt2{n_layer=2}`` as a name and its options."""
    if "{" not in text:
        return text, ()
    items = parse_pipeline(text)
    if len(items) != 1 or not isinstance(items[0], PassSpec):
        raise UsageError(f"'{text}' is not of the form NAME{{field=value,...}}")
    return items[0].name, items[0].options


def _set(config: Any, name: str, *, value: Any) -> None:
    if hasattr(config, name):
        setattr(config, name, list(value) if isinstance(value, tuple) else value)


def _build(transformers: Any, config: Any) -> nn.Module:
    """The class that the config names, else a causal language model or the bare network."""
    named: list[Any] = [getattr(transformers, str(a), None) for a in config.architectures or ()]
    classes = [c for c in named if isinstance(c, type) and issubclass(c, nn.Module)]
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING

    def make(attention: str) -> Any:
        if classes:
            chosen: Any = classes[0]
            return chosen._from_config(config, attn_implementation=attention)
        auto = transformers.AutoModelForCausalLM if causal and not masked else (
            transformers.AutoModel
        )
        return auto.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )

    def build() -> Any:
        try:
            return make("sdpa")
        except ValueError as error:
            if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
                raise
            return make("eager")

    module: nn.Module = users_code(build, f"{type(config).__name__} cannot be built")
    return module


def _weights_beside(module: nn.Module, folder: Path) -> None:
    """Load ``*.safetensors`` or ``pytorch_model.bin`` of a model's folder; tensors only."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= load_weights(file)
    if files:
        put_weights(module, state, str(folder))


def _token_inputs(module: Any, config: Any) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """Example inputs of a transformers model, by the kind of its main input."""
    parameters = inspect.signature(module.forward).parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    text = config.get_text_config()
    main = module.main_input_name
    if main == "pixel_values" and getattr(config, "image_size", None):
        sizes = config.image_size
        height, width = sizes if isinstance(sizes, (list, tuple)) else (sizes, sizes)
        channels = getattr(config, "num_channels", 3)
        return (), {main: torch.randn(BATCH_SIZE, channels, height, width)} | extra
    vocabulary = getattr(text, "vocab_size", None)
    if main != "input_ids" or not vocabulary:
        return None, extra
    longest = getattr(text, "max_position_embeddings", None) or SEQUENCE
    ids = torch.randint(0, vocabulary, (BATCH_SIZE, min(SEQUENCE, longest)))
    inputs = {"input_ids": ids} | extra
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    return (), inputs


LIBRARIES: dict[str, Callable[[str], Model]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}
"""What builds a model, by the prefix of its name."""

"""Sources: from what a user types for a model to a Program.

    package.module:factory    a callable (or module) of an importable package
    path/to/file.py:factory   a callable (or module) of a Python file; naming the file runs it
    model.pt2                 a program that pruna-opt or torch.export saved; runs no code
    torchvision:NAME          a torchvision model, built locally
    timm:NAME                 a timm model, built locally
    hf:NAME{field=value}      a transformers architecture from its default config, with changes
    hf:FOLDER_OR_CONFIG.json  a transformers config, with the weights beside it if there are any

Nothing is downloaded, and no remote code is trusted. Without a weight file, weights are random
and seeded. A factory returns a module, ``(module, args)`` or ``(module, args, kwargs)``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError, ToolchainError, UsageError
from pruna_ir.program import Program
from pruna_ir.serialize import load_program
from pruna_ir.spec import PassSpec, Value, parse_pipeline
from pruna_ir.training import with_state
from pruna_ir.weights import load_weights, put_weights

BATCH_SIZE = 2
"""Of example inputs: ``torch.export`` would take a batch of 1 for a constant."""
SEQUENCE = 64
FRAMES = 16


@dataclass(frozen=True)
class Shape:
    """A shape asked for one input; dtype None keeps the one that the model's input has."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Request:
    """How a source is to be loaded.

    Attributes:
        weights: a weight file for the model.
        seed: of random weights and inputs.
        shapes: input name -> shape; the empty name stands for the only input.
        dynamic: input name -> {dimension: name}, beyond the batch.
        dynamic_batch: let the batch vary.
    """

    weights: Path | None = None
    seed: int = 0
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    dynamic_batch: bool = True


@dataclass(frozen=True)
class Model:
    """A module with example inputs; ``args`` None where the source gave none."""

    module: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_source(text: str, request: Request | None = None) -> Program:
    """The program of what a user typed.

    Raises:
        CaptureError: nothing of that name exists, it fails to build, or cannot be captured.
        UsageError: a shape or dynamic dimension names no input.
        ToolchainError: the package of the model's library is not installed.
    """
    request = request or Request()
    found = resolve(text, request)
    if isinstance(found, Program):
        return found
    args, kwargs = _inputs(text, found, request)
    return capture(
        found.module,
        args,
        kwargs,
        dynamic_batch=request.dynamic_batch,
        dynamic_dims=request.dynamic,
    )


def resolve(text: str, request: Request | None = None) -> Program | Model:
    """The program in a ``.pt2`` file, or the module of any other source, with its weights."""
    request = request or Request()
    kind, separator, rest = text.partition(":")
    if separator and kind in _LIBRARIES:
        with _seeded(request.seed):
            model = _LIBRARIES[kind](rest)
    elif text.endswith(".pt2"):
        return _saved(Path(text), request)
    elif separator and rest:
        with _seeded(request.seed):
            model = _factory(kind, rest)
    else:
        raise CaptureError(_unknown_source(text))
    if request.weights is not None:
        put_weights(model.module, load_weights(request.weights), str(request.weights))
    return model


def _unknown_source(text: str) -> str:
    path = Path(text)
    if path.suffix == ".py":
        return f"{text}: name the function that makes the model, as in {text}:make_model"
    if path.suffix in (".pt", ".pth", ".safetensors", ".bin"):
        return (
            f"{text} holds weights, not a model; give the model as the input and this file with "
            f"--weights {text}"
        )
    return (
        f"'{text}' is no model; give a .pt2 file, file.py:factory, package.module:factory, "
        "torchvision:NAME, timm:NAME or hf:NAME"
    )


@contextmanager
def _seeded(seed: int) -> Any:
    """Random numbers from a seed, the caller's generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _saved(path: Path, request: Request) -> Program:
    if request.shapes or request.dynamic:
        raise UsageError(
            f"{path}: the shapes of a saved program were fixed when it was exported; export it "
            "again with other example inputs or dynamic dimensions"
        )
    program = load_program(path)
    if request.weights is not None:
        return with_state(program, load_weights(request.weights))
    return program


# -- factories ----------------------------------------------------------------------------------


def _factory(place: str, name: str) -> Model:
    module = _python_file(Path(place)) if place.endswith(".py") else _package(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CaptureError(f"{place} has no '{name}'{_near(name, vars(module))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return Model(found)
    if not callable(found):
        raise CaptureError(f"{place}:{name} is a {type(found).__name__}, not a function")
    return _model(f"{place}:{name}", _users(found, f"{place}:{name} failed"))


def _model(origin: str, made: Any) -> Model:
    """What a factory returned as a model."""
    parts = made if isinstance(made, (tuple, list)) else (made,)
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise CaptureError(
            f"{origin} returned a {type(made).__name__}; return a module, (module, args) or "
            "(module, args, kwargs)"
        )
    args = parts[1] if len(parts) > 1 else None
    if isinstance(args, torch.Tensor):
        args = (args,)
    kwargs = parts[2] if len(parts) > 2 else {}
    if not isinstance(args, (tuple, list, type(None))) or not isinstance(kwargs, Mapping):
        raise CaptureError(
            f"{origin}: example inputs must be a tensor, a tuple of inputs, or a tuple and a dict "
            f"of keyword inputs, not {type(args).__name__} and {type(kwargs).__name__}"
        )
    return Model(parts[0], None if args is None else tuple(args), dict(kwargs))


def _python_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CaptureError(f"{path}: no such file")
    name = f"_pruna_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CaptureError(f"{path}: cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader

    def execute() -> ModuleType:
        loader.exec_module(module)
        return module

    # As for a script: what stands beside the file can be imported.
    with _search_path(path.resolve().parent):
        loaded: ModuleType = _users(execute, f"{path} failed")
    return loaded


def _package(name: str) -> ModuleType:
    with _search_path(Path.cwd()):
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError) as error:
            raise CaptureError(f"package {name} cannot be imported: {error}") from error
        if found is None:
            raise CaptureError(
                f"package {name} is not importable from here; install it, or give file.py:factory"
            )
        module: ModuleType = _users(
            lambda: importlib.import_module(name), f"importing {name} failed"
        )
    return module


@contextmanager
def _search_path(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _users(call: Callable[[], Any], what: str) -> Any:
    """Run the user's code; its failure names the user's own line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and not frame.filename.startswith("<frozen")
        ]
        own = [f for f in frames if "site-packages" not in f.filename] or frames
        if own:
            place = f"\n  {own[-1].filename}:{own[-1].lineno}\n      {own[-1].line or ''}"
        elif isinstance(error, SyntaxError):
            place = f"\n  {error.filename}:{error.lineno}"
        else:
            place = ""
        cause = (str(error).splitlines() or [""])[0]
        raise CaptureError(f"{what}: {type(error).__name__}: {cause}{place}") from error


# -- libraries ----------------------------------------------------------------------------------


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ToolchainError(
            f"{package} is needed for this model and cannot be imported ({error}); "
            "pip install 'pruna-ir[models]'"
        ) from error


def _near(name: str, names: Iterable[str]) -> str:
    known = [n for n in names if not n.startswith("_")]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def _torchvision(name: str) -> Model:
    models = _import("torchvision.models")
    known = models.list_models()
    if name not in known:
        raise CaptureError(f"torchvision has no model '{name}'{_near(name, known)}")
    # Without this the two Inception models warn of a change of their default.
    extra: dict[str, Any] = (
        {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # By default it would be downloaded.
        extra["weights_backbone"] = None
    module = _users(
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
        raise CaptureError(f"timm has no model '{name}'{_near(name, timm.list_models())}")
    module = _users(lambda: timm.create_model(name, pretrained=False), f"timm:{name} failed")
    size = tuple(module.pretrained_cfg["input_size"])
    return Model(module, (torch.randn(BATCH_SIZE, *size),))


def _transformers(text: str) -> Model:
    transformers = _import("transformers")
    transformers.logging.set_verbosity_error()
    path = Path(text)
    config = _config_file(transformers, path) if path.exists() else _config(transformers, text)
    _set(config, "use_cache", value=False)
    module = _build(transformers, config)
    if path.is_dir():
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
    return _users(
        lambda: transformers.AutoConfig.for_model(kind, **fields), f"{file} is not a valid config"
    )


def _config(transformers: Any, text: str) -> Any:
    name, options = _options(text)
    if name not in transformers.CONFIG_MAPPING:
        near = _near(name, transformers.CONFIG_MAPPING)
        raise CaptureError(
            f"transformers has no architecture '{name}'{near}; names of the model hub need a "
            "local folder: nothing is downloaded"
        )
    config = transformers.AutoConfig.for_model(name)
    for key, value in options:
        if not hasattr(config, key):
            fields = [n for n in vars(config) if not n.startswith("_")]
            raise CaptureError(f"the config of {name} has no field '{key}'{_near(key, fields)}")
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

    module: nn.Module = _users(build, f"{type(config).__name__} cannot be built")
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


_LIBRARIES: dict[str, Callable[[str], Model]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _transformers,
}


# -- example inputs -----------------------------------------------------------------------------

_SHAPE = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*|scalar)(?::(\w+))?")
_DYNAMIC = re.compile(r"([A-Za-z_]\w*):(\d+)=([A-Za-z_]\w*)")


def parse_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """``x=2x3x32x32``, ``ids=2x64:int64``, or without a name for the only input.

    Raises:
        UsageError: a text is malformed.

    >>> parse_shapes(["x=2x3"])
    {'x': Shape(sizes=(2, 3), dtype=None)}
    """
    found: dict[str, Shape] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text)
        dtype = getattr(torch, match[3], None) if match and match[3] else None
        if match is None or (match[3] and not isinstance(dtype, torch.dtype)):
            raise UsageError(
                f"'{text}' is not a shape; write name=2x3x224x224, or name=2x64:int64"
            )
        sizes = () if match[2] == "scalar" else tuple(map(int, match[2].split("x")))
        found[match[1] or ""] = Shape(sizes, dtype)
    return found


def parse_dynamic(texts: Sequence[str]) -> dict[str, dict[int, str]]:
    """``input_ids:1=sequence``: dimension 1 of that input may vary, under that name.

    Raises:
        UsageError: a text is malformed.

    >>> parse_dynamic(["ids:1=length"])
    {'ids': {1: 'length'}}
    """
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise UsageError(f"'{text}' is not a dynamic dimension; write name:axis=dimension")
        found.setdefault(match[1], {})[int(match[2])] = match[3]
    return found


def _inputs(
    text: str, model: Model, request: Request
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with the requested shapes in place."""
    names = [
        p.name
        for p in inspect.signature(model.module.forward).parameters.values()
        if p.kind is not inspect.Parameter.VAR_POSITIONAL
    ]
    shapes = dict(request.shapes)
    args, kwargs = list(model.args or ()), dict(model.kwargs)
    tensors = [n for n, v in [*zip(names, args, strict=False), *kwargs.items()]
               if isinstance(v, torch.Tensor)]  # fmt: skip
    if "" in shapes:
        shapes[_only(tensors or names[:1])] = shapes.pop("")
    generator = torch.Generator().manual_seed(request.seed)
    for name, shape in shapes.items():
        if name not in names:
            raise UsageError(f"{text} has no input '{name}'; its inputs are {', '.join(names)}")
        position = names.index(name)
        if position < len(args):
            args[position] = _example(args[position], shape, generator)
        else:
            kwargs[name] = _example(kwargs.get(name), shape, generator)
    if model.args is None and not shapes:
        raise CaptureError(
            f"{text} comes without example inputs; let the factory return (module, args), or give "
            f"--input-shape {names[0] if names else 'x'}=2x3x224x224"
        )
    return tuple(args), kwargs


def _only(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UsageError(
            f"the model has inputs {', '.join(names)}; write --input-shape {names[0]}=..."
        )
    return names[0]


def _example(old: Any, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Random values of a shape: normal ones, or integers in the range of the old example."""
    known = old.dtype if isinstance(old, torch.Tensor) else torch.float32
    dtype = shape.dtype or known
    if dtype.is_floating_point:
        return torch.randn(shape.sizes, generator=generator).to(dtype)
    integral = isinstance(old, torch.Tensor) and not old.is_floating_point() and old.numel()
    top = int(old.max()) + 1 if integral else 2
    return torch.randint(0, max(top, 1), shape.sizes, generator=generator).to(dtype)

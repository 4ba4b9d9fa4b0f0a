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

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError, UsageError
from pruna_ir.factories import Model, make_model
from pruna_ir.model_libraries import LIBRARIES
from pruna_ir.program import Program
from pruna_ir.serialize import load_program
from pruna_ir.training import with_state
from pruna_ir.weights import load_weights, put_weights


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
    if separator and kind in LIBRARIES:
        with _seeded(request.seed):
            model = LIBRARIES[kind](rest)
    elif text.endswith(".pt2"):
        return _saved(Path(text), request)
    elif separator and rest:
        with _seeded(request.seed):
            model = make_model(kind, rest)
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
def _seeded(seed: int) -> Iterator[None]:
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

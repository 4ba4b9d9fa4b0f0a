"""Factories: the user's own Python, imported and called by name.

Naming a file or package as a model's source is what allows its code to run. What it raises becomes
a `CaptureError` that shows the user's own line.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pruna_ir.errors import CaptureError


@dataclass(frozen=True)
class Model:
    """A module with example inputs; ``args`` None where the source gave none."""

    module: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def make_model(place: str, name: str) -> Model:
    """The model of ``place:name``, a Python file or package and what to call in it.

    Raises:
        CaptureError: it does not exist, fails, or returns no module.
    """
    module = _python_file(Path(place)) if place.endswith(".py") else _package(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CaptureError(f"{place} has no '{name}'{near(name, vars(module))}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return Model(found)
    if not callable(found):
        raise CaptureError(f"{place}:{name} is a {type(found).__name__}, not a function")
    return _model(f"{place}:{name}", users_code(found, f"{place}:{name} failed"))


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
        loaded: ModuleType = users_code(execute, f"{path} failed")
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
        module: ModuleType = users_code(
            lambda: importlib.import_module(name), f"importing {name} failed"
        )
    return module


@contextmanager
def _search_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def users_code(call: Callable[[], Any], what: str) -> Any:
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


def near(name: str, names: Iterable[str]) -> str:
    """The names nearest to an unknown one, as the end of a message."""
    known = [n for n in names if not n.startswith("_")]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""

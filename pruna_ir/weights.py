"""Weight files: a state dict from ``.safetensors`` or ``.pt``; tensors only, never code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pruna_ir.errors import CaptureError

_SHOWN = 5
# Keys under which training scripts keep the state dict inside a checkpoint.
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, on the CPU.

    A ``.safetensors`` file is read as such, everything else by ``torch.load`` with
    ``weights_only=True``. A checkpoint that holds its state dict under ``state_dict``, ``model``
    or ``model_state_dict`` is unwrapped.

    Raises:
        CaptureError: the file cannot be read, holds anything but tensors, or holds NaN.
    """
    path = Path(path)
    raw = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    state = _unwrapped(raw)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; save "
                "model.state_dict() alone"
            )
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise CaptureError(f"{path}: {name} holds NaN; the training run has diverged")
    return state


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CaptureError(f"{path}: is not a whole .safetensors file: {error}") from error


def _torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CaptureError(
            f"{path}: refused: it is a pickle that holds more than tensors, and loading it could "
            "run code; save model.state_dict(), or a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptureError(f"{path}: is not a whole weight file: {cause}") from error


def _unwrapped(raw: Any) -> dict[Any, Any]:
    if not isinstance(raw, Mapping):
        return {"the file's content": raw}
    for key in _WRAPPERS:
        if isinstance(raw.get(key), Mapping):
            return dict(raw[key])
    return dict(raw)


def put_weights(module: torch.nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict into a module; every name must match and every shape.

    A tied tensor needs only one of its names.

    Args:
        module: the model, changed in place where all names and shapes fit, else not at all.
        state: name -> tensor.
        origin: where the weights come from, for the error.

    Raises:
        CaptureError: names are missing or unexpected, or shapes differ; up to five are listed.
    """
    own = module.state_dict()
    # A data-parallel wrapper prefixes every name.
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    given = {own[name].data_ptr() for name in own if name in state}

    def needed(name: str) -> bool:
        # Files leave out the second name of a tied tensor, and old ones a counter of batches.
        tied = own[name].numel() > 0 and own[name].data_ptr() in given
        return not tied and not name.endswith("num_batches_tracked")

    shapes = [
        f"{name} is {list(state[name].shape)}, the model's {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        _listed("missing", (name for name in own if name not in state and needed(name))),
        _listed("unexpected", (name for name in state if name not in own)),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        raise CaptureError(
            f"{origin} does not fit {type(module).__name__}: {'; '.join(filter(None, problems))}"
        )
    module.load_state_dict(dict(state), strict=False)


def _listed(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}" if found else ""

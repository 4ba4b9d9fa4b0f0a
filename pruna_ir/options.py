"""From text to passes and backends: options are the fields of their classes, typed and checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from pruna_ir.errors import UsageError
from pruna_ir.lowering import Backend
from pruna_ir.registry import find_backend, find_pass, unknown
from pruna_ir.spec import FileValue, PassSpec, Value, parse_pipeline, print_value
from pruna_ir.transform import Pass


def make_pass(spec: PassSpec) -> Pass:
    """The pass that a spec describes.

    Raises:
        UsageError: the pass or an option is unknown, or a value has the wrong type.
    """
    made: Pass = _made(find_pass(spec.name), spec)
    return made


def make_backend(text: str) -> Backend:
    """The backend that a text such as ``tvm`` or ``tvm{cpu=x86-64-v3}`` names.

    Raises:
        UsageError: it is no such text, an option is unknown, or a value has the wrong type.

    >>> make_backend("onnx").name
    'onnx'
    """
    items = parse_pipeline(text)
    if len(items) != 1 or not isinstance(items[0], PassSpec):
        raise UsageError(f"'{text}' is no backend; give one name, such as tvm{{cpu=x86-64-v3}}")
    backend = find_backend(items[0].name)
    if not items[0].options:
        return backend
    if not dataclasses.is_dataclass(backend):
        raise UsageError(f"backend '{items[0].name}' takes no options")
    made: Backend = _made(type(backend), items[0])
    return made


def _made(cls: type[Any], spec: PassSpec) -> Any:
    """An instance of a frozen dataclass with the options of a spec."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in spec.options:
        if key not in fields:
            raise UsageError(f"{spec.name}: {unknown('option', key, fields)}")
        values[key] = _coerce(spec.name, key, hints[key], _resolve(value))
    required = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if required:
        raise UsageError(f"{spec.name} needs its option {required[0]}; see `explain {spec.name}`")
    return cls(**values)


def _resolve(value: Value) -> Value:
    if not isinstance(value, FileValue):
        return value
    try:
        loaded = json.loads(Path(value.path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"option file {value.path} cannot be read as JSON: {error}") from error
    return _from_json(loaded, value.path)


def _from_json(value: Any, path: str) -> Value:
    if isinstance(value, list):
        return tuple(_from_json(item, path) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"option file {path} must hold a value or a list of values, not an object")


def _coerce(owner: str, key: str, hint: Any, value: Value) -> Any:
    """The value as the field's type; ints pass as floats and a single value as a list of one."""
    converted = _convert(hint, value)
    if converted is _REFUSED:
        name = hint.__name__ if isinstance(hint, type) else str(hint)
        raise UsageError(f"{owner}: option {key} must be {name}, not {print_value(value)}")
    return converted


_REFUSED = object()


def _convert(hint: Any, value: Value) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        candidates = (_convert(option, value) for option in typing.get_args(hint))
        return next((c for c in candidates if c is not _REFUSED), _REFUSED)
    if origin is typing.Literal:
        return value if value in typing.get_args(hint) else _REFUSED
    if origin is tuple:
        element = typing.get_args(hint)[0]
        items = value if isinstance(value, tuple) else (value,)
        converted = tuple(_convert(element, item) for item in items)
        return _REFUSED if _REFUSED in converted else converted
    if hint is type(None):
        return None if value is None else _REFUSED
    if hint is float and type(value) in (int, float):
        return float(typing.cast("float", value))
    if hint is str and type(value) in (int, float):
        return print_value(value)
    return value if isinstance(hint, type) and type(value) is hint else _REFUSED

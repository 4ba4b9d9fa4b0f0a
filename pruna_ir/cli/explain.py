"""``pruna-opt explain``: the contract, effect and options of a pass; a backend; a preset."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from typing import Any

from pruna_ir import registry
from pruna_ir.cli.console import Console
from pruna_ir.cli.exit_codes import EXIT_CODES, exit_code_table
from pruna_ir.errors import UsageError
from pruna_ir.presets import PRESETS, preset
from pruna_ir.spec import print_value
from pruna_ir.transform import Effect, Pass

CODES = "exit-codes"

_PROMISES = {
    Effect.EXACT: "the same function, bit for bit; checked by running both",
    Effect.ROUNDING: (
        "the same function over the real numbers; checked by lifting both programs to float64"
    ),
    Effect.BOUNDED: "an approximation; checked against a budget of signal to noise",
    Effect.ORACLE: (
        "another function that the pass states exactly; checked against that statement in float64"
    ),
    Effect.FITTED: (
        "another function, fitted to the calibration data; checked by the tests that the pass "
        "states of it, on that data"
    ),
}


def execute(args: argparse.Namespace, out: Console) -> int:
    """Explain one name."""
    found = explanation(args.name)
    if out.as_json:
        out.json(found)
    else:
        out.data(found["text"])
    return 0


def explanation(name: str) -> dict[str, Any]:
    """What there is to say of a name: ``kind``, ``name``, ``text`` and facts by kind.

    Raises:
        UsageError: nothing has this name; the nearest is suggested.
        PluginError: what has it cannot be imported.
    """
    if name == CODES:
        codes = [{"code": code, "meaning": meaning} for code, meaning in EXIT_CODES]
        return {"kind": CODES, "name": CODES, "text": exit_code_table(), "codes": codes}
    names = {kind: [e.name for e in registry.entries(kind)]
             for kind in (registry.PASSES, registry.BACKENDS)}  # fmt: skip
    if name in names[registry.PASSES]:
        return _pass(registry.find_pass(name))
    if name in names[registry.BACKENDS]:
        return _backend(name)
    if any(p.name == name for p in PRESETS):
        chosen = preset(name)
        text = f"{name}: {chosen.description}\n\n  -p '{chosen.pipeline}'"
        return {"kind": "preset", "name": name, "text": text, "pipeline": chosen.pipeline}
    known = [n for group in names.values() for n in group] + [p.name for p in PRESETS] + [CODES]
    raise UsageError(registry.unknown("name", name, known))


def _pass(cls: type[Pass]) -> dict[str, Any]:
    options = list(_options(cls))
    lines = [
        f"{cls.name}: a pass",
        "",
        _doc(cls),
        "",
        f"Effect: {cls.effect.value}: {_PROMISES[cls.effect]}.",
    ]
    if options:
        lines += ["", "Options:"]
        width = max(len(option["name"]) for option in options)
        lines += [
            f"  {o['name']:<{width}}  {o['type']}, "
            + ("required" if o["default"] is None else f"default {o['default']}")
            for o in options
        ]
    lines += ["", "Example:", f"  pruna-opt run model.pt2 -p '{_example(cls, options)}' -o out"]
    return {
        "kind": "pass",
        "name": cls.name,
        "effect": cls.effect.value,
        "options": options,
        "text": "\n".join(lines),
    }


def _options(cls: type[Any]) -> typing.Iterator[dict[str, Any]]:
    """Name, type and default (as pipeline text) of each option."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.default_factory is not dataclasses.MISSING:
            default = print_value(f.default_factory())
        elif f.default is dataclasses.MISSING:
            default = None
        else:
            default = print_value(f.default)
        yield {"name": f.name, "type": _type(hints[f.name]), "default": default}


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(typing.get_args(hint)[0])}"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _example(cls: type[Pass], options: list[dict[str, Any]]) -> str:
    shown = [f"{o['name']}={o['default'] if o['default'] is not None else '...'}"
             for o in options[:2] if o["default"] != '""']  # fmt: skip
    return f"{cls.name}{{{','.join(shown)}}}" if shown else cls.name


def _doc(cls: type[Any]) -> str:
    """The docstring for people at a terminal: without what is about Python."""
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    kept = [p for p in paragraphs if not p.lstrip().startswith((">>>", "Raises:"))]
    return "\n\n".join(kept).replace("``", "").replace("Attributes:", "Options in words:")


def _backend(name: str) -> dict[str, Any]:
    backend = registry.find_backend(name)
    availability = backend.availability()
    lines = [
        f"{name}: a backend",
        "",
        _doc(type(backend)),
        "",
        f"Can build here:   {availability.build or 'yes'}",
        f"Can execute here: {availability.execute or 'yes'}",
    ]
    scheme = getattr(backend, "scheme", None)
    if scheme is not None:
        lines.append(f"Quantises:        activations {scheme.activation}, weights {scheme.weight}")
    module = inspect.getmodule(type(backend))
    lines += ["", inspect.cleandoc((module and module.__doc__) or "").replace("``", "")]
    return {
        "kind": "backend",
        "name": name,
        "build": availability.build,
        "execute": availability.execute,
        "text": "\n".join(lines).rstrip(),
    }

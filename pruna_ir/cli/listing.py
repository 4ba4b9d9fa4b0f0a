"""``pruna-opt list``: passes, backends and presets, from metadata and source; none is imported."""

from __future__ import annotations

import argparse
import ast
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from pruna_ir import registry
from pruna_ir.cli.console import Console
from pruna_ir.presets import PRESETS

_GROUPS = {"passes": registry.PASSES, "backends": registry.BACKENDS}


@dataclass(frozen=True)
class Row:
    """One line of the list."""

    kind: str
    name: str
    description: str
    effect: str
    distribution: str


def execute(args: argparse.Namespace, out: Console) -> int:
    """List what there is."""
    wanted = [args.what] if args.what else ["passes", "backends", "presets"]
    rows = [row for kind in wanted for row in rows_of(kind)]
    for problem in registry.problems():
        out.warn(str(problem))
    if out.as_json:
        out.json([asdict(row) for row in rows])
        return 0
    width = max((len(row.name) for row in rows), default=0)
    for kind in wanted:
        out.data(f"{kind}:")
        for row in rows:
            if row.kind == kind:
                out.data(_line(row, width))
    return 0


def _line(row: Row, width: int) -> str:
    effect = f" [{row.effect}]" if row.effect else ""
    foreign = "" if row.distribution.split(" ")[0] == "pruna-ir" else f" ({row.distribution})"
    return f"  {row.name:<{width}}  {row.description}{effect}{foreign}"


def rows_of(kind: str) -> list[Row]:
    """The rows of ``passes``, ``backends`` or ``presets``."""
    if kind == "presets":
        return [Row(kind, p.name, p.description, "", "pruna-ir") for p in PRESETS]
    return [
        Row(kind, entry.name, *describe(entry.value), entry.distribution)
        for entry in registry.entries(_GROUPS[kind])
    ]


def describe(value: str) -> tuple[str, str]:
    """The first sentence and the effect of a class ``package.module:Name``, from its source.

    Both are empty where there is no source to read.
    """
    module, _, name = value.partition(":")
    file = source_file(module)
    if file is None:
        return "", ""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return "", ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _first_sentence(ast.get_docstring(node) or ""), _effect(node)
    return "", ""


def source_file(module: str) -> Path | None:
    """The Python file of a module, found without importing it or a package around it."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not inner:
        return Path(spec.origin) if spec.origin else None
    for place in spec.submodule_search_locations or ():
        folder = Path(place).joinpath(*inner)
        for candidate in (folder.with_suffix(".py"), folder / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.replace("``", "")


def _effect(node: ast.ClassDef) -> str:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = statement.value
            if statement.target.id == "effect" and isinstance(value, ast.Attribute):
                return value.attr.lower()
    return ""

"""The loader that an artifact carries: `pruna_ir.backends.tvm_runtime` as a file of its own.

    from pruna_ir.errors import LoweringError, ...   -->   class LoweringError(PrunaError): ...

The one import from pruna_ir is replaced by the source of what it imports, so that ``load.py``
needs Python, numpy and TVM's runtime, and no logic stands twice in the repository.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from pruna_ir import errors
from pruna_ir.backends import tvm_runtime

LOADER = "load.py"


def loader_source() -> str:
    """The source of ``load.py``."""
    text = Path(tvm_runtime.__file__).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    (statement,) = _imports_from(text, errors.__name__)
    names = {alias.name for alias in statement.names}
    classes = "\n\n\n".join(_classes(names))
    rest = "".join(lines[statement.end_lineno :]).lstrip("\n")
    above = "".join(lines[: statement.lineno - 1]).rstrip("\n")
    return f"{above}\nfrom typing import ClassVar\n\n\n{classes}\n\n\n{rest}"


def _imports_from(text: str, module: str) -> Iterator[ast.ImportFrom]:
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.ImportFrom) and statement.module == module:
            yield statement


def _classes(names: set[str]) -> Iterator[str]:
    """The source of the error classes of these names, in the order in which they stand."""
    text = Path(errors.__file__).read_text(encoding="utf-8")
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.ClassDef) and statement.name in names:
            source = ast.get_source_segment(text, statement)
            assert source is not None
            yield source


__all__: Sequence[str] = ("LOADER", "loader_source")

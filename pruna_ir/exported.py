"""Reading archives of ``torch.export.save`` without running anything that they carry.

``torch.export.load`` trusts its file: it unpickles with ``weights_only=False`` where the safe way
fails, loads compiled libraries, resolves operators by walking attributes from ``torch``, and gives
size expressions to ``sympy.sympify``, which evaluates them; node and parameter names end up in
generated code. So the archive is read here first, record by record, and only what is known to be
data is copied into a fresh archive in memory, which ``torch.export.load`` then reads:

- weights and constants as raw tensors; pickled ones (sample inputs) must load with
  ``weights_only=True``; script objects, opaque objects and compiled libraries are refused;
- operators must be ``torch.ops`` overloads or arithmetic on sizes;
- expressions and names must match the grammars below.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch

from pruna_ir.errors import CaptureError
from pruna_ir.program import Program
from pruna_ir.propagate import propagate
from pruna_ir.verify import SIZE_ARITHMETIC, verify

_KEPT = re.compile(
    r"(models/model\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|\.format_version|\.storage_alignment)"
)
_PICKLED = re.compile(r"data/sample_inputs/model\.pt")
_IGNORED = re.compile(r"extra/.*")
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+\.\w+")
_ARITHMETIC = frozenset(
    f"{function.__module__}.{function.__name__}"
    for function in cast("frozenset[FunctionType]", SIZE_ARITHMETIC)
)
_NAME = re.compile(r"[\w.:\[\]/-]*")
# Symbols, numbers, calls of sympy's functions and arithmetic: no attribute, no string, no
# subscript, no dunder.
_EXPRESSION = re.compile(r"(?:[A-Za-z]\w*|\d+(?:\.\d+)?|[-+*/%(), <>=&|~!]|\s)*")
_QUOTED_SYMBOL = re.compile(r"\bSymbol\('[A-Za-z]\w*'")
_FUNCTION = re.compile(r"([A-Za-z]\w*)\s*\(")
_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
        "CleanDiv", "CeilDiv", "ModularIndexing", "Where", "Identity", "Eq", "Ne", "Lt", "Le",
        "Gt", "Ge", "And", "Or", "Not", "Piecewise", "ITE", "Add", "Mul", "Pow", "Abs", "floor",
        "ceiling", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt",
        "RoundDecimal", "ToFloat", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv",
        "LShift", "RShift",
    }
)  # fmt: skip


def read_exported(path: Path) -> Program:
    """The program in an archive that ``torch.export.save`` wrote.

    Raises:
        CaptureError: the archive is foreign or damaged, holds more than tensors and a graph, or
            was written by a version of torch that the installed one does not read.
    """
    from pruna_ir.capture import from_exported
    from pruna_ir.registry import kernels

    clean = _vetted(path)
    # Operators of ours may occur in the file; they exist once their kernels are imported.
    if b"torch.ops.pruna." in clean.getbuffer().tobytes():
        kernels()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(clean)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise CaptureError(
            f"{path}: torch {torch.__version__} cannot read this export: "
            f"{type(error).__name__}: {lines[0]}; export it again with the installed torch"
        ) from error
    if exported.example_inputs is None:
        raise CaptureError(f"{path}: holds no example inputs; export the model again with them")
    program = from_exported(exported)
    # torch restores no value for nodes that return nothing, such as assertions.
    missing = [n for n in program.graph.nodes if n.op != "output" and "val" not in n.meta]
    propagate(program, missing)
    verify(program)
    return program


def _vetted(path: Path) -> io.BytesIO:
    """A fresh archive of the records that are known to be data."""
    clean = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(clean, "w") as copy:
        names = archive.namelist()
        root = names[0].split("/")[0] if names else ""
        if f"{root}/models/model.json" not in names or len(set(names)) != len(names):
            raise CaptureError(
                f"{path}: is a zip archive, but neither a program of pruna-opt nor of "
                "torch.export.save"
            )
        for name in names:
            record = name.removeprefix(f"{root}/")
            if _IGNORED.fullmatch(record):
                continue
            if not _KEPT.fullmatch(record):
                raise CaptureError(_refusal(path, record, "only tensors and a graph are read"))
            content = _read(archive, name, path)
            copy.writestr(f"model/{record}", _vet(path, record, content))
    clean.seek(0)
    return clean


def _read(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise CaptureError(f"{path}: is not a whole .pt2 file ({error})") from error


def _refusal(path: Path, record: str, reason: str) -> str:
    return f"{path}: refused, since {record} could run code when it is loaded: {reason}"


def _vet(path: Path, record: str, content: bytes) -> bytes:
    """The content of a record, once it is known to be data."""
    if record.endswith(".json"):
        return _vet_json(path, record, content)
    if _PICKLED.fullmatch(record) and content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:
            raise CaptureError(
                _refusal(path, record, "it is a pickle that holds more than tensors")
            ) from error
    return content


def _vet_json(path: Path, record: str, content: bytes) -> bytes:
    """The JSON written anew, so that torch parses what was vetted and nothing else."""
    try:
        document = _without_guards(json.loads(content))
    except ValueError as error:
        raise CaptureError(f"{path}: {record} is not JSON: {error}") from error
    for key, value in _leaves(document):
        if problem := _problem(key, value):
            raise CaptureError(_refusal(path, record, f"{problem}: {str(value)[:60]!r}"))
    return json.dumps(document).encode()


def _without_guards(value: Any) -> Any:
    """The document without the Python source of torch's input checks; a Program has its own."""
    if isinstance(value, dict):
        return {k: [] if k == "guards_code" else _without_guards(v) for k, v in value.items()}
    return [_without_guards(item) for item in value] if isinstance(value, list) else value


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON value with the nearest key above it, and every key as a name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield "key", name
            yield from _leaves(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


_FREE_TEXT = frozenset(
    {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "as_string",
     "in_spec", "out_spec", "custom", "torch_version"}
)  # fmt: skip


def _problem(key: str, value: Any) -> str:
    """Why a leaf of the graph's JSON is not plain data; empty where it is."""
    if key == "use_pickle":
        return "a pickled tensor" if value else ""
    if not isinstance(value, str):
        return ""
    if key == "target":
        known = value in _ARITHMETIC or (
            _OPERATOR.fullmatch(value) and not value.startswith("torch.ops.aten.from_file.")
        )
        return "" if known else "no operator"
    if key in ("expr_str", "as_expr"):
        return _expression_problem(value)
    if key in ("in_spec", "out_spec"):
        names_class = "__enum__" in value or "default_factory" in value
        return "a structure that names a class" if names_class else ""
    if key in _FREE_TEXT:
        return ""
    return "" if _NAME.fullmatch(value) or key == "key" else "an odd name"


def _expression_problem(text: str) -> str:
    text = _QUOTED_SYMBOL.sub("Symbol(", text)
    if not _EXPRESSION.fullmatch(text) or "__" in text:
        return "an expression that is no arithmetic"
    foreign = set(_FUNCTION.findall(text)) - _FUNCTIONS
    return f"an expression that calls {min(foreign)}" if foreign else ""

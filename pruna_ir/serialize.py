"""Save and load: a Program as one ``.pt2`` file, without pickle.

The file is a zip archive: ``pruna/program.json`` holds the graph (operators by qualified name,
arguments as JSON), specs, dynamic dimensions, history, attributes and the provenance of every
node; ``pruna/tensors/N`` and ``pruna/examples/N`` hold raw little-endian values. Zip checks a
CRC of every record, so a truncated or altered file is an error and never a wrong program.

Why not ``torch.export.save``: exporting again rewrites the graph (names, hash, provenance), and
``torch.export.load`` unpickles (``weights_only=False`` as a fallback), evaluates size expressions
through ``sympy.sympify`` and loads compiled libraries that the archive may carry. Files that
``torch.export.save`` wrote are read too: see `pruna_ir.exported` for how that is made safe.

Limits: tensors are written from the CPU, contiguous; sparse and quantised tensors are refused.
Shapes are propagated afresh on load.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FunctionType
from typing import IO, Any, NamedTuple, cast

import torch
from torch import fx

from pruna_ir.errors import CaptureError, InvalidIRError, LoweringError, PrunaError
from pruna_ir.program import Applied, DimRange, Program, Size, TensorSpec
from pruna_ir.propagate import fake_mode
from pruna_ir.symbolic_sizes import propagate_from_specs
from pruna_ir.verify import SIZE_ARITHMETIC, verify

FORMAT = 1
GRAPH = "pruna/program.json"

_NAME = re.compile(r"[A-Za-z_]\w*")
_PATH = re.compile(r"[\w:-]+(\.[\w:-]+)*")
# Operators that reach for files: no program needs them, and a file must not smuggle them in.
_FORBIDDEN = ("aten::from_file.",)
_OPERATOR = re.compile(r"\w+::\w+\.\w+")
_FUNCTION_NAMES: dict[Any, str] = {
    function: f"{function.__module__.removeprefix('_')}.{function.__name__}"
    for function in cast("frozenset[FunctionType]", SIZE_ARITHMETIC)
}
_FUNCTIONS = {name: function for function, name in _FUNCTION_NAMES.items()}
# What a file of the right form with wrong content makes the reader, torch and torch.fx raise.
_MALFORMED = (
    AssertionError, AttributeError, EOFError, IndexError, KeyError, RuntimeError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
_SPECIAL = (torch.dtype, torch.layout, torch.memory_format)


# -- saving --------------------------------------------------------------------------------


def save_program(program: Program, path: Path) -> None:
    """Write a program to one file; what stands at ``path`` is replaced when all is written.

    Raises:
        LoweringError: the file cannot be written.
        InvalidIRError: the program holds something that has no form in the file.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_program(program, Path(folder) / "linear.pt2")
    ...     load_program(Path(folder) / "linear.pt2").hash() == program.hash()
    True
    """
    tensors, aliases = _unique_tensors(program)
    document = _document(program, tensors, aliases)
    with whole_file(Path(path)) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        archive.writestr(GRAPH, json.dumps(document), zipfile.ZIP_DEFLATED)
        for number, tensor in enumerate(tensors.values()):
            _write_tensor(archive, f"pruna/tensors/{number}", tensor)
        for number, tensor in enumerate(program.examples):
            _write_tensor(archive, f"pruna/examples/{number}", tensor)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that becomes ``path`` when the block ends without an error.

    Raises:
        LoweringError: the file cannot be written.
    """
    partial = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".partial"
        )
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        raise LoweringError(
            f"{path}: cannot be written: {error.strerror or error}; give a place that is writable"
        ) from error
    finally:
        if partial:
            Path(partial).unlink(missing_ok=True)


def _unique_tensors(program: Program) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, and the names that share the tensor of another name."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in program.tensors().items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise InvalidIRError(f"{name} is a {tensor.layout} tensor; only dense ones are saved")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def _write_tensor(archive: zipfile.ZipFile, name: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    with archive.open(name, "w", force_zip64=True) as record:
        if flat.numel():
            record.write(flat.view(torch.uint8).numpy().data)


def _document(
    program: Program, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]
) -> dict[str, Any]:
    from pruna_ir import __version__

    texts = _Table()
    nodes = [_node(node, texts) for node in program.graph.nodes]
    return {
        "format": FORMAT,
        "made_by": {"pruna-ir": __version__, "torch": torch.__version__},
        "inputs": [_spec(spec) for spec in program.inputs],
        "outputs": [_spec(spec) for spec in program.outputs],
        "dims": {name: asdict(bounds) for name, bounds in program.dims.items()},
        "symbols": _symbols(program),
        "history": [asdict(entry) for entry in program.history],
        "attributes": dict(program.attributes),
        "tensors": {name: _tensor(tensor) for name, tensor in tensors.items()},
        "aliases": dict(aliases),
        "examples": [_tensor(tensor) for tensor in program.examples],
        "nodes": nodes,
        "texts": texts.items,
    }


class _Table:
    """Values that repeat over many nodes, written once each and referred to by number."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Any) -> int:
        key = json.dumps(value)
        if key not in self._numbers:
            self._numbers[key] = len(self.items)
            self.items.append(value)
        return self._numbers[key]


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": _short(spec.dtype), "shape": list(spec.shape)}


def _tensor(tensor: torch.Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": _short(tensor.dtype), "shape": list(tensor.shape)}
    if isinstance(tensor, torch.nn.Parameter):
        entry["parameter"] = True
        entry["requires_grad"] = tensor.requires_grad
    return entry


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _symbols(program: Program) -> dict[str, dict[str, Any]]:
    """Per dynamic dimension: the size in the example and the range that shapes assume."""
    found: dict[str, dict[str, Any]] = {}
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if not isinstance(size, torch.SymInt) or not _NAME.fullmatch(str(name)):
                continue
            bounds = fake_mode(program).shape_env.var_to_range.get(size.node.expr)  # type: ignore[union-attr]
            lower, upper = (str(bounds.lower), str(bounds.upper)) if bounds else ("2", "")
            found[str(name)] = {
                "symbol": str(size),
                "hint": size.node.hint,
                "lower": int(lower) if lower.isdigit() else 2,
                "upper": int(upper) if upper.isdigit() else None,
            }
    return found


def _node(node: fx.Node, texts: _Table) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op != "output":
        entry["target"] = _target(node)
    if node.args:
        entry["args"] = [_argument(node, value) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: _argument(node, value) for key, value in node.kwargs.items()}
    stack = node.meta.get("nn_module_stack")
    if stack:
        rows = [[key, path, _class_name(kind)] for key, (path, kind) in stack.items()]
        entry["modules"] = texts.number(rows)
    if trace := node.meta.get("stack_trace"):
        entry["trace"] = texts.number(str(trace))
    if function := node.meta.get("torch_fn"):
        entry["torch_fn"] = [str(part) for part in function]
    return entry


def _class_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}::{node.target._schema.name.split('::')[1]}" + (
            f".{node.target._overloadname}"
        )
    if isinstance(node.target, str):
        return node.target
    if node.target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[node.target]
    raise InvalidIRError(f"{node.name}: {node.target} has no form in a saved program")


def _argument(node: fx.Node, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_argument(node, item) for item in value]}
    if isinstance(value, list):
        return [_argument(node, item) for item in value]
    if isinstance(value, (*_SPECIAL, torch.device)):
        kind = "device" if isinstance(value, torch.device) else "torch"
        return {kind: _short(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise InvalidIRError(
        f"{node.name}: an argument of type {type(value).__name__} has no form in a saved program"
    )


# -- loading -------------------------------------------------------------------------------


def load_program(path: Path) -> Program:
    """Read a program that `save_program` or ``torch.export.save`` wrote; runs no code from it.

    Raises:
        CaptureError: the file is missing, truncated, foreign, unsafe, or of a newer format.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if GRAPH in archive.namelist():
                return _load(archive)
    except OSError as error:
        raise CaptureError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CaptureError(
            f"{path}: is not a whole .pt2 file ({error}); save the program again with "
            "torch.export.save or pruna-opt"
        ) from error
    except PrunaError as error:
        raise CaptureError(f"{path}: {error}") from error
    except _MALFORMED as error:
        raise CaptureError(
            f"{path}: is not a program that this version reads: {type(error).__name__}: {error}"
        ) from error
    from pruna_ir.exported import read_exported

    return read_exported(path)


def _load(archive: zipfile.ZipFile) -> Program:
    document = json.loads(archive.read(GRAPH))
    if document.get("format") != FORMAT:
        raise CaptureError(
            f"is of format {document.get('format')}, but this version reads {FORMAT}; install the "
            f"pruna-ir that made it ({document.get('made_by')})"
        )
    tensors = {
        name: _read_tensor(archive, f"pruna/tensors/{number}", entry)
        for number, (name, entry) in enumerate(document["tensors"].items())
    }
    tensors |= {name: tensors[first] for name, first in document["aliases"].items()}
    for name in tensors:
        _checked(_PATH, name, "tensor")
    examples = tuple(
        _read_tensor(archive, f"pruna/examples/{number}", entry)
        for number, entry in enumerate(document["examples"])
    )
    inputs = tuple(map(_read_spec, document["inputs"]))
    graph = _read_graph(document)
    program = Program(
        fx.GraphModule(tensors, graph, class_name="Program"),
        inputs,
        tuple(map(_read_spec, document["outputs"])),
        examples,
        {name: DimRange(**bounds) for name, bounds in document["dims"].items()},
        tuple(Applied(**entry) for entry in document["history"]),
        dict(document["attributes"]),
    )
    for name in document["symbols"]:
        _checked(_NAME, name, "dimension")
    propagate_from_specs(program, document["symbols"])
    verify(program)
    return program


def _checked(pattern: re.Pattern[str], name: Any, what: str) -> str:
    """A name that generated code may contain."""
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise CaptureError(f"{what} name {name!r} is not a legal name")
    return name


def _read_spec(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(
        str(entry["name"]), _dtype(entry["dtype"]), tuple(_size(s) for s in entry["shape"])
    )


def _size(value: Any) -> Size:
    return value if isinstance(value, int) else str(value)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = _constant(name, torch.dtype)
    return dtype


def _constant(name: str, *kinds: type) -> Any:
    value = getattr(torch, _checked(_NAME, name, "constant"), None)
    if not isinstance(value, kinds):
        raise CaptureError(f"torch.{name} is no dtype, layout or memory format")
    return value


def _read_tensor(archive: zipfile.ZipFile, record: str, entry: dict[str, Any]) -> torch.Tensor:
    dtype, shape = _dtype(entry["dtype"]), [int(size) for size in entry["shape"]]
    content = bytearray(archive.read(record))
    raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
    tensor = raw.view(dtype).reshape(shape)
    if entry.get("parameter"):
        return torch.nn.Parameter(tensor, requires_grad=bool(entry["requires_grad"]))
    return tensor


def _read_graph(document: dict[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    stacks: dict[int, dict[str, tuple[str, str]]] = {}
    for entry in document["nodes"]:
        name, op = _checked(_NAME, entry["name"], "node"), entry["op"]
        args = tuple(_read_argument(value, known) for value in entry.get("args", ()))
        kwargs = {
            _checked(_NAME, key, "argument"): _read_argument(value, known)
            for key, value in entry.get("kwargs", {}).items()
        }
        target = "output" if op == "output" else _read_target(op, entry["target"])
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            # torch.fx avoids names of Python's builtins, which inputs may well have.
            node.name = name
        known[name] = node
        if "modules" in entry:
            number = entry["modules"]
            if number not in stacks:
                stacks[number] = {k: (path, kind) for k, path, kind in document["texts"][number]}
            node.meta["nn_module_stack"] = stacks[number]
        if "trace" in entry:
            node.meta["stack_trace"] = document["texts"][entry["trace"]]
        if "torch_fn" in entry:
            node.meta["torch_fn"] = tuple(entry["torch_fn"])
    return graph


def _read_target(op: str, target: str) -> Any:
    if op == "placeholder":
        return _checked(_NAME, target, "input")
    if op == "get_attr":
        return _checked(_PATH, target, "tensor")
    if op != "call_function":
        raise CaptureError(f"a {op} node is not part of the IR")
    return _FUNCTIONS[target] if target in _FUNCTIONS else operator_named(target)


def operator_named(qualified: str) -> torch._ops.OpOverload:
    """The operator of a qualified name such as ``aten::conv2d.default``.

    Raises:
        CaptureError: no such operator is registered.
    """
    legal = _OPERATOR.fullmatch(qualified) and not qualified.startswith(_FORBIDDEN)
    found = _registered(qualified) if legal else None
    if legal and found is None:
        # Ours and third parties' operators come to be when their kernels are imported.
        from pruna_ir.registry import kernels

        kernels()
        found = _registered(qualified)
    if found is None:
        raise CaptureError(
            f"operator {qualified} is not known here; install and import the package that "
            "registers it"
        )
    return found


def _registered(qualified: str) -> torch._ops.OpOverload | None:
    namespace, name, overload = re.split(r"::|\.", qualified)
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


class _Decode(NamedTuple):
    """How each tagged JSON object becomes an argument."""

    known: Mapping[str, fx.Node]

    def node(self, value: str) -> fx.Node:
        return self.known[value]

    def tuple(self, value: list[Any]) -> Any:
        return (*(_read_argument(item, self.known) for item in value),)

    def float(self, value: str) -> Any:
        return {"inf": torch.inf, "-inf": -torch.inf, "nan": torch.nan}[value]

    def torch(self, value: str) -> Any:
        return _constant(value, *_SPECIAL)

    def device(self, value: str) -> Any:
        return torch.device(value)

    def complex(self, value: list[Any]) -> Any:
        real, imaginary = value
        return real + 1j * imaginary


_TAGS = frozenset({"node", "tuple", "float", "torch", "device", "complex"})


def _read_argument(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read_argument(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag not in _TAGS:
        raise CaptureError(f"an argument is tagged {tag!r}, which this version does not know")
    return getattr(_Decode(known), tag)(content)

"""Lowering: what a backend is, what an artifact is, and how one comes to stand on disk.

A backend is one file with one class (see `Backend`). An artifact is a folder: the backend's
files, ``manifest.json`` (what it is, made by what, sha256 of every file) and ``certificate.json``
(what was compared with the program, on what, how far it was off). Artifacts are written to a
temporary folder beside the destination and renamed, so that what stands there is whole.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import fx

from pruna_ir.errors import LoweringError
from pruna_ir.program import Program, TensorSpec, module_path, source_line
from pruna_ir.stimuli import index_limits
from pruna_ir.transform import API_VERSION, Context

MANIFEST = "manifest.json"
CERTIFICATE = "certificate.json"


class Verdict(enum.Enum):
    """The outcome of a comparison."""

    PASSED = "PASSED"
    FAILED = "FAILED"
    NOT_RUN = "NOT_RUN"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can build, and whether it can execute, on this machine.

    An empty reason means yes; otherwise it says what is missing and how to get it.
    """

    build: str = ""
    execute: str = ""


@dataclass(frozen=True)
class Offender:
    """A node that a backend cannot lower."""

    node: str
    operator: str
    reason: str
    source: str
    module: str

    @staticmethod
    def of(node: fx.Node, reason: str) -> Offender:
        """The offender for a node, with its provenance."""
        return Offender(node.name, str(node.target), reason, source_line(node), module_path(node))

    def __str__(self) -> str:
        where = f" ({self.source})" if self.source else ""
        return f"{self.node}: {self.operator}{where}: {self.reason}"


@dataclass(frozen=True)
class KernelRow:
    """One layer of a kernel audit: what the runtime itself reports that it executes."""

    layer: str
    """The runtime's name of the layer."""
    kind: str
    """``conv``, ``linear``, ``matmul`` or the runtime's own word for anything else."""
    precision: str
    """``int8``, ``float32``, ``bfloat16``... as executed, not as stored."""
    detail: str = ""
    """The runtime's own name for the kernel, such as ``brgconv_avx512_core_vnni``."""


@dataclass(frozen=True)
class Lowered:
    """What `Backend.lower` wrote: the main file, facts for the manifest, and warnings."""

    main: str
    """The file, relative to the artifact's folder, that `Backend.load` starts from."""
    tool_versions: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Dynamic dimensions of the program that the artifact takes at one size only."""


class Runner(Protocol):
    """A loaded artifact that can be called."""

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input, in the manifest's order."""
        ...

    def audit(self) -> list[KernelRow]:
        """The executed precision of every layer, from the runtime's own report."""
        ...


@runtime_checkable
class ProfiledRunner(Runner, Protocol):
    """A runner that was loaded to time its layers, where its runtime has a profiler."""

    def layer_times(self, inputs: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
        """Milliseconds of every layer, the median over some runs, by the runtime's name of it."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """How an artifact is loaded to run.

    Attributes:
        threads: number of threads; 0 leaves it to the runtime.
        strict_precision: run float32 as float32 (OpenVINO may use bfloat16 otherwise).
        profile: time every layer; a runner that can do so is a `ProfiledRunner`.
    """

    threads: int = 0
    strict_precision: bool = True
    profile: bool = False


class Backend(Protocol):
    """What a backend provides. Ours and third parties' implement the same six members.

    Vendor packages are imported inside the methods that need them, never at module level.

    A backend that cannot execute everywhere may have a seventh,
    ``load_intermediate(folder, options) -> Runner | None``: the file that the artifact was built
    from, where that can run. It is verified when the artifact itself cannot be. It may also state
    ``zeros``, what it does with zeros in weights (see `pruna_ir.sparsity`), and ``variants``,
    options as text under which it needs other tools or devices, for ``pruna-opt doctor``.
    """

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION

    def availability(self) -> Availability:
        """What can be done here, found out without importing the vendor package."""
        ...

    def unsupported(self, program: Program) -> list[Offender]:
        """Every node that cannot be lowered, before any work; empty where all can."""
        ...

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Write the artifact's files into an empty folder.

        Raises:
            LoweringError: the vendor's tool refused the program.
        """
        ...

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """Load an artifact to run it.

        Raises:
            ToolchainError: it cannot be executed on this machine.
            LoweringError: the runtime refuses the files.
        """
        ...


@dataclass(frozen=True)
class Manifest:
    """What an artifact is; written as ``manifest.json``.

    An input or output has a ``name``, a ``dtype`` and a ``shape`` in which a word is a dynamic
    dimension; inputs also have the shape of their ``example`` and, for integers, the ``range`` of
    sensible values.
    """

    backend: str
    main: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    dims: dict[str, list[int | None]]
    """The smallest and largest size of each dynamic dimension; null for no bound."""
    program_hash: str
    pipeline: list[str]
    attributes: dict[str, str]
    tool_versions: dict[str, str]
    facts: dict[str, Any]
    warnings: list[str]
    files: dict[str, str]
    """sha256 of every file besides the manifest and the certificate."""
    format: int = 1

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read an artifact's manifest and check every file's sha256 against it.

        Raises:
            LoweringError: there is no whole artifact in the folder.
        """
        path = folder / MANIFEST
        try:
            manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise LoweringError(f"{folder} holds no whole artifact: {error}") from error
        for name, expected in manifest.files.items():
            file = folder / name
            if not file.is_file() or sha256(file) != expected:
                raise LoweringError(f"{file} is missing or differs from its sha256 in {MANIFEST}")
        return manifest


def make_manifest(backend: str, program: Program, folder: Path, lowered: Lowered) -> Manifest:
    """The manifest of freshly lowered files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ranges = _integer_ranges(program)
    inputs = [
        _spec(spec, lowered.fixed)
        | {"example": list(example.shape)}
        | ({"range": ranges[spec.name]} if spec.name in ranges else {})
        for spec, example in zip(program.inputs, program.examples, strict=True)
    ]
    return Manifest(
        backend=backend,
        main=lowered.main,
        inputs=inputs,
        outputs=[_spec(spec, lowered.fixed) for spec in program.outputs],
        dims={
            name: [bounds.lower, bounds.upper]
            for name, bounds in program.dims.items()
            if name not in lowered.fixed
        },
        program_hash=program.hash(),
        pipeline=[entry.text for entry in program.history],
        attributes=dict(program.attributes),
        tool_versions=dict(lowered.tool_versions),
        facts=dict(lowered.facts),
        warnings=list(lowered.warnings),
        files={path.relative_to(folder).as_posix(): sha256(path) for path in files},
    )


def _spec(spec: TensorSpec, fixed: Mapping[str, int]) -> dict[str, Any]:
    shape = [fixed.get(size, size) if isinstance(size, str) else size for size in spec.shape]
    return {
        "name": spec.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": shape,
    }


def _integer_ranges(program: Program) -> dict[str, list[int]]:
    """The smallest and largest sensible value of each integer input: its example's, or an index's.

    An input that is looked up in an embedding takes every row.
    """
    limits = index_limits(program)
    ranges: dict[str, list[int]] = {}
    for spec, example in zip(program.inputs, program.examples, strict=True):
        if spec.name in limits:
            ranges[spec.name] = [0, limits[spec.name] - 1]
        elif not spec.dtype.is_floating_point and example.numel():
            ranges[spec.name] = [int(example.min()), int(example.max())]
    return ranges


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or plain value as readable JSON; NaN is refused."""
    plain = value if isinstance(value, (dict, list)) else asdict(value)
    path.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``destination`` when the block ends without an error.

    What stood at the destination before stays untouched until then. A process killed in between
    leaves only a folder whose name starts with a dot and ends in ``.partial``.

    Raises:
        LoweringError: the folder cannot be written (permissions, no space).
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(
                dir=destination.parent, prefix=f".{destination.name}.", suffix=".partial"
            )
        )
    except OSError as error:
        raise LoweringError(
            f"{destination}: cannot be written: {error.strerror}; give a folder that is writable"
        ) from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, destination)
    except OSError as error:
        raise LoweringError(f"{destination}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, destination: Path) -> None:
    if not destination.exists():
        partial.rename(destination)
        return
    old = Path(
        tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".old")
    )
    destination.rename(old / destination.name)
    try:
        partial.rename(destination)
    except OSError:
        os.rename(old / destination.name, destination)  # noqa: PTH104
        raise
    shutil.rmtree(old)

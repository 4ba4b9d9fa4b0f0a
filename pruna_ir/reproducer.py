"""Reproducers: a folder that holds a failure, and the command that repeats it.

    program.pt2        the program before the culprit
    origin.pt2         what that was pruned from (only where it knows)
    reproducer.json    the pass as text, its scopes, seed, target, message, versions
    data.npz           the calibration or check data that the pass saw (only where there was some)

``pruna-opt replay FOLDER`` runs the pass with its check again. No pickle, no code.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pruna_ir.data import DataSource, load_data
from pruna_ir.errors import CaptureError, PrunaError
from pruna_ir.instruments import Watch
from pruna_ir.lowering import whole_folder, write_json
from pruna_ir.pipeline import Failure, Pipeline, PipelineResult
from pruna_ir.program import Origin, Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.spec import PassSpec, ScopeSpec, pass_spec, print_pipeline
from pruna_ir.transform import Context

PROGRAM = "program.pt2"
ORIGIN = "origin.pt2"
RECORD = "reproducer.json"
DATA = "data.npz"
DATA_LIMIT = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Record:
    """What ``reproducer.json`` holds."""

    pipeline: str
    seed: int
    target: str
    batch_size: int
    error: str
    message: str
    versions: Mapping[str, str]
    removed: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    format: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a replay found: the same error as recorded, another one, or none.

    ``result`` is None where the pass failed again.
    """

    record: Record
    error: PrunaError | None
    result: PipelineResult | None

    @property
    def repeated(self) -> bool:
        """Whether the replay failed with the recorded kind of error."""
        return self.error is not None and type(self.error).__name__ == self.record.error


@dataclass(frozen=True)
class WriteReproducer(Watch):
    """An instrument that writes a reproducer when a pass or its check fails."""

    folder: Path

    def failed(self, failure: Failure) -> str:
        """Write the folder; returns the line that tells the user of it."""
        write_reproducer(failure, self.folder)
        return f"  reproducer: pruna-opt replay {self.folder}"


def write_reproducer(failure: Failure, folder: Path) -> None:
    """Write what is needed to repeat a failure.

    Raises:
        LoweringError: the folder cannot be written.
    """
    item: PassSpec | ScopeSpec = pass_spec(failure.pass_)
    for glob in reversed(failure.scopes):
        item = ScopeSpec("submodule", glob, (item,))
    context, origin = failure.context, failure.before.origin
    first = next(iter(context.data), None) if context.data is not None else None
    record = Record(
        pipeline=print_pipeline((item,)),
        seed=context.seed,
        target=context.target,
        batch_size=len(first.inputs[0]) if first is not None else 1,
        error=type(failure.error).__name__,
        message=str(failure.error),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        removed=None if origin is None else _as_json(origin),
    )
    with whole_folder(folder) as partial:
        save_program(failure.before, partial / PROGRAM)
        if origin is not None:
            save_program(origin.program, partial / ORIGIN)
        if context.data is not None:
            _save_data(context.data, failure.before, partial / DATA)
        write_json(partial / RECORD, asdict(record))


def _as_json(origin: Origin) -> dict[str, dict[str, list[int]]]:
    return {
        name: {str(dim): [int(index) for index in indices] for dim, indices in dims.items()}
        for name, dims in origin.removed.items()
    }


def _with_origin(program: Program, folder: Path, record: Record) -> Program:
    if record.removed is None:
        return program
    removed = {
        name: {int(dim): tuple(indices) for dim, indices in dims.items()}
        for name, dims in record.removed.items()
    }
    return replace(program, origin=Origin(load_program(folder / ORIGIN), removed))


def _save_data(data: DataSource, program: Program, path: Path) -> None:
    """The batches that fit into the limit (at least one), joined, one array per input."""
    batches, size = [], 0
    for batch in data:
        batches.append(batch)
        size += sum(tensor.nbytes for tensor in batch.inputs)
        if size > DATA_LIMIT:
            break
    arrays = {
        spec.name: torch.cat([batch.inputs[i] for batch in batches]).numpy()
        for i, spec in enumerate(program.inputs)
    }
    labels = [batch.labels for batch in batches if batch.labels is not None]
    if len(labels) == len(batches):
        arrays["labels"] = torch.cat(labels).numpy()
    np.savez(path, allow_pickle=False, **arrays)


def replay(folder: Path) -> Outcome:
    """Run a recorded pass with its check once more.

    Raises:
        CaptureError: the folder holds no whole reproducer.
    """
    try:
        record = Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CaptureError(f"{folder} holds no reproducer: {error}") from error
    program = _with_origin(load_program(folder / PROGRAM), folder, record)
    names = tuple(spec.name for spec in program.inputs)
    file = folder / DATA
    data = load_data(file, names, record.batch_size) if file.exists() else None
    context = Context(data=data, target=record.target, seed=record.seed)
    pipeline = Pipeline.parse(record.pipeline)
    try:
        return Outcome(record, None, pipeline.run(program, context))
    except PrunaError as error:
        return Outcome(record, error, None)

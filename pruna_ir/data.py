"""Data sources: batches of program inputs, with labels where there are any.

A DataSource is re-iterable and never loads more than it must: calibration walks over it once,
accuracy once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from pruna_ir.errors import CaptureError, UsageError


@dataclass(frozen=True)
class Batch:
    """The inputs of one run, in the program's order, and the labels ([batch], int64) if known."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None = None


class DataSource(Protocol):
    """Anything that yields batches, the same ones in the same order each time."""

    def __len__(self) -> int:
        """The number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The batches."""
        ...


@dataclass(frozen=True)
class TensorData:
    """Tensors that share their first dimension, cut into batches.

    >>> data = TensorData((torch.zeros(5, 3),), batch_size=2)
    >>> [len(batch.inputs[0]) for batch in data]
    [2, 2, 1]
    """

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        lengths = {len(t) for t in (*self.inputs, *([] if self.labels is None else [self.labels]))}
        if len(lengths) != 1 or 0 in lengths:
            raise UsageError(
                f"the tensors of a data source must share a non-zero first dimension, not "
                f"{sorted(lengths)}"
            )
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {self.batch_size}")

    def __len__(self) -> int:
        return -(-len(self.inputs[0]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.inputs[0]), self.batch_size):
            part = slice(start, start + self.batch_size)
            labels = None if self.labels is None else self.labels[part]
            yield Batch(tuple(tensor[part] for tensor in self.inputs), labels)

    def take(self, samples: int) -> TensorData:
        """The first samples only."""
        labels = None if self.labels is None else self.labels[:samples]
        return TensorData(tuple(t[:samples] for t in self.inputs), labels, self.batch_size)


def load_data(path: Path, names: tuple[str, ...], batch_size: int = 32) -> TensorData:
    """Read a ``.npz`` file with one array per program input, by name, and optional ``labels``.

    A program with a single input also accepts any single array besides ``labels``. Object arrays
    (pickle) are refused.

    Raises:
        CaptureError: the file cannot be read or lacks an input.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file}
    except (OSError, ValueError, EOFError) as error:
        raise CaptureError(f"{path}: cannot be read as an .npz file of arrays: {error}") from error
    except Exception as error:
        raise CaptureError(f"{path}: is not a whole .npz file: {error}") from error
    labels = arrays.pop("labels", None)
    if len(names) == 1 and names[0] not in arrays and len(arrays) == 1:
        arrays = {names[0]: next(iter(arrays.values()))}
    if missing := [name for name in names if name not in arrays]:
        raise CaptureError(
            f"{path}: has no array named {missing[0]!r}; it holds {', '.join(arrays) or 'nothing'}"
        )
    return TensorData(tuple(arrays[name] for name in names), labels, batch_size)

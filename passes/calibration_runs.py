"""Calibration runs: batches of data cut to what a program accepts, whole or one sample at a time.

A *sample* is an index of the batch dimension: of the first dimension of the first input that has
one, and of every input that shares its symbol (or, where the batch is fixed, its size). Where the
program fixes its batch size, data is cut to that size, a rest that does not fill a batch is left
out, and criteria that are defined per sample see whole batches as their samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from pruna_ir.data import Batch, DataSource
from pruna_ir.errors import UsageError
from pruna_ir.program import Program


def runs(program: Program, data: DataSource, *, single: bool = False) -> Iterator[Batch]:
    """The batches of the data as the program takes them.

    Args:
        program: what will run them.
        data: batches; their inputs are checked against the program.
        single: cut to the smallest batch that the program takes, one sample where it can.

    Raises:
        UsageError: the data does not fit the program, or holds no run.
    """
    number = 0
    for batch in data:
        for run in _cut(program, batch, single=single):
            inputs = tuple(program.bind(run.inputs, {}))
            number += 1
            yield Batch(inputs, run.labels)
    if not number:
        raise UsageError(
            "the calibration data holds no sample that fits the program's inputs "
            f"({'; '.join(map(str, program.inputs))}); give at least one whole batch"
        )


def batch_size(program: Program) -> int | str | None:
    """The size or the symbol of the batch dimension; None where no input has a dimension."""
    return next((spec.shape[0] for spec in program.inputs if spec.shape), None)


def rows(program: Program, inputs: tuple[torch.Tensor, ...]) -> int:
    """The number of samples of a run."""
    size = batch_size(program)
    found = (
        len(value)
        for spec, value in zip(program.inputs, inputs, strict=True)
        if spec.shape and spec.shape[0] == size
    )
    return next(found, 1)


def _cut(program: Program, batch: Batch, *, single: bool) -> Iterator[Batch]:
    size = batch_size(program)
    if size is None or len(batch.inputs) != len(program.inputs):
        yield batch
        return
    count = rows(program, batch.inputs)
    fixed = isinstance(size, int)
    step = size if isinstance(size, int) else _least(program, size) if single else count
    parts = count // step if fixed else max(count // step, 1)
    for number in range(parts):
        last = number == parts - 1 and not fixed
        part = slice(number * step, count if last else (number + 1) * step)
        yield Batch(
            tuple(
                value[part] if spec.shape and spec.shape[0] == size else value
                for spec, value in zip(program.inputs, batch.inputs, strict=True)
            ),
            None if batch.labels is None else batch.labels[part],
        )


def _least(program: Program, symbol: str) -> int:
    """The smallest batch that the program takes."""
    return max(program.dims[symbol].lower, 1) if symbol in program.dims else 1


def sample_seed(program: Program, inputs: tuple[torch.Tensor, ...], row: int, seed: int) -> int:
    """A seed that depends on a sample's content alone, not on its batch, place or rank."""
    size = batch_size(program)
    code = seed & 0xFFFFFFFF
    for spec, value in zip(program.inputs, inputs, strict=True):
        shared = not spec.shape or spec.shape[0] != size
        content = (value if shared else value[row]).detach().cpu().contiguous()
        code = zlib.crc32(content.reshape(-1).view(torch.uint8).numpy().tobytes(), code)
    return code

"""Top-1 accuracy on labelled data, of a program and of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pruna_ir.data import TensorData
from pruna_ir.equivalence import run_native
from pruna_ir.errors import UsageError
from pruna_ir.lowering import Runner
from pruna_ir.program import Program

Classify = Callable[[tuple[torch.Tensor, ...]], Any]
"""Maps a batch of inputs to scores, [batch, classes]."""


def program_accuracy(program: Program, data: TensorData) -> float:
    """The share of samples whose highest score is at their label."""
    return _accuracy(lambda inputs: run_native(program, inputs)[0].numpy(), data, 0)


def runner_accuracy(runner: Runner, data: TensorData, fixed_batch: int) -> float:
    """The same for an artifact; ``fixed_batch`` is the only batch size that it takes, or 0."""

    def classify(inputs: tuple[torch.Tensor, ...]) -> Any:
        return runner.run([value.numpy() for value in inputs])[0]

    return _accuracy(classify, data, fixed_batch)


def _accuracy(classify: Classify, data: TensorData, fixed_batch: int) -> float:
    if data.labels is None:
        raise UsageError("accuracy needs an array 'labels' in the evaluation data")
    batches = TensorData(data.inputs, data.labels, fixed_batch or data.batch_size)
    right = 0
    for batch in batches:
        assert batch.labels is not None
        count = len(batch.labels)
        scores = np.asarray(classify(_filled(batch.inputs, fixed_batch)))[:count]
        if scores.ndim != 2:
            raise UsageError(
                "accuracy needs an output of scores, [batch, classes], but the first output is "
                f"{list(scores.shape)}; leave --eval-data out"
            )
        right += int((scores.argmax(1) == batch.labels.numpy()).sum())
    return right / len(data.inputs[0])


def _filled(inputs: Sequence[torch.Tensor], size: int) -> tuple[torch.Tensor, ...]:
    """Inputs whose last sample is repeated up to a fixed batch size."""
    if not size or len(inputs[0]) == size:
        return tuple(inputs)
    return tuple(torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]) for x in inputs)

"""Calibration: observers see what values the tensors of a program take on data.

One walk over the data (see `packed_walk`). Values are freed at their last use, and each observed
tensor is folded into an observer of fixed size; no activation is kept. Values are the program's up
to rounding: convolutions run in oneDNN's own layouts, and large batches in parts.

What observes is in `observers` and `histogram`, and which range to keep of it in
`activation_ranges`; all of it can be imported from here too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from pruna_ir.activation_ranges import (
    METHODS,
    Method,
    clipped_fraction,
    estimate,
    noise,
    sqnr_db,
)
from pruna_ir.context import Progress, no_progress
from pruna_ir.data import DataSource
from pruna_ir.errors import PassError, UsageError
from pruna_ir.histogram import Histogram
from pruna_ir.observers import Mergeable, MinMax, Observer, bounds
from pruna_ir.packed_walk import PackedWalk
from pruna_ir.program import Program, module_path

__all__ = [
    "METHODS", "Histogram", "Mergeable", "Method", "MinMax", "Observer", "bounds",
    "calibration_data", "clipped_fraction", "estimate", "layer_name", "noise", "observe", "runs",
    "sqnr_db", "too_few",
]  # fmt: skip

_MOST = torch.finfo(torch.float32).max


def observe(
    program: Program,
    observers: Mapping[fx.Node, Observer],
    data: DataSource,
    *,
    samples: int = 128,
    progress: Progress = no_progress,
) -> int:
    """Run the program on data and let observers see the values of their nodes.

    Args:
        program: what to run; its graph may be under rewrite.
        observers: the observer of each node of interest; updated in place.
        data: batches of inputs. Where the program fixes its batch size, they are cut to it.
        samples: stop after this many samples (rows of dimension 0 of the first input).
        progress: called after each batch with the samples done.

    Returns:
        The number of samples seen.

    Raises:
        UsageError: the data is empty or does not fit the program.
        PassError: a value is NaN or infinite; the message names the layer and the batch.
    """
    if samples < 1:
        raise UsageError(f"calibration needs at least 1 sample, not {samples}")
    # Each thread has observers of its own; the caller's take in the others' in the end.
    own = _mergeable(observers)
    count = torch.get_num_threads() - 1 if own else 0
    helpers = [{key: one.empty() for key, one in own.items()} for _ in range(count)]
    shown = [_Shown(observers)]
    for helper in helpers:
        shown.append(_Shown({node: helper[id(seen)] for node, seen in observers.items()}))
    walk = PackedWalk(program, observers, *shown)
    done = 0
    for number, inputs in enumerate(runs(program, data, samples)):
        for each in shown:
            each.batch = number
        walk.walk(inputs)
        done += _rows(inputs)
        progress("calibrate", done, max(done, min(samples, len(data) * _rows(inputs))))
    for helper in helpers:
        for key, one in own.items():
            one.merge(helper[key])
    return done


def _mergeable(observers: Mapping[fx.Node, Observer]) -> dict[int, Mergeable]:
    """Each observer by its id; none where one cannot take in what another has seen."""
    found = {id(one): one for one in observers.values() if isinstance(one, Mergeable)}
    return found if len(found) == len({id(one) for one in observers.values()}) else {}


def runs(
    program: Program, data: DataSource, samples: int = sys.maxsize
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The inputs of one run after another, until this many samples are reached.

    Where the program fixes its batch size, batches are cut to it.

    Raises:
        UsageError: the data is empty or does not fit the program.
    """
    done = 0
    for batch in _runs(program, data):
        inputs = tuple(program.bind(_cut(program, batch, samples - done), {}))
        yield inputs
        done += _rows(inputs)
        if done >= samples:
            return
    if not done:
        raise UsageError(
            "the calibration data holds no sample that fits the program's inputs "
            f"({'; '.join(map(str, program.inputs))}); give at least one whole batch"
        )


def calibration_data(
    data: DataSource | None, owner: str, samples: int | None = None
) -> DataSource:
    """The data, where there is enough of it; nothing but its first batch is read.

    Args:
        data: what the user gave.
        owner: the pass that asks, for the message.
        samples: how many samples the user asked for; None for whatever there is.

    Raises:
        UsageError: there is no data, it is empty, or it holds too few samples.
    """
    if data is None:
        raise UsageError(
            f"{owner} calibrates activation ranges on data, and there is none; give "
            "calibration data (--data FILE.npz, or Context(data=...))"
        )
    first = next(iter(data), None) if len(data) else None
    if first is None or not _rows(first.inputs):
        raise UsageError(f"{owner}: the calibration data is empty; give at least one sample")
    # Batches after the first are not larger, so that this is the most that there can be.
    most = len(data) * _rows(first.inputs)
    if samples is not None and most < samples:
        raise too_few(owner, most, samples)
    return data


def too_few(owner: str, there: int, samples: int) -> UsageError:
    """The error for data that holds fewer samples than were asked for."""
    return UsageError(
        f"{owner}: samples={samples} were asked for, but the calibration data holds at most "
        f"{there}; give more data, or samples={there}"
    )


class _Shown:
    """Shows values to their observers; refuses those that have no range."""

    def __init__(self, observers: Mapping[fx.Node, Observer]) -> None:
        self.observers = observers
        self.batch = 0

    def __call__(self, node: fx.Node, value: Any) -> None:
        """Let the node's observer see its value."""
        seen = self.observers[node]
        layer = layer_name(node)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise PassError(f"{layer}: only float tensors have a range to calibrate")
        if not value.numel():
            return
        least, most = bounds(value)
        if not (least >= -_MOST and most <= _MOST):
            raise PassError(
                f"{layer} ({node.name}) computes NaN, infinity or more than float32 holds on "
                f"calibration batch {self.batch}; repair data or model, or exclude the layer"
            )
        if isinstance(seen, Histogram):
            seen.take(value, least, most)
        elif isinstance(seen, MinMax):
            seen.widen(least, most)
        else:
            seen.update(value)


def layer_name(node: fx.Node) -> str:
    """What errors and remarks call a node: the path of its module, or its own name."""
    return module_path(node) or node.name


def _runs(program: Program, data: DataSource) -> Iterator[tuple[torch.Tensor, ...]]:
    """The inputs of each run: the batches, cut where the program fixes its batch size."""
    fixed = _fixed_batch(program)
    for batch in data:
        rows = _rows(batch.inputs)
        if fixed is None or rows == fixed or len(batch.inputs) != len(program.inputs):
            yield batch.inputs
            continue
        for start in range(0, rows - fixed + 1, fixed):
            yield tuple(
                tensor[start : start + fixed] if tensor.dim() and len(tensor) == rows else tensor
                for tensor in batch.inputs
            )


def _fixed_batch(program: Program) -> int | None:
    sizes = [spec.shape[0] for spec in program.inputs if spec.shape]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _rows(inputs: tuple[torch.Tensor, ...]) -> int:
    return next((len(tensor) for tensor in inputs if tensor.dim()), 1)


def _cut(
    program: Program, inputs: tuple[torch.Tensor, ...], left: int
) -> tuple[torch.Tensor, ...]:
    """At most ``left`` rows of the inputs whose first dimension is dynamic."""
    if _rows(inputs) <= left or _fixed_batch(program) is not None:
        return inputs
    return tuple(
        tensor[:left] if spec.shape and isinstance(spec.shape[0], str) else tensor
        for spec, tensor in zip(program.inputs, inputs, strict=False)
    )

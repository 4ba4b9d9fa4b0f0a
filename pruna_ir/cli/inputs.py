"""What several subcommands read from their arguments: the pipeline, the model and its data."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pruna_ir.data import TensorData, load_data
from pruna_ir.errors import CaptureError, UsageError
from pruna_ir.pipeline import Pipeline
from pruna_ir.presets import preset
from pruna_ir.program import Program
from pruna_ir.sources import Request, parse_dynamic, parse_shapes
from pruna_ir.stimuli import random_inputs
from pruna_ir.transform import Effect

SYNTHETIC_SAMPLES = 8
"""Few: no number of random inputs makes ranges true, and users wait for it."""


def chosen_pipeline(args: argparse.Namespace) -> Pipeline:
    """The pipeline of ``-p`` or ``--preset``; empty where neither is given."""
    return Pipeline.parse(preset(args.preset).pipeline if args.preset else args.pipeline)


def request(args: argparse.Namespace) -> Request:
    """How the model is to be loaded."""
    return Request(
        weights=args.weights,
        seed=args.seed,
        shapes=parse_shapes(args.input_shape),
        dynamic=parse_dynamic(args.dynamic),
        dynamic_batch=not args.static_batch,
    )


def read_data(path: Path | None, program: Program, batch_size: int) -> TensorData | None:
    """The data of a file, which must fit the program's inputs.

    Raises:
        CaptureError: the file cannot be read, or its arrays do not fit.
    """
    if path is None:
        return None
    data = load_data(path, tuple(spec.name for spec in program.inputs), batch_size)
    static = program.inputs[0].shape[:1]
    if static and isinstance(static[0], int):
        data = TensorData(data.inputs, data.labels, static[0])
    try:
        program.bind(next(iter(data)).inputs, {})
    except UsageError as error:
        raise CaptureError(f"{path}: {error}") from error
    return data


def needs_data(pipeline: Pipeline) -> bool:
    """Whether a pass approximates or fits, and so must know what real inputs look like."""
    return any(pass_.effect in (Effect.BOUNDED, Effect.FITTED) for pass_ in pipeline.passes())


def calibration(program: Program, seed: int) -> TensorData:
    """Random inputs in place of calibration data: normal values, or integers in range."""
    batch = max(1, program.examples[0].shape[0] if program.examples[0].dim() else 1)
    runs = max(1, SYNTHETIC_SAMPLES // batch)
    drawn = [random_inputs(program, seed=seed + run) for run in range(runs)]
    joined = tuple(torch.cat([inputs[i] for inputs in drawn]) for i in range(len(drawn[0])))
    return TensorData(joined, batch_size=batch)

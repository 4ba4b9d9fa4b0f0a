"""``pruna-opt verify``: an artifact against a program, or against another artifact.

Against a program, the tolerance comes from the program's own noise (see `pruna_ir.certify`).
Between two artifacts there is no exact truth; the tolerance comes from the second's own noise, how
its outputs change when its float inputs do a little:

    float:      inputs scaled by 1 + 1e-7;
                e(first, second) <= FLOAT_FACTOR * max(e(second noisy, second), FLOOR_EPS * eps)
    quantised:  uniform noise of +-INPUT_STEPS of an 8-bit step over the range, a few times;
                SQNR(first, second) >= min SQNR(second noisy, second) - MARGIN_DB

The second rule holds where either is quantised; with integer inputs alone it says nothing, and the
verdict is NOT_RUN. Artifacts quantised on different grids differ by design: compare each with its
own program.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pruna_ir.build import Artifact, open_artifact
from pruna_ir.certify import (
    FLOAT_FACTOR,
    FLOOR_EPS,
    LOWEST_SQNR_DB,
    NOISY_RUNS,
    Certificate,
    certify,
    not_run,
)
from pruna_ir.cli.console import Console
from pruna_ir.cli.exit_codes import NOT_VERIFIED
from pruna_ir.cli.inputs import read_data
from pruna_ir.data import load_data
from pruna_ir.equivalence import relative_error, sqnr_db
from pruna_ir.errors import ToolchainError, UsageError
from pruna_ir.low_precision import COMPUTES_IN
from pruna_ir.lowering import LoadOptions, Runner, Verdict
from pruna_ir.program import Program
from pruna_ir.registry import find_backend
from pruna_ir.serialize import load_program

QUANTISED = "quantized-for"
SCALED = 1 + 1e-7
INPUT_STEPS = 1 / 32
MARGIN_DB = 6.0
OPEN = 2
"""The size of a dynamic dimension whose example is not known."""

Arrays = list[np.ndarray[Any, Any]]


def execute(args: argparse.Namespace, out: Console) -> int:
    """Compare; 0 where they agree, 1 where not, 8 where that is unknown and was required."""
    artifact = open_artifact(args.artifact)
    if args.reference.is_dir():
        return _show(_against_artifact(artifact, open_artifact(args.reference), args), args, out)
    program = load_program(args.reference)
    if artifact.manifest.program_hash != program.hash():
        out.warn(
            f"{args.artifact} was built from program {artifact.manifest.program_hash}, not from "
            f"{args.reference} ({program.hash()})"
        )
    certificate = _against_program(artifact, program, args)
    found = _Outcome(
        certificate.verdict,
        certificate.summary(),
        [str(comparison) for comparison in certificate.comparisons],
    )
    return _show(found, args, out)


@dataclass(frozen=True)
class _Outcome:
    verdict: Verdict
    summary: str
    comparisons: list[str]


def _show(found: _Outcome, args: argparse.Namespace, out: Console) -> int:
    code = {Verdict.PASSED: 0, Verdict.FAILED: 1, Verdict.NOT_RUN: 0}[found.verdict]
    if found.verdict is Verdict.NOT_RUN and args.require_verified:
        code = NOT_VERIFIED
    if out.as_json:
        out.json(
            {
                "verdict": found.verdict.value,
                "summary": found.summary,
                "comparisons": found.comparisons,
                "exit_code": code,
            }
        )
        return code
    for line in found.comparisons:
        out.data(line)
    out.data(found.summary)
    return code


# -- against a program --------------------------------------------------------------------------


def _against_program(
    artifact: Artifact, program: Program, args: argparse.Namespace
) -> Certificate:
    described = artifact.manifest.inputs
    if [d["name"] for d in described] != [spec.name for spec in program.inputs]:
        raise UsageError(
            f"{artifact.folder} takes {', '.join(d['name'] for d in described)}, but the program "
            f"takes {', '.join(map(str, program.inputs))}; give the program that it was made from"
        )
    fixed = {
        name: taken
        for spec, entry in zip(program.inputs, described, strict=True)
        for name, taken in zip(spec.shape, entry["shape"], strict=False)
        if isinstance(name, str) and isinstance(taken, int)
    }
    data = read_data(args.data, program, args.batch_size)
    try:
        runner = artifact.load(LoadOptions())
    except ToolchainError as error:
        return _intermediate(artifact, program, str(error), fixed, args)
    return certify(program, runner, data=data, seed=args.seed, fixed=fixed)


def _intermediate(
    artifact: Artifact,
    program: Program,
    reason: str,
    fixed: Mapping[str, int],
    args: argparse.Namespace,
) -> Certificate:
    """What can be said of an artifact that does not run here: about the file it was built from."""
    backend = find_backend(artifact.manifest.backend)
    load = getattr(backend, "load_intermediate", None)
    runner: Runner | None = load(artifact.folder, LoadOptions()) if load is not None else None
    if runner is None:
        return not_run(program, reason, seed=args.seed)
    found = certify(program, runner, seed=args.seed, level="intermediate", fixed=fixed)
    if found.verdict is not Verdict.PASSED:
        return found
    text = f"{reason}; the file that it was built from was verified: {found.worst()}"
    return not_run(program, text, seed=args.seed)


# -- against another artifact -------------------------------------------------------------------


def _against_artifact(
    first: Artifact, second: Artifact, args: argparse.Namespace
) -> _Outcome:
    _check_alike(first, second)
    try:
        runners = first.load(LoadOptions()), second.load(LoadOptions())
    except ToolchainError as error:
        return _Outcome(Verdict.NOT_RUN, f"NOT_RUN({error})", [])
    inputs = _data_inputs(args, first, second) or _drawn_inputs(first, second, args.seed)
    quantised = QUANTISED in {**first.manifest.attributes, **second.manifest.attributes}
    if COMPUTES_IN in {**first.manifest.attributes, **second.manifest.attributes}:
        return _Outcome(Verdict.NOT_RUN, f"NOT_RUN({_LOW_PRECISION})", [])
    if quantised and all(x.dtype.kind != "f" for x in inputs):
        return _Outcome(Verdict.NOT_RUN, f"NOT_RUN({_NO_NOISE})", [])
    perturbed = [_noisy(inputs, args.seed + i) for i in range(NOISY_RUNS)]
    noise = [runners[1].run(x) for x in (perturbed if quantised else [_scaled(inputs)])]
    a, b = runners[0].run(inputs), runners[1].run(inputs)
    judge = _judge_quantised if quantised else _judge_float
    names = [spec["name"] for spec in second.manifest.outputs]
    others = [[run[i] for run in noise] for i in range(len(names))]
    rows = [judge(*row) for row in zip(names, a, b, others, strict=True)]
    passed = all(ok for ok, _ in rows)
    verdict = Verdict.PASSED if passed else Verdict.FAILED
    return _Outcome(verdict, verdict.value, [text for _, text in rows])


_NO_NOISE = (
    "with integer inputs alone, no tolerance can be derived for quantised artifacts; compare each "
    "with its own program"
)

_LOW_PRECISION = (
    "noise of the inputs gives no tolerance for artifacts that compute in bfloat16 or float16; "
    "compare each with its own program"
)


def _scaled(inputs: Arrays) -> Arrays:
    return [x * x.dtype.type(SCALED) if x.dtype.kind == "f" else x for x in inputs]


def _noisy(inputs: Arrays, seed: int) -> Arrays:
    """Float inputs with uniform noise of a fraction of an 8-bit step over their range."""
    generator = np.random.default_rng(seed)

    def noisy(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if x.dtype.kind != "f" or not x.size:
            return x
        step = float(x.max() - x.min()) / 255 * INPUT_STEPS
        shifted: np.ndarray[Any, Any] = x + generator.uniform(-step, step, x.shape)
        return shifted.astype(x.dtype)

    return [noisy(x) for x in inputs]


def _check_alike(first: Artifact, second: Artifact) -> None:
    for kind in ("inputs", "outputs"):
        a, b = (
            [(spec["name"], spec["dtype"], len(spec["shape"])) for spec in getattr(m, kind)]
            for m in (first.manifest, second.manifest)
        )
        if a != b:
            raise UsageError(
                f"{first.folder} and {second.folder} differ in their {kind} and cannot be "
                f"compared: {_names(a)} and {_names(b)}"
            )


def _names(specs: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{name}: {dtype} of {rank} dimensions" for name, dtype, rank in specs)


def _data_inputs(args: argparse.Namespace, first: Artifact, second: Artifact) -> Arrays | None:
    if args.data is None:
        return None
    names = tuple(spec["name"] for spec in first.manifest.inputs)
    sizes = _sizes(first, second)
    batch = load_data(args.data, names, args.batch_size)
    taken = next(iter(batch)).inputs
    shape = first.manifest.inputs[0]["shape"]
    rows = sizes[0][0] if shape and not isinstance(shape[0], str) else len(taken[0])
    return [np.ascontiguousarray(value[:rows].numpy()) for value in taken]


def _sizes(first: Artifact, second: Artifact) -> list[list[int]]:
    """A shape for every input that both artifacts take."""
    found = []
    for a, b in zip(first.manifest.inputs, second.manifest.inputs, strict=True):
        example = a.get("example") or [OPEN] * len(a["shape"])
        sizes = []
        for x, y, open_size in zip(a["shape"], b["shape"], example, strict=True):
            fixed = {s for s in (x, y) if isinstance(s, int)}
            if len(fixed) > 1:
                raise UsageError(
                    f"input {a['name']} is {a['shape']} in one and {b['shape']} in the other"
                )
            sizes.append(fixed.pop() if fixed else int(open_size))
        found.append(sizes)
    return found


def _drawn_inputs(first: Artifact, second: Artifact, seed: int) -> Arrays:
    """Normal values, and integers in the range that the manifest states."""
    generator = np.random.default_rng(seed)
    drawn: Arrays = []
    for spec, shape in zip(first.manifest.inputs, _sizes(first, second), strict=True):
        dtype = np.dtype(spec["dtype"])
        if dtype.kind == "f":
            drawn.append(generator.standard_normal(shape).astype(dtype))
        else:
            low, high = spec.get("range", (0, 1))
            drawn.append(generator.integers(low, high + 1, shape).astype(dtype))
    return drawn


def _judge_float(
    name: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], noisy: Arrays
) -> tuple[bool, str]:
    first, second, *others = _tensors(a, b, *noisy)
    if not second.dtype.is_floating_point:
        return _judge_exact(name, first, second)
    eps = torch.finfo(second.dtype).eps
    limit = FLOAT_FACTOR * max(max(relative_error(o, second) for o in others), FLOOR_EPS * eps)
    measured = relative_error(first, second)
    return measured <= limit, f"output {name}: relative error {measured:.3g} (<= {limit:.3g})"


def _judge_quantised(
    name: str, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], noisy: Arrays
) -> tuple[bool, str]:
    first, second, *others = _tensors(a, b, *noisy)
    if not second.dtype.is_floating_point:
        return _judge_exact(name, first, second)
    eps = torch.finfo(second.dtype).eps
    ceiling = -20 * math.log10(FLOAT_FACTOR * FLOOR_EPS * eps)
    limit = max(min([*(sqnr_db(o, second) for o in others), ceiling]) - MARGIN_DB, LOWEST_SQNR_DB)
    measured = sqnr_db(first, second)
    return measured >= limit, f"output {name}: SQNR {measured:.3g} dB (>= {limit:.3g})"


def _judge_exact(name: str, first: torch.Tensor, second: torch.Tensor) -> tuple[bool, str]:
    same = first.shape == second.shape and bool((first == second).all())
    return same, f"output {name}: {'equal' if same else 'different'} integers"


def _tensors(*arrays: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]

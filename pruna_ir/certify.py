"""Certificates: an artifact's outputs compared with its program's, and what may differ.

The truth is the program lifted to float64. A fixed tolerance would be wrong twice, too strict for
a deep net and too lax for a shallow one, so the program's own noise on the same inputs sets it:

    float programs:      e(artifact) <= FLOAT_FACTOR * max(e(program in float32), FLOOR_EPS * eps)
                         with e(y) = max|y - truth| / max|truth|
    quantised programs:  SQNR(artifact) >= min over runs of SQNR(noisy program) - MARGIN_DB
    bfloat16, float16:   the same with SQNR(program rounded at random)

A quantised program is a staircase: implementations that differ in the last bit before a rounding
differ by a whole step after it, and later layers spread that. The noisy program is the program
with uniform noise of +-NOISE_STEPS quantisation steps before each rounding: the freedom of a right
implementation, whose int32 biases and float requantisation miss the exact value by a fraction
of a step. A program that computes in bfloat16 or float16 has no last bit in common with another
implementation either: its noise is that of rounding each result to either neighbour (see
`low_precision`). Inputs are real data where there is some, since outside the calibrated range a
quantised program promises nothing.

Integer and bool outputs must be equal, unless the program's own noise changes them. A comparison
whose limit would be too wide to mean anything (`WIDEST_LIMIT`, `LOWEST_SQNR_DB`) is inconclusive,
and an output without any conclusive comparison makes the verdict ``NOT_RUN``. NaN fails.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruna_ir.calibration import runs
from pruna_ir.data import DataSource
from pruna_ir.equivalence import relative_error, run_float64, run_native, sqnr_db
from pruna_ir.errors import LoweringError
from pruna_ir.low_precision import LOW, computes_low, run_rounded
from pruna_ir.lowering import CERTIFICATE, KernelRow, Runner, Verdict
from pruna_ir.noise import NOISE_STEPS, is_fake_quant, run_noisy
from pruna_ir.program import Program, computed_nodes
from pruna_ir.reexport import resized
from pruna_ir.stimuli import Stimulus, stimuli

FLOAT_FACTOR = 16.0
"""How far beyond eager float32's own error an artifact may be off."""
FLOOR_EPS = 4.0
"""The least error, in units of eps, that counts as eager's own."""
WIDEST_LIMIT = 1e-2
"""A float limit above this proves nothing: the program is too ill-conditioned on that input."""

NOISY_RUNS = 3
"""Noisy runs per stimulus; the worst one is the floor."""
ROUNDED_RUNS = 6
"""The same for low precision, where outputs of a few elements vary more from run to run."""
MARGIN_DB = 3.0
"""How far below the floor an artifact may lie: 1.4 times the floor's noise amplitude."""
LOWEST_SQNR_DB = 3.0
"""A limit below this proves nothing: an output of nothing but zeros has 0 dB."""

ODD_BATCHES = (1, 3)


@dataclass(frozen=True)
class Comparison:
    """One output on one stimulus.

    Attributes:
        output: the output's name.
        stimulus: the stimulus's kind.
        sizes: the shapes of the inputs.
        metric: ``relative error`` (at most ``limit``), ``sqnr dB`` (at least ``limit``) or
            ``differing elements`` (at most ``limit``).
        measured: the figure of the artifact.
        reference: the same figure of the program's own noise.
        limit: the tolerance that follows from it.
        outcome: ``passed``, ``failed`` or ``inconclusive``.
    """

    output: str
    stimulus: str
    sizes: tuple[tuple[int, ...], ...]
    metric: str
    measured: float
    reference: float
    limit: float
    outcome: str

    def __str__(self) -> str:
        sign = ">=" if self.metric == "sqnr dB" else "<="
        return (
            f"output {self.output} on '{self.stimulus}': {self.metric} {self.measured:.3g} "
            f"(must be {sign} {self.limit:.3g}): {self.outcome}"
        )


@dataclass(frozen=True)
class Certificate:
    """What was compared, on what, how far off it was, and the verdict.

    Attributes:
        verdict: ``PASSED``, ``FAILED`` or ``NOT_RUN``.
        reason: why it failed or was not run; empty where it passed.
        level: what was executed: ``executed`` (the artifact), ``intermediate`` (the file that it
            was built from), ``built`` (nothing).
        rule: how the tolerance was derived, in words.
        comparisons: every output on every stimulus.
        seed: the seed of the stimuli and of the noise.
        program_hash: the program that the artifact was compared with.
        versions: the tools that ran the comparison.
        audit: what the runtime says that it executes, layer by layer.
    """

    verdict: Verdict
    reason: str
    level: str
    rule: str
    comparisons: tuple[Comparison, ...]
    seed: int
    program_hash: str
    versions: Mapping[str, str]
    audit: tuple[KernelRow, ...] = ()

    def worst(self) -> Comparison | None:
        """The conclusive comparison closest to, or furthest beyond, its limit."""
        found = [c for c in self.comparisons if c.outcome != "inconclusive"]
        return max(found, key=_strain, default=None)

    def audit_summary(self) -> dict[str, dict[str, int]]:
        """For each kind of layer, how many the runtime executes in each precision."""
        return audit_summary(self.audit)

    def summary(self) -> str:
        """The verdict in one line, with its figure or its reason."""
        worst = self.worst()
        if self.verdict is Verdict.NOT_RUN:
            return f"NOT_RUN({self.reason})"
        level = "" if self.level == "executed" else f" ({self.level})"
        return f"{self.verdict.value}{level}: {worst or 'nothing to compare'}"

    def to_json(self) -> dict[str, Any]:
        """A plain value for ``certificate.json``; infinities become strings."""
        plain = asdict(self) | {
            "verdict": self.verdict.value,
            "summary": self.summary(),
            "audit_summary": self.audit_summary(),
        }
        result: dict[str, Any] = _plain(plain)
        return result

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Certificate:
        """The inverse of `to_json`."""
        fields = {k: v for k, v in value.items() if k not in ("summary", "audit_summary")}
        fields["verdict"] = Verdict(fields["verdict"])
        fields["comparisons"] = tuple(map(_comparison, fields["comparisons"]))
        fields["audit"] = tuple(KernelRow(**row) for row in fields["audit"])
        return Certificate(**fields)

    @staticmethod
    def read(folder: Path) -> Certificate:
        """The certificate of an artifact.

        Raises:
            LoweringError: the folder holds no readable certificate.
        """
        path = folder / CERTIFICATE
        try:
            return Certificate.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LoweringError(f"{path} is not a certificate: {error}") from error


def _comparison(value: Mapping[str, Any]) -> Comparison:
    sizes = tuple(tuple(shape) for shape in value["sizes"])
    numbers = {key: float(value[key]) for key in ("measured", "reference", "limit")}
    return Comparison(**{**value, **numbers, "sizes": sizes})


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _strain(comparison: Comparison) -> float:
    """How much of its tolerance a comparison uses; above 1 where it failed."""
    if comparison.metric == "sqnr dB":
        return float(10 ** min((comparison.limit - comparison.measured) / 20, 300.0))
    if comparison.limit == 0:
        return math.inf if comparison.measured else 0.0
    return comparison.measured / comparison.limit


def audit_summary(rows: Iterable[KernelRow]) -> dict[str, dict[str, int]]:
    """For each kind of layer, how many are executed in each precision.

    >>> audit_summary([KernelRow("a", "conv", "int8"), KernelRow("b", "conv", "float32")])
    {'conv': {'int8': 1, 'float32': 1}}
    """
    kinds: dict[str, Counter[str]] = {}
    for row in rows:
        kinds.setdefault(row.kind, Counter())[row.precision] += 1
    return {kind: dict(counts) for kind, counts in kinds.items()}


def not_run(program: Program, reason: str, *, seed: int = 0) -> Certificate:
    """A certificate that states that nothing was compared, and why."""
    return Certificate(
        Verdict.NOT_RUN, reason, "built", "", (), seed, program.hash(), versions(), ()
    )


def certify(
    program: Program,
    runner: Runner,
    *,
    data: DataSource | None = None,
    seed: int = 0,
    level: str = "executed",
    fixed: Mapping[str, int] | None = None,
) -> Certificate:
    """Compare a loaded artifact with its program.

    Args:
        program: what the artifact was lowered from.
        runner: the loaded artifact.
        data: real inputs; the first batch is used.
        seed: of the stimuli and of the noise.
        level: what ``runner`` executes (see `Certificate`).
        fixed: sizes of dynamic dimensions that the artifact takes only.

    An exception of the runner is not caught: an artifact that cannot run has no certificate.
    """
    quantised = is_quantised(program)
    judge, rule = _judgement(program, quantised=quantised)
    comparisons: list[Comparison] = []
    for stimulus in _stimuli(program, data, seed, fixed or {}, quantised=quantised):
        truth = run_float64(program, stimulus.inputs)
        actual = runner.run([value.numpy() for value in stimulus.inputs])
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in actual]
        comparisons += judge(program, stimulus, truth, tensors, seed)
    verdict, reason = _verdict(program, comparisons)
    return Certificate(
        verdict,
        reason,
        level,
        rule,
        tuple(comparisons),
        seed,
        program.hash(),
        versions(),
        tuple(runner.audit()),
    )


_FLOAT_RULE = (
    f"relative to max|program in float64|: at most {FLOAT_FACTOR:g} times the error of the "
    f"program run by torch at its own precision (counted as at least {FLOOR_EPS:g} eps)"
)
_QUANTISED_RULE = (
    f"SQNR against the program in float64: at least that of the program with uniform noise of "
    f"+-{NOISE_STEPS:g} steps before each rounding (worst of {NOISY_RUNS}), less {MARGIN_DB:g} dB"
)
_LOW_RULE = (
    "SQNR against the program in float64: at least that of the program with each result in "
    f"bfloat16 or float16 rounded to either neighbour at random (worst of {ROUNDED_RUNS}), less "
    f"{MARGIN_DB:g} dB"
)

_Noise = Callable[..., tuple[torch.Tensor, ...]]
_Judge = Callable[
    [Program, Stimulus, Sequence[torch.Tensor], Sequence[torch.Tensor], int], list[Comparison]
]


def _judgement(program: Program, *, quantised: bool) -> tuple[_Judge, str]:
    """How a program's artifacts are judged, and the rule in words."""
    if quantised:
        return partial(_judge_noisy, run_noisy, NOISY_RUNS), _QUANTISED_RULE
    if computes_low(program):
        return partial(_judge_noisy, run_rounded, ROUNDED_RUNS), _LOW_RULE
    return _judge_float, _FLOAT_RULE


def versions() -> dict[str, str]:
    """The tools that a comparison runs on."""
    from pruna_ir import __version__

    return {
        "pruna-ir": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def is_quantised(program: Program) -> bool:
    """Whether the program rounds what it computes to integer grids.

    A program that rounds weights only is no staircase: it is judged like any float program.
    """
    return any(is_fake_quant(node) for node in computed_nodes(program))


# -- stimuli -----------------------------------------------------------------------------------


def _stimuli(
    program: Program,
    data: DataSource | None,
    seed: int,
    fixed: Mapping[str, int],
    *,
    quantised: bool,
) -> list[Stimulus]:
    """Every stimulus, at sizes that the artifact takes, one for each kind and size.

    Quantised programs get real data only (the example, where there is none) at its own size and
    at odd batch sizes.
    """
    found = [] if data is None else [Stimulus("data", next(runs(program, data)))]
    drawn = stimuli(program, seed=seed)
    if quantised:
        found = found or [s for s in drawn if s.kind == "example"]
        found += [_at_sizes(program, found[0], sizes) for sizes in _odd_sizes(program)]
    else:
        found += drawn
    unique: dict[Any, Stimulus] = {}
    for stimulus in found:
        sized = _at_sizes(program, stimulus, fixed) if fixed else stimulus
        shapes = tuple(tuple(t.shape) for t in sized.inputs)
        unique.setdefault((sized.kind, shapes), sized)
    return list(unique.values())


def _odd_sizes(program: Program) -> list[dict[str, int]]:
    """Batch sizes 1 and 3, where the batch is dynamic and takes them."""
    bounds = program.dims.get("batch")
    if bounds is None:
        return []
    upper = bounds.upper or max(ODD_BATCHES)
    return [{"batch": n} for n in ODD_BATCHES if bounds.lower <= n <= upper]


def _at_sizes(program: Program, stimulus: Stimulus, sizes: Mapping[str, int]) -> Stimulus:
    inputs = tuple(
        resized(value, spec, sizes)
        for value, spec in zip(stimulus.inputs, program.inputs, strict=True)
    )
    return replace(stimulus, inputs=inputs)


# -- judging -----------------------------------------------------------------------------------


def _judge_float(
    program: Program,
    stimulus: Stimulus,
    truth: Sequence[torch.Tensor],
    actual: Sequence[torch.Tensor],
    _seed: int,
) -> list[Comparison]:
    native = run_native(program, stimulus.inputs)
    found: list[Comparison] = []
    for position, reference in enumerate(truth):
        own, got = native[position], _at(actual, position)
        if not reference.dtype.is_floating_point:
            found.append(_judge_exact(program, stimulus, position, reference, got, [own]))
            continue
        error = relative_error(own, reference)
        limit = FLOAT_FACTOR * max(error, FLOOR_EPS * torch.finfo(own.dtype).eps)
        measured = math.inf if got is None else relative_error(_alike(got, own), reference)
        outcome = "passed" if measured <= limit else "failed"
        if outcome == "passed" and not bool(reference.any()):
            # Nothing but zeros, as from a head that was initialised so: agreement proves nothing.
            outcome = "inconclusive"
        if not limit <= WIDEST_LIMIT:
            # Too wide to prove anything, but NaN and wrong shapes are wrong under any limit.
            outcome = "failed" if math.isinf(measured) > math.isinf(error) else "inconclusive"
        found.append(
            _compared(program, stimulus, position, "relative error", (measured, error, limit),
                      outcome)
        )  # fmt: skip
    return found


def _judge_noisy(
    noise: _Noise,
    runs: int,
    program: Program,
    stimulus: Stimulus,
    truth: Sequence[torch.Tensor],
    actual: Sequence[torch.Tensor],
    seed: int,
) -> list[Comparison]:
    noisy = [noise(program, stimulus.inputs, seed=seed + run) for run in range(runs)]
    found: list[Comparison] = []
    for position, reference in enumerate(truth):
        got = _at(actual, position)
        own = [outputs[position] for outputs in noisy]
        if not reference.dtype.is_floating_point:
            found.append(_judge_exact(program, stimulus, position, reference, got, own))
            continue
        dtype = program.outputs[position].dtype
        floor = min(sqnr_db(value, reference) for value in own)
        # Outputs in a low precision are rounded with the rest: their noise is in the floor.
        eps = torch.finfo(torch.float32 if dtype in LOW else dtype).eps
        ceiling = -20 * math.log10(FLOAT_FACTOR * FLOOR_EPS * eps)
        limit = min(floor, ceiling) - MARGIN_DB
        measured = _sqnr(got, reference, dtype)
        outcome = "passed" if measured >= limit else "failed"
        if outcome == "passed" and not bool(reference.any()):
            outcome = "inconclusive"
        if limit < LOWEST_SQNR_DB:
            # Too low to prove anything, but NaN and wrong shapes are wrong under any limit.
            outcome = "failed" if math.isinf(measured) > math.isinf(floor) else "inconclusive"
        found.append(
            _compared(program, stimulus, position, "sqnr dB", (measured, floor, limit), outcome)
        )
    return found


def _sqnr(got: torch.Tensor | None, reference: torch.Tensor, dtype: torch.dtype) -> float:
    if got is None or got.dtype != dtype:
        return -math.inf
    return sqnr_db(got, reference)


def _judge_exact(
    program: Program,
    stimulus: Stimulus,
    position: int,
    reference: torch.Tensor,
    actual: torch.Tensor | None,
    own: Sequence[torch.Tensor],
) -> Comparison:
    noise = max(float((value != reference).sum()) for value in own)
    alike = (
        actual is not None
        and actual.shape == reference.shape
        and actual.dtype == program.outputs[position].dtype
    )
    measured = float((actual != reference).sum()) if alike and actual is not None else math.inf
    outcome = "passed" if measured == 0 else "inconclusive" if noise and alike else "failed"
    return _compared(
        program, stimulus, position, "differing elements", (measured, noise, 0.0), outcome
    )


def _compared(
    program: Program,
    stimulus: Stimulus,
    position: int,
    metric: str,
    figures: tuple[float, float, float],
    outcome: str,
) -> Comparison:
    sizes = tuple(tuple(value.shape) for value in stimulus.inputs)
    name = program.outputs[position].name
    return Comparison(name, stimulus.kind, sizes, metric, *figures, outcome)


def _at(actual: Sequence[torch.Tensor], position: int) -> torch.Tensor | None:
    return actual[position] if position < len(actual) else None


def _alike(actual: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The artifact's output; an empty tensor, which equals nothing, where its dtype is wrong."""
    return actual if actual.dtype == own.dtype else actual.new_empty((0, 0, 0, 0, 0, 0, 0))


def _verdict(program: Program, comparisons: Sequence[Comparison]) -> tuple[Verdict, str]:
    failed = [c for c in comparisons if c.outcome == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return Verdict.FAILED, f"{max(failed, key=_strain)}{more}"
    # Zeros in, often zeros out: agreement there proves nothing.
    proven = {
        c.output for c in comparisons if c.outcome == "passed" and c.stimulus != "zeros"
    }
    for spec in program.outputs:
        if spec.name not in proven:
            return Verdict.NOT_RUN, (
                f"output {spec.name} could not be judged: on every stimulus it is all zeros or "
                "the program's own noise is too large; give data that it was made for, and weights"
            )
    return Verdict.PASSED, ""

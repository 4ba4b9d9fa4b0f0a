"""The check that belongs to each effect: a pass's promise, tested on its own result.

    EXACT     outputs bit-identical at the program's own precision
    ROUNDING  lifted to float64: relative difference <= 1e-9; at working precision: the error
              against float64 stays within a factor of the reference's own
    BOUNDED   signal-to-quantisation-noise ratio of every output >= the pass's budget, and every
              test that the pass stated besides (`Assurance`) holds
    ORACLE    lifted to float64, equal to the oracle that the pass stated, <= 1e-9
    FITTED    every test that the pass stated (`Assurance`) holds on the calibration data

ROUNDING and ORACLE set a drawn stimulus aside where the program itself is unstable, and say so
(see `conditioning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pruna_ir.calibration import runs
from pruna_ir.conditioning import Comparison, place
from pruna_ir.equivalence import (
    LIFTED_TOLERANCE,
    ROUNDING_FACTOR,
    GateRecorder,
    Gates,
    differences,
    run_float64,
    run_native,
    sqnr_db,
)
from pruna_ir.errors import VerificationError
from pruna_ir.program import Program
from pruna_ir.stimuli import Stimulus, stimuli
from pruna_ir.transform import Assurance, Context, Effect, Finding, Oracle, Pass

ORACLE_TOLERANCE = LIFTED_TOLERANCE


@dataclass(frozen=True)
class CheckReport:
    """The outcome of one effect's check.

    Attributes:
        effect: the promise.
        measured: the worst figure over outputs and stimuli: a relative error, or dB for BOUNDED;
            for FITTED, that of the stated test which is nearest to its limit or furthest above.
            Where a test that a BOUNDED pass stated fails, the figure is that test's.
        limit: what it was compared with.
        where: the stimulus and output of the worst figure, or the name of the stated test.
        passed: the verdict.
        rounding: for ROUNDING: the worst ratio of working-precision errors, new over old.
        gates: the gates of the program before the pass that were seen on one side only.
        stated: whether the figure is that of a test which the pass stated.
        notes: which stimuli were set aside, and why; or why a difference may say little.
    """

    effect: Effect
    measured: float
    limit: float
    where: str
    passed: bool
    rounding: float = 0.0
    gates: Gates = field(default_factory=Gates)
    notes: tuple[str, ...] = ()
    stated: bool = False

    def __str__(self) -> str:
        in_db = self.effect is Effect.BOUNDED and not self.stated
        unit, sign = (" dB", ">=") if in_db else ("", "<=")
        verdict = "holds" if self.passed else "does not hold"
        return (
            f"{self.effect.value} {verdict}: {self.measured:.3g}{unit} "
            f"(must be {sign} {self.limit:.3g}{unit}) on {self.where}"
            + "".join(f"; {note}" for note in self.notes)
        )


def check(
    pass_: Pass,
    before: Program,
    after: Program,
    oracle: Oracle | None = None,
    context: Context | None = None,
    exact: Mapping[str, torch.Tensor] | None = None,
    assurances: Sequence[Assurance] = (),
) -> CheckReport:
    """Test a pass's promise on the program before and after it.

    ``exact`` is `PassResult.exact`: the unrounded values of the tensors that the pass computed;
    ``assurances`` is `PassResult.assurances`: the tests that a FITTED or BOUNDED pass stated.

    With data in the context, its first batch is a stimulus as well, and for BOUNDED passes the
    only one: a quantised program promises nothing outside the range that it was calibrated for.

    Raises:
        VerificationError: an ORACLE pass stated no oracle, or a FITTED pass no test.
    """
    context = context or Context()
    if pass_.effect in (Effect.FITTED, Effect.BOUNDED):
        found = [f for assurance in assurances for f in assurance(before, after, context)]
        if pass_.effect is Effect.FITTED:
            return _fitted(pass_, found)
        if not all(f.measured <= f.limit for f in found):
            return replace(_fitted(pass_, found), effect=Effect.BOUNDED)
    inputs = _inputs(pass_.effect, before, context)
    if pass_.effect is Effect.EXACT:
        return _exact(before, after, inputs)
    if pass_.effect is Effect.ROUNDING:
        return _rounding(before, after, inputs, exact)
    if pass_.effect is Effect.BOUNDED:
        return _bounded(before, after, inputs, pass_.min_sqnr_db)
    if oracle is None:
        raise VerificationError(f"{pass_.name} did not state what the program now computes")
    return _oracle(before, after, inputs, oracle)


def _inputs(effect: Effect, program: Program, context: Context) -> list[Stimulus]:
    found = stimuli(program, seed=context.seed)
    if context.data is not None:
        data = Stimulus("data", next(runs(program, context.data)))
        return [data] if effect is Effect.BOUNDED else [*found, data]
    return [s for s in found if s.kind == "example"] if effect is Effect.BOUNDED else found


def _worst(
    candidates: Sequence[tuple[float, str]], *, smallest: bool = False
) -> tuple[float, str]:
    if not candidates:
        return (math.inf if smallest else 0.0), "no stimulus"
    key = min if smallest else max
    return key(candidates, key=lambda pair: pair[0])


def _exact(before: Program, after: Program, inputs: list[Stimulus]) -> CheckReport:
    found: list[tuple[float, str]] = []
    for stimulus in inputs:
        old, new = run_native(before, stimulus.inputs), run_native(after, stimulus.inputs)
        for position, (a, b) in enumerate(zip(new, old, strict=True)):
            error = 0.0 if _identical(a, b) else max(next(differences([a], [b])), 5e-324)
            found.append((error, place(stimulus, before, position)))
    measured, where = _worst(found)
    return CheckReport(Effect.EXACT, measured, 0.0, where, measured == 0.0)


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit equal: NaN equals NaN, and -0.0 differs from 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def _rounding(
    before: Program,
    after: Program,
    inputs: list[Stimulus],
    exact: Mapping[str, torch.Tensor] | None,
) -> CheckReport:
    recorder = GateRecorder(before)
    lifted = Comparison(before)
    ratios: list[tuple[float, str]] = []
    for stimulus in inputs:
        truth = run_float64(before, stimulus.inputs, recorder)
        new = run_float64(after, stimulus.inputs, exact=exact)
        old32, new32 = run_native(before, stimulus.inputs), run_native(after, stimulus.inputs)
        for position in lifted.add(stimulus, new, truth):
            ratio = _ratio(old32[position], new32[position], truth[position])
            ratios.append((ratio, place(stimulus, before, position)))
    measured, where = _worst(lifted.found)
    ratio, ratio_where = _worst(ratios)
    if measured <= LIFTED_TOLERANCE and ratio > ROUNDING_FACTOR:
        where = f"{ratio_where} (working precision: error over the reference's own)"
        measured, limit, passed = ratio, ROUNDING_FACTOR, False
    else:
        limit, passed = LIFTED_TOLERANCE, measured <= LIFTED_TOLERANCE
    return CheckReport(
        Effect.ROUNDING, measured, limit, where, passed, ratio, recorder.gates(),
        tuple(lifted.notes),
    )  # fmt: skip


def _ratio(old: torch.Tensor, new: torch.Tensor, truth: torch.Tensor) -> float:
    """The rewrite's error at working precision over the reference's own (at least a few ulps)."""
    if not truth.dtype.is_floating_point:
        return 0.0
    floor = 4 * torch.finfo(old.dtype).eps
    (old_error,), (new_error,) = differences([old], [truth]), differences([new], [truth])
    return new_error / max(old_error, floor)


def _bounded(
    before: Program, after: Program, inputs: list[Stimulus], budget: float
) -> CheckReport:
    found: list[tuple[float, str]] = []
    for stimulus in inputs:
        old, new = run_native(before, stimulus.inputs), run_native(after, stimulus.inputs)
        for position, (a, b) in enumerate(zip(new, old, strict=True)):
            found.append((sqnr_db(a, b), place(stimulus, before, position)))
    measured, where = _worst(found, smallest=True)
    return CheckReport(Effect.BOUNDED, measured, budget, where, measured >= budget)


def _fitted(pass_: Pass, found: Sequence[Finding]) -> CheckReport:
    if not found:
        raise VerificationError(f"{pass_.name} did not state what holds of the result")
    worst = max(found, key=_excess)
    passed = all(f.measured <= f.limit for f in found)
    return CheckReport(
        Effect.FITTED, worst.measured, worst.limit, worst.what, passed, stated=True
    )


def _excess(finding: Finding) -> float:
    """How far a figure is along to its limit; infinite for NaN."""
    if math.isnan(finding.measured):
        return math.inf
    if finding.limit == 0.0:
        return math.inf if finding.measured > 0.0 else 0.0
    return finding.measured / finding.limit


def _oracle(
    before: Program, after: Program, inputs: list[Stimulus], oracle: Oracle
) -> CheckReport:
    recorder = GateRecorder(after)
    lifted = Comparison(before)
    for stimulus in inputs:
        truth = oracle(before, stimulus.inputs)
        lifted.add(stimulus, run_float64(after, stimulus.inputs, recorder), truth)
    measured, where = _worst(lifted.found)
    passed = measured <= ORACLE_TOLERANCE
    return CheckReport(
        Effect.ORACLE, measured, ORACLE_TOLERANCE, where, passed, gates=recorder.gates(),
        notes=tuple(lifted.notes),
    )  # fmt: skip

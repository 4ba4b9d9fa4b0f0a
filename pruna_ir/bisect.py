"""Bisection: from a wrong result to the culprit pass, and from there to the first wrong node.

Every pass has a promise, so the culprit is the first pass whose own check fails: no pass needs a
bisection over sums of allowed errors. Within a pass, both programs run lifted to float64 and
values are matched by node name (rewrites keep the names of nodes they leave alone, and a new
node remembers the name of the one whose value it computes); the first that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pruna_ir.checks import CheckReport
from pruna_ir.equivalence import LIFTED_TOLERANCE, relative_error, run_float64
from pruna_ir.errors import VerificationError
from pruna_ir.instruments import Watch
from pruna_ir.pipeline import Failure, Pipeline, Step
from pruna_ir.printer import print_node
from pruna_ir.program import Program, source_line
from pruna_ir.spec import print_pass
from pruna_ir.stimuli import Stimulus, stimuli
from pruna_ir.transform import COMPUTES, Context, Effect, Oracle


@dataclass(frozen=True)
class Divergence:
    """The first node whose value differs.

    Attributes:
        node: its name in the program after the pass.
        original: the name, before the pass, of the node whose value it should have.
        error: the relative error there.
        text: its IR line.
        source: the user's source line; empty where unknown.
        stimulus: the kind of input that shows it.
    """

    node: str
    original: str
    error: float
    text: str
    source: str
    stimulus: str

    def __str__(self) -> str:
        where = f"\n  model source: {self.source}" if self.source else ""
        return (
            f"first diverging node: {self.node} (was {self.original}), relative error "
            f"{self.error:.3g} on stimulus '{self.stimulus}'\n  {self.text}{where}"
        )


Trace = Callable[[Program, tuple[torch.Tensor, ...], Callable[[fx.Node, Any], None]], object]
"""Runs a program on inputs and shows every call's node and value to the observer."""


def first_divergence(
    before: Program,
    after: Program,
    context: Context,
    oracle: Oracle | None = None,
    *,
    tolerance: float = LIFTED_TOLERANCE,
    exact: Mapping[str, torch.Tensor] | None = None,
) -> Divergence | None:
    """The first node of ``after`` whose value differs from the value that it should have.

    The reference is ``before`` lifted to float64, or the oracle where it can show intermediate
    values (its ``trace`` attribute, of type `Trace`). None where every matched value agrees.
    """
    reference: Trace = getattr(oracle, "trace", None) or run_float64
    for stimulus in _inputs(before, context):
        found = _diverging(before, after, stimulus, reference, tolerance, exact)
        if found is not None:
            return found
    return None


def _inputs(program: Program, context: Context) -> list[Stimulus]:
    found = stimuli(program, seed=context.seed)
    if context.data is not None:
        found.append(Stimulus("data", next(iter(context.data)).inputs))
    return found


def _diverging(
    before: Program,
    after: Program,
    stimulus: Stimulus,
    reference: Trace,
    tolerance: float,
    exact: Mapping[str, torch.Tensor] | None,
) -> Divergence | None:
    expected: dict[str, torch.Tensor] = {}

    def remember(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            expected[node.name] = value

    reference(before, stimulus.inputs, remember)
    found: list[Divergence] = []

    def compare(node: fx.Node, value: Any) -> None:
        original = str(node.meta.get(COMPUTES, node.name))
        if found or not isinstance(value, torch.Tensor) or original not in expected:
            return
        error = relative_error(value, expected[original])
        if error > tolerance:
            found.append(
                Divergence(node.name, original, error, print_node(node), source_line(node),
                           stimulus.kind)
            )  # fmt: skip

    run_float64(after, stimulus.inputs, compare, exact)
    return found[0] if found else None


@dataclass(frozen=True)
class Explain(Watch):
    """An instrument that adds the first diverging node to a failed check's error."""

    def failed(self, failure: Failure) -> str:
        """The first diverging node, where a promise was checked and broken."""
        found = _divergence(failure)
        return f"  {found}" if found is not None else ""


def _divergence(failure: Failure) -> Divergence | None:
    """Where a broken promise first shows; None for passes that may differ everywhere."""
    if failure.after is None or failure.report is None:
        return None
    if failure.report.effect in (Effect.BOUNDED, Effect.FITTED):
        return None
    return first_divergence(
        failure.before, failure.after, failure.context, failure.oracle, exact=failure.exact
    )


@dataclass(frozen=True)
class Culprit:
    """The first pass of a pipeline whose promise does not hold."""

    position: int
    """Counted from 1 over the passes as they ran."""
    text: str
    report: CheckReport
    divergence: Divergence | None

    def __str__(self) -> str:
        lines = f"pass {self.position}, {self.text}: {self.report}"
        return f"{lines}\n{self.divergence}" if self.divergence is not None else lines


def bisect(pipeline: Pipeline, program: Program, context: Context | None = None) -> Culprit | None:
    """The culprit among a pipeline's passes, or None where every promise holds.

    Passes run in order, each checked, up to the first whose check fails.
    """
    watch = _FirstFailure()
    try:
        pipeline.run(program, context, instruments=[watch], verify_each=False)
    except VerificationError:
        if watch.culprit is None:
            raise
    return watch.culprit


class _FirstFailure(Watch):
    """Remembers the pass whose check failed."""

    def __init__(self) -> None:
        self.culprit: Culprit | None = None
        self._passed = 0

    def after(self, step: Step, before: Program, program: Program) -> None:  # noqa: ARG002
        self._passed += 1

    def failed(self, failure: Failure) -> str:
        if failure.report is not None:
            self.culprit = Culprit(
                self._passed + 1, print_pass(failure.pass_), failure.report, _divergence(failure)
            )
        return ""

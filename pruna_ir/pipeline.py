"""Pipelines: passes in order, in scopes, each verified and its promise checked.

A pipeline is a value that converts to text and back (`pruna_ir.spec` has the grammar). Two scopes
exist: ``fixpoint(...)`` repeats its passes until none changes the program, and
``submodule<glob>(...)`` confines them to nodes that stem from matching submodules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pruna_ir.checks import CheckReport, check
from pruna_ir.errors import PassError, PrunaError, UsageError, VerificationError
from pruna_ir.options import make_pass
from pruna_ir.program import Program
from pruna_ir.registry import unknown
from pruna_ir.spec import (
    Item,
    PassSpec,
    ScopeSpec,
    parse_pipeline,
    pass_spec,
    print_pass,
    print_pipeline,
)
from pruna_ir.transform import Context, Oracle, Pass, PassResult, Remark, apply
from pruna_ir.verify import verify

FIXPOINT = "fixpoint"
SUBMODULE = "submodule"
MAX_ROUNDS = 100


@dataclass(frozen=True)
class Scope:
    """Passes that run under ``fixpoint`` or ``submodule<glob>``."""

    kind: str
    argument: str
    items: tuple[Pass | Scope, ...]


@dataclass(frozen=True)
class Step:
    """One executed pass and what was found of it.

    ``verified`` and ``check`` say what ran: None or False where the caller turned it off or the
    pass changed nothing.
    """

    name: str
    text: str
    modified: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    remarks: tuple[Remark, ...]
    verified: bool = False
    check: CheckReport | None = None


@dataclass(frozen=True)
class PipelineResult:
    """The final program and every step that led to it."""

    program: Program
    steps: tuple[Step, ...]

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks of all steps, in order."""
        return tuple(remark for step in self.steps for remark in step.remarks)


@dataclass(frozen=True)
class Failure:
    """A pass that failed, for instruments that explain it.

    ``after`` and ``oracle`` are None where the pass itself raised.
    """

    pass_: Pass
    scopes: tuple[str, ...]
    context: Context
    before: Program
    error: PrunaError
    after: Program | None = None
    oracle: Oracle | None = None
    report: CheckReport | None = None
    exact: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Instrument(Protocol):
    """Watches a pipeline run. Raise `StopPipeline` in ``after`` to end the run early."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Called before each pass."""
        ...

    def after(self, step: Step, before: Program, program: Program) -> None:
        """Called after each pass, with the programs before and after it."""
        ...

    def failed(self, failure: Failure) -> str:
        """Called when a pass or its check fails; the text returned is added to the error."""
        ...


class StopPipeline(Exception):  # noqa: N818
    """Raised by an instrument to end a run after the current pass, without an error."""


@dataclass(frozen=True)
class Pipeline:
    """An immutable sequence of passes and scopes.

    >>> str(Pipeline.parse("canonicalize, fixpoint(fold-constants)"))
    'canonicalize,fixpoint(fold-constants)'
    """

    items: tuple[Pass | Scope, ...]

    @staticmethod
    def parse(text: str) -> Pipeline:
        """The pipeline that a text describes.

        Raises:
            UsageError: malformed text, or an unknown pass, scope or option (with a suggestion).
        """
        try:
            return Pipeline(tuple(_build(item) for item in parse_pipeline(text)))
        except UsageError as error:
            raise _with_caret(error, text) from error

    def __str__(self) -> str:
        return print_pipeline(tuple(_spec(item) for item in self.items))

    def passes(self) -> Iterator[Pass]:
        """Every pass, scopes flattened, in order."""
        return _flatten(self.items)

    def run(
        self,
        program: Program,
        context: Context | None = None,
        *,
        instruments: Sequence[Instrument] = (),
        verify_each: bool = True,
        check_each: bool = True,
    ) -> PipelineResult:
        """Run every pass in order; the program given stays as it is.

        Args:
            program: where to start.
            context: data, target, seed and progress for the passes.
            instruments: watchers, called in order around each pass.
            verify_each: run the IR verifier after every pass that changed something.
            check_each: check every changing pass's promise.

        Raises:
            PassError: a pass failed; the message says which and what ran before it.
            InvalidIRError: a pass left a program that breaks a rule of the IR.
            VerificationError: a pass's promise does not hold.
        """
        run = _Run(self, program, context or Context(), instruments, verify_each, check_each)
        with suppress(StopPipeline):
            run.items(self.items, ())
        return PipelineResult(run.program, tuple(run.steps))


class _Run:
    """The state of one run: the program so far and the steps behind it."""

    def __init__(
        self,
        pipeline: Pipeline,
        program: Program,
        context: Context,
        instruments: Sequence[Instrument],
        verify_each: bool,
        check_each: bool,
    ) -> None:
        self.program = program
        self.steps: list[Step] = []
        self._context = context
        self._instruments = instruments
        self._verify = verify_each
        self._check = check_each
        self._total = sum(1 for _ in pipeline.passes())

    def items(self, items: Sequence[Pass | Scope], scopes: tuple[str, ...]) -> bool:
        """Run items in order; whether any changed the program."""
        changed = [self._item(item, scopes) for item in items]
        return any(changed)

    def _item(self, item: Pass | Scope, scopes: tuple[str, ...]) -> bool:
        if isinstance(item, Pass):
            return self._pass(item, scopes)
        if item.kind == SUBMODULE:
            return self.items(item.items, (*scopes, item.argument))
        return self._fixpoint(item, scopes)

    def _fixpoint(self, scope: Scope, scopes: tuple[str, ...]) -> bool:
        for rounds in range(MAX_ROUNDS):
            if not self.items(scope.items, scopes):
                return rounds > 0
        raise PassError(
            f"{print_pipeline((_spec(scope),))} still changes the program after {MAX_ROUNDS} "
            "rounds; one of its passes undoes another"
        )

    def _pass(self, pass_: Pass, scopes: tuple[str, ...]) -> bool:
        self._context.progress(pass_.name, min(len(self.steps), self._total), self._total)
        for instrument in self._instruments:
            instrument.before(pass_, self.program)
        before = self.program
        result = self._apply(pass_, scopes)
        report = self._promise(pass_, scopes, result)
        step = Step(
            pass_.name, print_pass(pass_), result.modified, result.seconds,
            len(before.graph.nodes), len(result.program.graph.nodes), result.remarks,
            verified=self._verify and result.modified, check=report,
        )  # fmt: skip
        self.steps.append(step)
        self.program = result.program
        for instrument in self._instruments:
            instrument.after(step, before, result.program)
        return result.modified

    def _apply(self, pass_: Pass, scopes: tuple[str, ...]) -> PassResult:
        try:
            return apply(pass_, self.program, self._context, scope=scopes)
        except PrunaError as error:
            raise self._explained(
                Failure(pass_, scopes, self._context, self.program, error)
            ) from error
        except Exception as error:
            wrapped = PassError(f"{pass_.name} failed: {type(error).__name__}: {error}")
            raise self._explained(
                Failure(pass_, scopes, self._context, self.program, wrapped)
            ) from error

    def _promise(
        self, pass_: Pass, scopes: tuple[str, ...], result: PassResult
    ) -> CheckReport | None:
        """Verify the IR and check the effect of a pass that changed something."""
        if not result.modified:
            return None
        report: CheckReport | None = None
        try:
            if self._verify:
                verify(result.program)
            if self._check:
                report = check(
                    pass_, self.program, result.program, result.oracle, self._context,
                    result.exact, result.assurances,
                )  # fmt: skip
        except PrunaError as error:
            found = Failure(
                pass_, scopes, self._context, self.program, error, result.program, result.oracle
            )
            raise self._explained(found) from error
        if report is not None and not report.passed:
            wrong = VerificationError(f"{pass_.name}: its promise does not hold: {report}")
            raise self._explained(
                Failure(pass_, scopes, self._context, self.program, wrong, result.program,
                        result.oracle, report, result.exact)
            )  # fmt: skip
        return report

    def _explained(self, failure: Failure) -> PrunaError:
        """The failure's error, with what ran before and what the instruments add."""
        ran = ", ".join(step.text for step in self.steps)
        lines = [str(failure.error), f"  after: {ran}" if ran else "  it was the first pass"]
        lines += [text for i in self._instruments if (text := i.failed(failure))]
        return type(failure.error)("\n".join(lines))


def _build(item: Item) -> Pass | Scope:
    if isinstance(item, PassSpec):
        return make_pass(item)
    if item.name not in (FIXPOINT, SUBMODULE):
        raise UsageError(unknown("scope", item.name, (FIXPOINT, SUBMODULE)))
    if item.name == SUBMODULE and not item.argument:
        raise UsageError("submodule needs a glob of module paths, such as submodule<layer1*>(...)")
    if item.name == FIXPOINT and item.argument:
        raise UsageError("fixpoint takes no argument in <>")
    return Scope(item.name, item.argument, tuple(_build(inner) for inner in item.items))


def _spec(item: Pass | Scope) -> Item:
    if isinstance(item, Scope):
        return ScopeSpec(item.kind, item.argument, tuple(_spec(inner) for inner in item.items))
    return pass_spec(item)


def _flatten(items: Sequence[Pass | Scope]) -> Iterator[Pass]:
    for item in items:
        if isinstance(item, Scope):
            yield from _flatten(item.items)
        else:
            yield item


def _with_caret(error: UsageError, text: str) -> UsageError:
    """The error with a caret under the word that it quotes first, where the text has it."""
    message = str(error)
    quoted = re.search(r"(?:'([^']+)'|option (\w+))", message)
    word = (quoted.group(1) or quoted.group(2)) if quoted else ""
    if "^" in message or not word or word not in text:
        return error
    line = text.replace("\n", " ")
    return UsageError(f"{message}\n  {line}\n  {' ' * line.index(word)}{'^' * len(word)}")

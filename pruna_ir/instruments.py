"""Instruments: what can be watched while a pipeline runs.

Each is one small class with the three methods of `pruna_ir.pipeline.Instrument`; third parties
write their own the same way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pruna_ir.errors import UsageError
from pruna_ir.pipeline import Failure, Step, StopPipeline
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import Pass


class Watch:
    """An instrument that does nothing; override what is of interest."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Called before each pass."""

    def after(self, step: Step, before: Program, program: Program) -> None:
        """Called after each pass."""

    def failed(self, failure: Failure) -> str:  # noqa: ARG002
        """Called when a pass fails; adds nothing to the error."""
        return ""


@dataclass(frozen=True)
class Timing(Watch):
    """Reports the seconds of each pass (without its check), as one line to ``write``."""

    write: Callable[[str], None]

    def after(self, step: Step, before: Program, program: Program) -> None:  # noqa: ARG002
        """Write the pass's time."""
        self.write(f"{step.seconds * 1e3:9.1f} ms  {step.text}")


@dataclass(frozen=True)
class Statistics(Watch):
    """Reports how many nodes of each operator a pass added and removed."""

    write: Callable[[str], None]

    def after(self, step: Step, before: Program, program: Program) -> None:
        """Write the change in operator counts."""
        old, new = operator_counts(before), operator_counts(program)
        changes = [
            f"{new.get(op, 0) - old.get(op, 0):+d} {op}"
            for op in sorted(old | new)
            if new.get(op, 0) != old.get(op, 0)
        ]
        self.write(f"{step.text}: {', '.join(changes) or 'same operators'}")


def operator_counts(program: Program) -> dict[str, int]:
    """How often each operator is called."""
    counts: dict[str, int] = {}
    for node in program.calls():
        counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts


@dataclass
class DumpIR(Watch):
    """Writes the IR into a folder: ``before`` each pass, ``after`` each, or as a diff if changed.

    Files are numbered in the order of the passes: ``003-fold-batch-norm.after.txt``.
    """

    folder: Path
    when: Literal["before", "after", "changed"] = "changed"
    _number: int = 0

    def __post_init__(self) -> None:
        if self.when not in ("before", "after", "changed"):
            raise UsageError(f"IR is dumped 'before', 'after' or 'changed', not {self.when!r}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot hold IR dumps: {error.strerror}") from error

    def before(self, pass_: Pass, program: Program) -> None:
        """Write the program that the pass gets."""
        self._number += 1
        if self.when == "before":
            self._write(pass_.name, "before.txt", print_program(program, sources=True))

    def after(self, step: Step, before: Program, program: Program) -> None:
        """Write the program that the pass made, or what it changed."""
        if self.when == "after":
            self._write(step.name, "after.txt", print_program(program, sources=True))
        elif self.when == "changed" and step.modified:
            self._write(step.name, "diff", diff_programs(before, program, step.text))

    def _write(self, name: str, suffix: str, text: str) -> None:
        safe = re.sub(r"[^\w.-]", "_", name)
        (self.folder / f"{self._number:03d}-{safe}.{suffix}").write_text(text, encoding="utf-8")


def diff_programs(before: Program, after: Program, title: str = "pass") -> str:
    """A unified diff of two programs' text."""
    return "".join(
        difflib.unified_diff(
            print_program(before).splitlines(keepends=True),
            print_program(after).splitlines(keepends=True),
            f"before {title}",
            f"after {title}",
        )
    )


@dataclass
class StopAfter(Watch):
    """Ends the run after a number of passes."""

    passes: int
    _seen: int = 0

    def after(self, step: Step, before: Program, program: Program) -> None:  # noqa: ARG002
        """Count, and stop at the number."""
        self._seen += 1
        if self._seen >= self.passes:
            raise StopPipeline

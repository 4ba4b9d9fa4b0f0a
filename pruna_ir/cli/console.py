"""Where output goes: data to stdout, everything else to stderr; progress on a terminal only.

Libraries print as they like, from C++ too. So while a command runs, file descriptor 1 leads to
stderr, and data goes to a copy of the real stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class Console:
    """The streams of one command.

    Attributes:
        as_json: the command's data is to be JSON.
        terminal: stdout is a terminal.
    """

    def __init__(self, stdout: IO[str], *, as_json: bool, terminal: bool) -> None:
        self._stdout = stdout
        self.as_json = as_json
        self.terminal = terminal
        self._progress: Any = None
        self._task: Any = None

    def data(self, text: str) -> None:
        """Write data."""
        self._stdout.write(text if text.endswith("\n") else f"{text}\n")
        self._stdout.flush()

    def json(self, value: Any) -> None:
        """Write a value as JSON."""
        self.data(json.dumps(value, indent=2, allow_nan=False))

    def log(self, text: str) -> None:
        """Write a line for people to stderr."""
        self.hide_progress()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Write a warning to stderr."""
        self.log(f"warning: {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far long work has come; a `pruna_ir.transform.Progress`."""
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            from rich.console import Console as Rich
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                console=Rich(stderr=True),
                transient=True,
            )
            self._task = self._progress.add_task(what, total=max(total, 1))
            self._progress.start()
        self._progress.update(
            self._task, description=what, completed=done, total=max(total, 1)
        )

    def hide_progress(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextlib.contextmanager
def console(*, as_json: bool) -> Iterator[Console]:
    """The console of a command; until the end, whatever else is printed goes to stderr."""
    original = sys.stdout
    try:
        number = original.fileno()
    except (AttributeError, io.UnsupportedOperation, ValueError):
        # Not a file of the operating system, as under a test runner.
        with contextlib.redirect_stdout(sys.stderr):
            yield Console(original, as_json=as_json, terminal=False)
        return
    original.flush()
    kept = os.dup(number)
    stream = os.fdopen(kept, "w", encoding="utf-8", closefd=True)
    made = Console(stream, as_json=as_json, terminal=os.isatty(kept))
    try:
        os.dup2(sys.stderr.fileno(), number)
        yield made
    finally:
        made.hide_progress()
        original.flush()
        os.dup2(kept, number)
        with contextlib.suppress(BrokenPipeError):
            stream.close()

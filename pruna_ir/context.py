"""What a pass may use besides the program, and how it reports on long work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruna_ir.data import DataSource


Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` during long work."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the program.

    Attributes:
        data: calibration or training data, where the user gave some.
        target: the name of the backend that the program is meant for; empty where it is open.
        progress: called during long work.
        seed: the seed of everything random.
    """

    data: DataSource | None = None
    target: str = ""
    progress: Progress = no_progress
    seed: int = 0

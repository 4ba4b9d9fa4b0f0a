"""The exit codes of ``pruna-opt``, as the errors define them."""

from __future__ import annotations

BUG = 70
INTERRUPTED = 130
NOT_VERIFIED = 8

EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "ok"),
    (1, "not equivalent: a promise or a comparison does not hold"),
    (2, "usage: unknown name, misspelt option, malformed pipeline text"),
    (3, "input or capture: the model, weights or data cannot be used"),
    (4, "a pass failed"),
    (5, "invalid IR: a pass left a program that breaks a rule"),
    (6, "lowering: unsupported nodes, or an artifact cannot be built, written or loaded"),
    (7, "plugin: a third-party pass, rule or backend cannot be used"),
    (8, "toolchain: a package or device is missing; NOT_RUN under --require-verified"),
    (BUG, "a bug in pruna-opt itself; --debug shows the traceback"),
    (INTERRUPTED, "interrupted"),
)


def exit_code_table() -> str:
    """The table, one line a code."""
    return "\n".join(f"  {code:3d}  {meaning}" for code, meaning in EXIT_CODES)

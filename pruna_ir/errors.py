"""Every error that pruna-ir raises for the user's input.

    PrunaError
    |- UsageError           2  an unknown name, a misspelt option, malformed pipeline text
    |- CaptureError         3  the model, file, weights or inputs cannot be turned into a Program
    |- PassError            4  a pass cannot do what it was asked to do
    |- InvalidIRError       5  a Program breaks a rule of the IR
    |- VerificationError    1  a promise was checked and does not hold
    |- LoweringError        6  a backend could not build or load an artifact
    |  `- UnsupportedError  6  a backend or analysis names every node that it cannot handle
    |- PluginError          7  a third-party pass, rule or backend cannot be used
    `- ToolchainError       8  a package or device that this step needs is missing

The number is the exit code of ``pruna-opt``. A message names the thing, the fact and the remedy.
"""

from __future__ import annotations

from typing import ClassVar


class PrunaError(Exception):
    """Base of every error that the user's input can cause."""

    exit_code: ClassVar[int] = 4


class UsageError(PrunaError):
    """An unknown name, a misspelt option or malformed pipeline text."""

    exit_code: ClassVar[int] = 2


class CaptureError(PrunaError):
    """The model, file, weights or inputs cannot be turned into a Program."""

    exit_code: ClassVar[int] = 3


class PassError(PrunaError):
    """A pass cannot do what it was asked to do."""

    exit_code: ClassVar[int] = 4


class InvalidIRError(PrunaError):
    """A Program breaks a rule of the IR."""

    exit_code: ClassVar[int] = 5


class VerificationError(PrunaError):
    """A promise was checked and does not hold."""

    exit_code: ClassVar[int] = 1


class LoweringError(PrunaError):
    """A backend could not build, write or load an artifact."""

    exit_code: ClassVar[int] = 6


class UnsupportedError(LoweringError):
    """A backend or analysis names every node that it cannot handle."""


class PluginError(PrunaError):
    """A third-party pass, operator rule or backend cannot be used."""

    exit_code: ClassVar[int] = 7


class ToolchainError(PrunaError):
    """A package or device that this step needs is missing."""

    exit_code: ClassVar[int] = 8

"""The registry: passes, backends, kernels and coupling rules, found through entry points.

Ours and third parties' register the same way. Listing reads package metadata only and imports
nothing; a name is imported when it is asked for. Two distributions that claim one name are an
error that names both; a plugin written for another interface version likewise. What is broken and
nobody asked for is a warning (`problems`, and the log of this module).

A plugin's class states ``api_version`` itself: the version of the interface that it was written
for, which a value inherited from ours could not tell.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import all_suffixes
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruna_ir.errors import PluginError, UsageError

if TYPE_CHECKING:
    from pruna_ir.lowering import Backend
    from pruna_ir.transform import Pass

PASSES = "pruna_ir.passes"
BACKENDS = "pruna_ir.backends"
KERNELS = "pruna_ir.kernels"
COUPLING_RULES = "pruna_ir.coupling_rules"

_LOG = logging.getLogger(__name__)

OURS = "pruna-ir"
"""The name of our own distribution."""

_KIND = {
    PASSES: "pass",
    BACKENDS: "backend",
    KERNELS: "kernel",
    COUPLING_RULES: "coupling rule",
}


@dataclass(frozen=True)
class Entry:
    """One registered name: what package metadata says of it, nothing imported."""

    group: str
    name: str
    value: str
    """``package.module:Attribute``."""
    distribution: str
    """The distribution that registered it, with its version."""

    @property
    def third_party(self) -> bool:
        """Whether another distribution than ours registered it."""
        return self.distribution.split()[0] != OURS


@cache
def entries(group: str) -> tuple[Entry, ...]:
    """Every entry of a group, sorted by name, duplicates included."""
    found = {_entry(group, point) for point in entry_points(group=group)}
    return tuple(sorted(found, key=lambda e: (e.name, e.distribution)))


def _entry(group: str, point: EntryPoint) -> Entry:
    owner = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown"
    return Entry(group, point.name, point.value, owner)


def find(group: str, name: str) -> Entry:
    """The entry of a name.

    Raises:
        UsageError: nobody registered the name; the message suggests the nearest.
        PluginError: two distributions registered it.
    """
    found = [entry for entry in entries(group) if entry.name == name]
    if not found:
        raise UsageError(unknown(_KIND[group], name, (e.name for e in entries(group))))
    if len(found) > 1:
        raise PluginError(
            f"{_KIND[group]} '{name}' is registered by "
            f"{' and by '.join(f'{e.distribution} ({e.value})' for e in found)}; uninstall one"
        )
    return found[0]


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """A message for an unknown name that suggests the nearest, or lists what there is."""
    known = sorted(set(names))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
    return f"unknown {kind} '{name}'; {hint}"


@cache
def load(entry: Entry) -> Any:
    """Import what an entry names and check the interface version that it states.

    Raises:
        PluginError: it cannot be imported, or was written for another interface version.
    """
    try:
        loaded = EntryPoint(entry.name, entry.value, entry.group).load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{_KIND[entry.group]} '{entry.name}' of {entry.distribution} cannot be imported "
            f"({entry.value}): {type(error).__name__}: {error}"
        ) from error
    if entry.group in (PASSES, BACKENDS):
        _check_class(entry, loaded)
    elif entry.group == KERNELS and not (hasattr(loaded, "op") and hasattr(loaded, "reference")):
        raise PluginError(
            f"{entry.distribution} registers kernel '{entry.name}', but {entry.value} is a "
            f"{type(loaded).__name__}, not a pruna_ir.kernels.kernel.Kernel"
        )
    elif entry.group == COUPLING_RULES and not hasattr(loaded, "couple"):
        raise PluginError(
            f"{entry.distribution} registers a coupling rule for '{entry.name}', but "
            f"{entry.value} is a {type(loaded).__name__}, not a pruna_ir.coupling.rule.Rule"
        )
    return loaded


def _check_class(entry: Entry, loaded: Any) -> None:
    from pruna_ir import __version__
    from pruna_ir.transform import API_VERSION

    kind = _KIND[entry.group]
    if not isinstance(loaded, type):
        raise PluginError(
            f"{entry.distribution} registers {kind} '{entry.name}', but {entry.value} is a "
            f"{type(loaded).__name__}, not a class"
        )
    stated = _stated_version(entry, loaded)
    if stated is None:
        raise PluginError(
            f"{kind} '{entry.name}' of {entry.distribution} does not state the interface version "
            f"that it is written for; add 'api_version: ClassVar[int] = {API_VERSION}' to "
            f"{entry.value}"
        )
    if stated != API_VERSION:
        raise PluginError(
            f"{kind} '{entry.name}' of {entry.distribution} is written for interface version "
            f"{stated}, but {OURS} {__version__} has version {API_VERSION}; install matching "
            "versions"
        )
    if getattr(loaded, "name", None) != entry.name:
        raise PluginError(
            f"{entry.distribution} registers '{entry.name}', but {entry.value} calls itself "
            f"{getattr(loaded, 'name', None)!r}"
        )


def _stated_version(entry: Entry, loaded: type[Any]) -> int | None:
    """The interface version that a class states; a third party's inherits none from ours."""
    if not entry.third_party:
        return getattr(loaded, "api_version", None)
    own = (cls for cls in loaded.__mro__ if not cls.__module__.startswith("pruna_ir."))
    return next((vars(cls)["api_version"] for cls in own if "api_version" in vars(cls)), None)


@dataclass(frozen=True)
class Problem:
    """Why something that is registered cannot be used; only asking for it is an error."""

    kind: str
    """``pass``, ``backend``, ``kernel`` or ``coupling rule``."""
    name: str
    distribution: str
    message: str

    def __str__(self) -> str:
        return self.message


def problems(*, importing: bool = False) -> tuple[Problem, ...]:
    """Everything that is registered and cannot be used, for ``list`` and ``doctor`` to warn of.

    Finds names that two distributions claim and modules that do not exist; nothing is imported.
    With ``importing``, every third party's entry is imported and checked as `load` does.
    """
    found: list[Problem] = []
    for group, kind in _KIND.items():
        claimed: set[str] = set()
        for entry in entries(group):
            if entry.name not in claimed:
                message = _problem(entry, importing=importing)
                if message:
                    found.append(Problem(kind, entry.name, entry.distribution, message))
            claimed.add(entry.name)
    return tuple(found)


def _problem(entry: Entry, *, importing: bool) -> str:
    """What is wrong with an entry; empty where nothing is."""
    try:
        find(entry.group, entry.name)
        if importing and entry.third_party:
            load(entry)
    except PluginError as error:
        return str(error)
    module = entry.value.partition(":")[0]
    if _missing_module(module):
        return (
            f"{_KIND[entry.group]} '{entry.name}' of {entry.distribution} is broken: there is no "
            f"module {module}; reinstall {entry.distribution.split()[0]}"
        )
    return ""


def _missing_module(module: str) -> bool:
    """Whether a module does not exist; only its top package is asked for, and none imported."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None:
        return True
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for part in inner[:-1]:
        folders = [folder / part for folder in folders if (folder / part).is_dir()]
    leaves = [f"{inner[-1]}{suffix}" for suffix in ("", *all_suffixes())] if inner else []
    return bool(leaves) and not any((f / leaf).exists() for f in folders for leaf in leaves)


def find_pass(name: str) -> type[Pass]:
    """The pass class of this name."""
    loaded: type[Pass] = load(find(PASSES, name))
    return loaded


def find_backend(name: str) -> Backend:
    """A backend of this name."""
    backend: Backend = load(find(BACKENDS, name))()
    return backend


@cache
def kernels() -> dict[Any, Any]:
    """Every kernel by its operator overload; importing them registers the operators.

    A third party's kernel that cannot be used is left out, and the log warns of it: whoever calls
    this asks for none by name.

    Raises:
        PluginError: two distributions claim one name or one operator.
    """
    owners: dict[Any, Entry] = {}
    for entry in entries(KERNELS):
        find(KERNELS, entry.name)
        try:
            op = load(entry).op
        except PluginError as error:
            if not entry.third_party:
                raise
            _LOG.warning("warning: %s; it is left out", error)
            continue
        if op in owners:
            raise PluginError(
                f"operator {op} has a kernel in {owners[op].distribution} "
                f"({owners[op].value}) and in {entry.distribution} ({entry.value}); uninstall one"
            )
        owners[op] = entry
    return {op: load(entry) for op, entry in owners.items()}

"""The registry: passes, backends, kernels and coupling rules, found through entry points.

Ours and third parties' register the same way. Listing reads package metadata only and imports
nothing; a name is imported when it is asked for. Two distributions that claim one name are an
error that names both; a plugin written for another interface version likewise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from pruna_ir.errors import PluginError, UsageError

if TYPE_CHECKING:
    from pruna_ir.lowering import Backend
    from pruna_ir.transform import Pass

PASSES = "pruna_ir.passes"
BACKENDS = "pruna_ir.backends"
KERNELS = "pruna_ir.kernels"
COUPLING_RULES = "pruna_ir.coupling_rules"

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
    except Exception as error:
        raise PluginError(
            f"{_KIND[entry.group]} '{entry.name}' of {entry.distribution} cannot be imported "
            f"({entry.value}): {type(error).__name__}: {error}"
        ) from error
    _check_version(entry, loaded)
    return loaded


def _check_version(entry: Entry, loaded: Any) -> None:
    if entry.group not in (PASSES, BACKENDS):
        return
    from pruna_ir import __version__
    from pruna_ir.transform import API_VERSION

    stated = getattr(loaded, "api_version", None)
    if stated != API_VERSION:
        raise PluginError(
            f"{_KIND[entry.group]} '{entry.name}' of {entry.distribution} is written for "
            f"interface version {stated}, but pruna-ir {__version__} has version {API_VERSION}; "
            "install matching versions"
        )
    if getattr(loaded, "name", None) != entry.name:
        raise PluginError(
            f"{entry.distribution} registers '{entry.name}', but {entry.value} calls itself "
            f"{getattr(loaded, 'name', None)!r}"
        )


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
    """Every kernel by its operator overload; importing them registers the operators."""
    found = [load(find(KERNELS, entry.name)) for entry in entries(KERNELS)]
    return {kernel.op: kernel for kernel in found}

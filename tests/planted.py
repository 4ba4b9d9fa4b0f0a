"""Passes with planted bugs, registered the way a plugin is: through a distribution's metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruna_ir import registry


@contextmanager
def registered(folder: Path, passes: dict[str, str]) -> Iterator[None]:
    """Passes (name -> ``module:Class``) visible to the registry while the block runs."""
    info = folder / "planted-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in passes.items()]
    (info / "entry_points.txt").write_text("[pruna_ir.passes]\n" + "\n".join(lines) + "\n")
    sys.path.insert(0, str(folder))
    registry.entries.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        registry.entries.cache_clear()

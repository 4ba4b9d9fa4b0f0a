"""Distributions for tests: wheels of the tree, empty environments, and others written by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("passes", "backends", "kernels")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.args}\n{ran.stdout}\n{ran.stderr}"
    return ran


def tree_files() -> list[Path]:
    """What a clone would hold if everything were committed: tracked or new, and not ignored."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return sorted({path for path in paths if os.path.lexists(ROOT / path)})


def package_paths(files: Iterable[Path]) -> set[str]:
    """Where the files of the four source folders must lie in a wheel."""
    return {
        (Path("pruna_ir") / file if file.parts[0] in FOLDERS else file).as_posix()
        for file in files
        if file.parts[0] in ("pruna_ir", *FOLDERS) and not (ROOT / file).is_symlink()
    }


def build(source: Path, kind: str, out: Path) -> Path:
    """Build a wheel or sdist and return it."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.iterdir()
    return built


def clean_copy(copy: Path) -> Path:
    """What a clone would hold, copied; links stay links."""
    for file in tree_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)
    return copy


def empty_environment(root: Path, *wheels: Path) -> Path:
    """A new environment with these wheels and none of their dependencies; returns its scripts."""
    venv.create(root, with_pip=False, symlinks=True)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    run(
        sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet",
        "--no-deps", "--no-index", "--disable-pip-version-check", *wheels,
    )  # fmt: skip
    return scripts


def write_distribution(
    folder: Path,
    name: str,
    version: str,
    groups: dict[str, dict[str, str]],
    files: dict[str, str],
) -> list[Path]:
    """What an installed distribution leaves in a folder: metadata, entry points and modules.

    Returns everything that was made at the folder's top.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    lines: list[str] = []
    for group, items in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in items.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    return [info, *(folder / top for top in {Path(file).parts[0] for file in files})]

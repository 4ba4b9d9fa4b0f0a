"""ruff, mypy and the doctests are part of the tests; each is shown to find a planted error."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.library import CustomOpDef

from tests.wheels import FOLDERS, ROOT

CONFIG = ROOT / "pyproject.toml"
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "pruna_ir").rglob("*.py")
    if not file.name.startswith("__") and file.relative_to(ROOT).parts[1] not in FOLDERS
) + sorted(
    f"pruna_ir.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}"
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.py")
    if file.name != "__init__.py"
)
LONGEST_FILE = 600
"""Lines; a file that grows beyond holds more than one idea."""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of the environment's tools in the repository."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )


# -- ruff --------------------------------------------------------------------------------------


def test_ruff_finds_nothing() -> None:
    ran = run("ruff", "check", "--output-format=concise", ".")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_ruff_finds_a_planted_error(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text('"""A module."""\n\n\ndef public(x=[]):\n    return x\n', encoding="utf-8")
    ran = run("ruff", "check", "--config", CONFIG, "--output-format=concise", planted)
    assert ran.returncode == 1
    assert "B006" in ran.stdout
    assert "D103" in ran.stdout


# -- mypy --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mypy() -> subprocess.CompletedProcess[str]:
    """One run over everything: findings on stdout, what was read on stderr."""
    return run("mypy", "--config-file", CONFIG, "-v")


def test_mypy_finds_nothing(mypy: subprocess.CompletedProcess[str]) -> None:
    assert mypy.returncode == 0, mypy.stdout


@pytest.mark.parametrize("name", ["passes.canonicalize", "backends.to_onnx", "kernels.fake_quant"])
def test_mypy_sees_what_stands_behind_the_links(
    mypy: subprocess.CompletedProcess[str], name: str
) -> None:
    assert f"pruna_ir.{name}" in mypy.stderr


def test_mypy_finds_nothing_in_the_plugin() -> None:
    ran = run("mypy", "--config-file", CONFIG, ROOT / "tests" / "plugin" / "acme_pruna")
    assert not [line for line in ran.stdout.splitlines() if "acme_pruna" in line], ran.stdout


def test_mypy_finds_a_planted_error(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from pruna_ir.errors import PrunaError\n\n"
        "def untyped(x):\n    return x\n\n"
        'code: str = PrunaError("x").exit_code\n',
        encoding="utf-8",
    )
    ran = run("mypy", "--config-file", CONFIG, planted)
    assert ran.returncode == 1
    assert "planted.py:3: error: Function is missing a type annotation" in ran.stdout
    assert "planted.py:6: error: Incompatible types in assignment" in ran.stdout


# -- doctests ----------------------------------------------------------------------------------


def failures(module: types.ModuleType) -> str:
    """What the doctests of a module report; empty where all hold."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(module):
        torch.manual_seed(0)
        runner.run(test, out=report.append)
    return "".join(report)


def examples(module: types.ModuleType) -> list[doctest.DocTest]:
    """The doctests of a module, those of its operators included, which doctest passes over."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    functions = [op._init_fn for op in vars(module).values() if isinstance(op, CustomOpDef)]
    found = [t for f in functions for t in finder.find(f, f.__name__, globs=vars(module).copy())]
    return finder.find(module) + found


def test_the_doctests_of_operators_are_found() -> None:
    found = examples(importlib.import_module("pruna_ir.kernels.fake_quant"))
    assert [test.name for test in found if test.examples] == ["fake_quant"]


def test_every_source_folder_has_modules() -> None:
    assert {name.split(".")[1] for name in MODULES} >= set(FOLDERS)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    report = failures(importlib.import_module(name))
    assert not report, report


def test_a_planted_doctest_is_found() -> None:
    planted = types.ModuleType("planted", "One and one.\n\n>>> 1 + 1\n3\n")
    assert "Expected:\n    3\nGot:\n    2\n" in failures(planted)
    planted.__doc__ = "One and one.\n\n>>> 1 + 1\n2\n"
    assert failures(planted) == ""


# -- size --------------------------------------------------------------------------------------


def long_files(root: Path) -> list[str]:
    """Python files of more than `LONGEST_FILE` lines, with their length."""
    lengths = {
        file.relative_to(root).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for folder in ("pruna_ir", *FOLDERS)
        for file in sorted((root / folder).rglob("*.py"))
    }
    return [f"{name}: {lines}" for name, lines in lengths.items() if lines > LONGEST_FILE]


def test_no_file_is_long() -> None:
    assert long_files(ROOT) == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "long.py").write_text("x = 1\n" * (LONGEST_FILE + 1), encoding="utf-8")
    (tmp_path / "passes" / "short.py").write_text("x = 1\n" * LONGEST_FILE, encoding="utf-8")
    assert long_files(tmp_path) == [f"passes/long.py: {LONGEST_FILE + 1}"]

"""The wheel holds exactly the tree, and its command line starts without a single dependency."""

from __future__ import annotations

import json
import tarfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.wheels import (
    FOLDERS,
    ROOT,
    build,
    clean_copy,
    empty_environment,
    package_paths,
    run,
    tree_files,
)

HELP_SECONDS = 0.5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean_copy(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "sdist", tmp_path_factory.mktemp("sdist"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def differences(held: Iterable[str], expected: Iterable[str]) -> dict[str, list[str]]:
    """How a wheel's files differ from the tree's; metadata aside."""
    code = {name for name in held if not name.split("/")[0].endswith(".dist-info")}
    return {
        "missing": sorted(set(expected) - code),
        "unexpected": sorted(code - set(expected)),
    }


def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    expected = package_paths(tree_files())
    assert differences(contents(wheel), expected) == {"missing": [], "unexpected": []}
    assert {
        "pruna_ir/py.typed", "pruna_ir/passes/canonicalize.py", "pruna_ir/backends/to_onnx.py",
        "pruna_ir/kernels/kernel.py",
    } <= expected  # fmt: skip


def test_a_missing_and_a_surplus_file_are_found() -> None:
    held = ["pruna_ir/a.py", "passes/x.py", "pruna_ir-1.dist-info/METADATA"]
    assert differences(held, ["pruna_ir/a.py", "pruna_ir/passes/x.py"]) == {
        "missing": ["pruna_ir/passes/x.py"],
        "unexpected": ["passes/x.py"],
    }


def test_no_other_top_level_package_appears(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in contents(wheel)}
    assert sorted(top.partition("-")[0] for top in tops) == ["pruna_ir", "pruna_ir"]
    assert sum(top.endswith(".dist-info") for top in tops) == 1


def test_the_wheel_holds_files_where_the_tree_has_links(wheel: Path) -> None:
    held = contents(wheel)
    for folder in FOLDERS:
        for file in (ROOT / folder).glob("*.py"):
            assert held[f"pruna_ir/{folder}/{file.name}"] == file.read_bytes()


def test_the_wheel_carries_its_licence_and_needs(wheel: Path) -> None:
    held = contents(wheel)
    (metadata,) = (text.decode() for name, text in held.items() if name.endswith("/METADATA"))
    assert any(name.endswith("/licenses/LICENSE") for name in held)
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    required = sorted(n.split()[1].split(">")[0] for n in needs if "extra ==" not in n)
    assert required == ["numpy", "rich", "safetensors", "torch"]


def test_the_sdist_makes_the_same_wheel(
    wheel: Path, sdist: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build(unpacked, "wheel", tmp_path / "wheel")
    assert contents(again) == contents(wheel)


def test_the_sdist_holds_every_source_and_no_examples(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()]
    assert {"LICENSE", "README.md", "pyproject.toml", *package_paths(tree_files())} <= set(names)
    assert not [name for name in names if name.startswith("examples")]


# -- in an environment that holds nothing else -------------------------------------------------


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an empty environment into which the wheel alone was installed."""
    return empty_environment(tmp_path_factory.mktemp("empty"), wheel)


def test_no_dependency_is_there(scripts: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'numpy') if u.find_spec(n)])"
    assert run(scripts / "python", "-c", code, cwd=scripts).stdout.strip() == "[]"


def test_help_answers_at_once_without_torch(scripts: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        ran = run(scripts / "pruna-opt", "--help", cwd=scripts)
        seconds.append(time.perf_counter() - start)
    for command in ("run", "verify", "list", "explain", "replay", "bisect", "doctor"):
        assert command in ran.stdout
    assert min(seconds) < HELP_SECONDS, f"seconds: {seconds}"


def test_list_names_everything_without_torch(scripts: Path) -> None:
    listed = run(scripts / "pruna-opt", "list", "--json", cwd=scripts)
    text = json.dumps(json.loads(listed.stdout))
    for name in ("canonicalize", "prune-channels", "insert-fake-quant", "tensorrt", "onnx"):
        assert f'"{name}"' in text


def test_the_linked_folders_import_as_packages_of_ours(scripts: Path) -> None:
    code = (
        "import pruna_ir.passes, pruna_ir.backends, pruna_ir.kernels, importlib.util as u;"
        "print([n for n in ('passes', 'backends', 'kernels') if u.find_spec(n)])"
    )
    assert run(scripts / "python", "-c", code, cwd=scripts).stdout.strip() == "[]"

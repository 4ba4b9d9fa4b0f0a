"""``load.py`` runs an artifact where there is no torch and no pruna_ir, on TVM's runtime alone."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_loader import LOADER, loader_source
from pruna_ir.backends.tvm_runtime import physical_cores
from pruna_ir.build import build
from pruna_ir.program import Program
from tests.backends.backend_models import SmallCnn, inputs, program

PACKAGES = ("numpy", "tvm", "tvm_ffi", "ml_dtypes", "typing_extensions")
"""What apache-tvm requires, by its metadata, and itself."""


@pytest.fixture(scope="module")
def made() -> Program:
    return program(SmallCnn, int8=True)


@pytest.fixture(scope="module")
def artifact(made: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(made, ToTvm(), tmp_path_factory.mktemp("a") / "tvm", verify=False).folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds links to `PACKAGES` and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None
        origin = Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (folder / source.name).symlink_to(source)
        libraries = source.with_name(f"{name}.libs")
        if libraries.is_dir():
            (folder / libraries.name).symlink_to(libraries)
    return folder


def alone(packages: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Python with the standard library and `packages`, without site-packages."""
    environment = {
        **settings,
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TVM_USE_RUNTIME_LIB": "1",
    }
    return subprocess.run(
        [sys.executable, "-S", *command],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
        cwd=packages,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["torch", "pruna_ir", "scipy", "onnx"])
def test_the_environment_has_no_other_package(name: str, packages: Path) -> None:
    """The control: what must not be needed is not there."""
    done = alone(packages, "-c", f"import {name}")
    assert f"No module named '{name}'" in done.stderr


def test_an_artifact_runs_without_torch(made: Program, artifact: Path, packages: Path,
                                        tmp_path: Path) -> None:  # fmt: skip
    x = inputs(SmallCnn, 3)
    given, result = tmp_path / "x.npy", tmp_path / "y.npz"
    np.save(given, x.numpy())
    done = alone(packages, str(artifact / LOADER), str(given), "-o", str(result),
                 "--threads", "2", "--repeats", "3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, timed = done.stdout.splitlines()
    name = made.outputs[0].name
    assert first == f"{name}: float32[3, 5]"
    assert timed.endswith("ms, the median of 3 calls")
    with torch.no_grad():
        expected = made(x)[0].numpy()
    with np.load(result) as stored:
        np.testing.assert_allclose(stored[name], expected, rtol=0, atol=2e-6)


BOUND = """
import os, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from load import load_tvm
from pathlib import Path
before = os.sched_getaffinity(0)
runner = load_tvm(Path(sys.argv[1]), threads=1)
for _ in range(3):
    runner.run([np.zeros((3, 3, 17, 15), np.float32)])
print("same" if os.sched_getaffinity(0) == before else "bound")
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or (os.cpu_count() or 1) < 2,
    reason="needs a system that binds threads, and two cores",
)
@pytest.mark.parametrize(
    ("settings", "expected"), [({}, "same"), ({"TVM_BIND_THREADS": "1"}, "bound")]
)
def test_no_thread_is_bound_to_a_core(
    settings: dict[str, str], expected: str, artifact: Path, packages: Path
) -> None:
    """The second is the control: so does TVM when it is asked."""
    done = alone(packages, "-c", BOUND, str(artifact), TVM_NUM_THREADS="1", **settings)
    assert done.stdout == f"{expected}\n", done.stderr


POOL = """
import sys
sys.path.insert(0, sys.argv[1])
from load import load_tvm, physical_cores
from pathlib import Path
load_tvm(Path(sys.argv[1]), threads=int(sys.argv[2]))
import tvm
print(tvm.get_global_func("runtime.NumThreads")(), physical_cores())
"""


@pytest.mark.parametrize(
    ("threads", "settings", "expected"),
    [
        (0, {}, None),
        (3, {}, 3),
        (0, {"OMP_NUM_THREADS": "1"}, 1),
        (3, {"OMP_NUM_THREADS": "1"}, 3),
        (0, {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "2"}, 1),
    ],
)
def test_every_core_is_used_unless_somebody_says_otherwise(
    threads: int, settings: dict[str, str], expected: int | None, artifact: Path, packages: Path
) -> None:
    done = alone(packages, "-c", POOL, str(artifact), str(threads), **settings)
    used, cores = map(int, done.stdout.split())
    assert used == (cores if expected is None else expected), done.stderr
    assert "RuntimeWarning" not in done.stderr


def test_a_pool_that_is_too_small_is_a_warning(artifact: Path, packages: Path) -> None:
    done = alone(packages, "-c", POOL, str(artifact), "3", TVM_NUM_THREADS="1")
    assert done.stdout.startswith("1 ")
    assert "RuntimeWarning: TVM uses 1 of 3 threads: its pool was started" in done.stderr


def test_hyper_threads_of_one_core_count_once(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    assert physical_cores(tmp_path) == len(allowed)
    for number in allowed:
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text("0-255\n", encoding="ascii")
    assert physical_cores(tmp_path) == 1


def test_errors_come_as_messages_and_exit_codes(artifact: Path, packages: Path,
                                                tmp_path: Path) -> None:  # fmt: skip
    given = tmp_path / "x.npy"
    np.save(given, np.zeros((1, 3, 17, 15)))
    done = alone(packages, str(artifact / LOADER), str(given))
    assert done.returncode == 2
    assert done.stderr == (
        "error: input x is float64[1, 3, 17, 15], but the artifact takes float32"
        "['batch', 3, 17, 15]\n"
    )


def test_the_manifest_holds_the_loader(artifact: Path) -> None:
    assert LOADER in json.loads((artifact / "manifest.json").read_text())["files"]


def test_the_loader_is_the_runtime_module_without_its_import() -> None:
    """No logic stands twice: every function and class is the module's or an error's."""
    from pruna_ir import errors
    from pruna_ir.backends import tvm_runtime

    def definitions(text: str) -> dict[str, str]:
        return {
            node.name: ast.unparse(node)
            for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }

    def source(module: object) -> str:
        return Path(str(vars(module)["__file__"])).read_text(encoding="utf-8")

    copied, own = definitions(loader_source()), definitions(source(tvm_runtime))
    theirs = definitions(source(errors))
    assert {name: text for name, text in copied.items() if name not in theirs} == own
    assert {name for name in copied if name in theirs} == {
        "LoweringError", "PrunaError", "ToolchainError", "UsageError"
    }  # fmt: skip
    assert all(copied[name] == theirs[name] for name in copied if name in theirs)
    assert "pruna_ir.errors" not in loader_source()

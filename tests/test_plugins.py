"""A third party's distribution, installed into an environment of its own and used by name.

The environment holds two wheels, ours and the plugin's; the dependencies of both are borrowed
from the environment of the tests through a ``.pth`` file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.wheels import ROOT, build, clean_copy, empty_environment, run, write_distribution

PLUGIN = ROOT / "tests" / "plugin"

MODEL = """
import torch
from acme_pruna.swish import swish

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(5, 12)
        self.gated = torch.nn.Linear(12, 9)
        self.beta = torch.nn.Parameter(torch.linspace(0.5, 1.5, 9))
        self.head = torch.nn.Linear(9, 3)

    def forward(self, x):
        x = torch.nn.functional.hardswish(self.wide(x))
        return self.head(swish(self.gated(x), self.beta))

def net():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 5),)
"""

PLAIN = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU()), (torch.randn(2, 5),)
"""

PASS = """
from typing import ClassVar
from pruna_ir import Effect, Pass

class Shrink(Pass):
    name: ClassVar[str] = "shrink"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = {version}

    def rewrite(self, rw):
        pass
"""


@dataclass(frozen=True)
class Environment:
    """An environment with pruna-ir and the plugin; more distributions may come and go."""

    scripts: Path
    packages: Path

    def pruna_opt(self, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [self.scripts / "pruna-opt", *arguments]
        return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)

    def json(self, *arguments: str | Path, cwd: Path) -> Any:
        ran = self.pruna_opt(*arguments, "--json", cwd=cwd)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Both wheels are installed before the borrowed packages come into sight of pip."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    shutil.copytree(PLUGIN, sources / "plugin", ignore=shutil.ignore_patterns("*.egg-info"))
    (sources / "ours").mkdir()
    ours = build(clean_copy(sources / "ours"), "wheel", out / "ours")
    theirs = build(sources / "plugin", "wheel", out / "theirs")
    root = tmp_path_factory.mktemp("environment")
    scripts = empty_environment(root, ours, theirs)
    (packages,) = root.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return Environment(scripts, packages)


Install = Callable[[str, str, dict[str, dict[str, str]], dict[str, str]], None]


@pytest.fixture
def install(environment: Environment) -> Iterator[Install]:
    """``install(name, version, {group: {name: value}}, {file: text})``, undone after the test."""
    made: list[Path] = []

    def _install(
        name: str, version: str, groups: dict[str, dict[str, str]], files: dict[str, str]
    ) -> None:
        made.extend(write_distribution(environment.packages, name, version, groups, files))

    yield _install
    for path in made:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "plain.py").write_text(PLAIN, encoding="utf-8")
    return tmp_path


def named(value: Any, name: str) -> dict[str, Any]:
    """The first object with this name anywhere in a JSON value."""
    if isinstance(value, dict) and value.get("name") == name:
        return value
    items = value.values() if isinstance(value, dict) else value
    nested = [item for item in items if isinstance(item, (dict, list))]
    return next((found for item in nested if (found := named(item, name))), {})


# -- the plugin at work ------------------------------------------------------------------------


def test_listing_names_the_plugin_and_its_distribution(
    environment: Environment, tmp_path: Path
) -> None:
    listed = environment.json("list", cwd=tmp_path)
    for name in ("expand-hardswish", "numpy"):
        assert named(listed, name)["distribution"] == "pruna-ir-acme 1.2.0"
    assert named(listed, "canonicalize")["distribution"].startswith("pruna-ir ")


def test_explain_shows_the_plugin_s_pass(environment: Environment, tmp_path: Path) -> None:
    ran = environment.pruna_opt("explain", "expand-hardswish", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "rounding" in ran.stdout.lower()
    assert "reciprocal" in ran.stdout
    assert "hardtanh(x + 3, 0, 6)" in ran.stdout


def test_pass_operator_and_backend_run_by_name(environment: Environment, model: Path) -> None:
    ran = environment.pruna_opt(
        "run", "net.py:net", "-p", "canonicalize,expand-hardswish{reciprocal=true}",
        "--target", "numpy", "-o", "out", "--require-verified", cwd=model,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (manifest,) = (model / "out").rglob("manifest.json")
    made = json.loads(manifest.read_text(encoding="utf-8"))
    assert made["backend"] == "numpy"
    assert made["pipeline"][-1] == "expand-hardswish{reciprocal=true}"
    certificate = json.loads((manifest.parent / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["verdict"] == "PASSED"
    steps = json.loads((manifest.parent / "program.json").read_text(encoding="utf-8"))["steps"]
    assert [s["operator"] for s in steps].count("aten.linear.default") == 3
    assert "aten.hardtanh.default" in {s["operator"] for s in steps}


def test_the_backend_names_what_it_cannot_lower(environment: Environment, model: Path) -> None:
    ran = environment.pruna_opt("run", "net.py:net", "--target", "numpy", "-o", "o", cwd=model)
    assert ran.returncode == 6
    assert "aten.hardswish.default" in ran.stderr
    assert "net.py:14" in ran.stderr
    assert not (model / "o").exists() or not list((model / "o").rglob("manifest.json"))


def test_the_operator_s_rule_lets_channels_through_it_be_pruned(
    environment: Environment, model: Path
) -> None:
    ran = environment.pruna_opt(
        "run", "net.py:net", "-p", "canonicalize,prune-channels{ratio=0.5},expand-hardswish",
        "--target", "numpy", "-o", "out", cwd=model,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    from safetensors.numpy import load_file

    (tensors,) = (model / "out").rglob("tensors.safetensors")
    shapes = {name.strip("%"): array.shape for name, array in load_file(tensors).items()}
    assert shapes["beta"] == (5,)
    assert shapes["gated_weight"] == (5, 6)
    assert shapes["head_weight"] == (3, 5)


OPERATOR = """
import torch
import acme_pruna.swish as m
from pruna_ir.registry import kernels

arguments = (
    torch.randn(2, 3, 1, 5, dtype=torch.float64, requires_grad=True),
    torch.randn(3, 1, 1, dtype=torch.float64, requires_grad=True),
)
torch.library.opcheck(m.swish, arguments)
assert torch.autograd.gradcheck(m.swish, arguments)
torch.testing.assert_close(m.swish(*arguments), m.swish_reference(*arguments))
assert m.swish(torch.tensor([0.0, 2.0]), torch.tensor(0.0)).tolist() == [0.0, 1.0]
assert kernels()[torch.ops.acme.swish.default] is m.KERNEL
"""


def test_the_operator_is_sound(environment: Environment, tmp_path: Path) -> None:
    run(environment.scripts / "python", "-c", OPERATOR, cwd=tmp_path)


# -- plugins that cannot be used ---------------------------------------------------------------


def test_a_name_that_two_distributions_claim(
    environment: Environment, install: Install, model: Path
) -> None:
    groups = {"pruna_ir.passes": {"expand-hardswish": "bolt_pruna:Shrink"}}
    install("bolt", "0.3", groups, {"bolt_pruna.py": PASS.format(version=1)})
    listed = environment.pruna_opt("list", cwd=model)
    assert listed.returncode == 0, listed.stderr
    asked = environment.pruna_opt("run", "plain.py:net", "-p", "expand-hardswish", cwd=model)
    assert asked.returncode == 7
    for told in (listed.stderr, asked.stderr):
        assert "pruna-ir-acme 1.2.0" in told
        assert "bolt 0.3" in told


def test_another_interface_version(
    environment: Environment, install: Install, model: Path
) -> None:
    groups = {"pruna_ir.passes": {"shrink": "bolt_pruna:Shrink"}}
    install("bolt", "0.3", groups, {"bolt_pruna.py": PASS.format(version=99)})
    asked = environment.pruna_opt("run", "plain.py:net", "-p", "shrink", cwd=model)
    assert asked.returncode == 7
    told = " ".join(asked.stderr.split())
    assert "pass 'shrink' of bolt 0.3 is written for interface version 99" in told
    assert "but pruna-ir 0." in told
    assert "has version 1" in told


def test_a_broken_plugin_is_a_warning_until_it_is_asked_for(
    environment: Environment, install: Install, model: Path
) -> None:
    groups = {
        "pruna_ir.passes": {"shrink": "bolt_pruna:Shrink"},
        "pruna_ir.kernels": {"bolt": "bolt_pruna:KERNEL"},
    }
    install("bolt", "0.3", groups, {"bolt_pruna.py": "import a_package_that_is_not_there\n"})
    doctor = environment.pruna_opt("doctor", cwd=model)
    assert doctor.returncode == 0, doctor.stderr
    told = " ".join((doctor.stdout + doctor.stderr).split())
    assert "bolt 0.3" in told
    assert "a_package_that_is_not_there" in told
    unasked = environment.pruna_opt(
        "run", "plain.py:net", "-p", "canonicalize", "--target", "numpy", "-o", "out", cwd=model
    )
    assert unasked.returncode == 0, unasked.stderr
    assert "bolt 0.3" in unasked.stderr
    asked = environment.pruna_opt("run", "plain.py:net", "-p", "shrink", cwd=model)
    assert asked.returncode == 7
    assert "bolt 0.3" in asked.stderr
    assert "Traceback" not in asked.stderr


def test_a_missing_module_is_a_warning_of_list(
    environment: Environment, install: Install, model: Path
) -> None:
    install("bolt", "0.3", {"pruna_ir.backends": {"bolt": "bolt_gone:Bolt"}}, {})
    listed = environment.pruna_opt("list", cwd=model)
    assert listed.returncode == 0, listed.stderr
    assert "backend 'bolt' of bolt 0.3" in " ".join(listed.stderr.split())

"""A third party's passes and backends that misbehave on purpose, as a real distribution."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pruna_ir import registry
from pruna_ir.cli.main import main

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def make():
    return Net(), torch.randn(2, 1, 7, 5)
'''

RASCALS = '''
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pruna_ir import Effect, Pass
from pruna_ir.errors import ToolchainError
from pruna_ir.lowering import Availability, Lowered, Offender
from pruna_ir.backends.eager import Eager

aten = torch.ops.aten


@dataclass(frozen=True)
class Refuse(Pass):
    """Refuse every program."""

    name: ClassVar[str] = "refuse"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1
    why: str = "no reason"

    def rewrite(self, rw):
        raise rw.error(next(rw.calls()), self.why)


@dataclass(frozen=True)
class Lie(Pass):
    """Drop every relu and call it exact."""

    name: ClassVar[str] = "lie"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw):
        for node in rw.calls(aten.relu.default):
            rw.replace(node, rw.call(node).producer("self"))


@dataclass(frozen=True)
class Damage(Pass):
    """Leave a program whose shapes are wrong."""

    name: ClassVar[str] = "damage"
    effect: ClassVar[Effect] = Effect.EXACT
    api_version: ClassVar[int] = 1

    def rewrite(self, rw):
        node = next(rw.calls(aten.relu.default))
        new = rw.insert(aten.tanh.default, before=node, like=node,
                        self=rw.call(node).producer("self"))
        rw.replace(node, new)
        new.meta["val"] = new.meta["val"].new_empty((5, 5))


class _Backend(Eager):
    api_version: ClassVar[int] = 1


class Elsewhere(_Backend):
    """Builds here and runs elsewhere."""

    name: ClassVar[str] = "elsewhere"
    api_version: ClassVar[int] = 1

    def load(self, folder, options):
        raise ToolchainError("no such device here")


class Absent(_Backend):
    """Cannot even build."""

    name: ClassVar[str] = "absent"
    api_version: ClassVar[int] = 1

    def availability(self):
        return Availability("absent-sdk is not installed; pip install absent-sdk")


class Picky(_Backend):
    """Lowers nothing."""

    name: ClassVar[str] = "picky"
    api_version: ClassVar[int] = 1

    def unsupported(self, program):
        return [Offender.of(node, "not supported") for node in program.calls()]


class Wrong(_Backend):
    """Computes something else."""

    name: ClassVar[str] = "wrong"
    api_version: ClassVar[int] = 1

    def load(self, folder, options):
        runner = super().load(folder, options)
        right = runner.run
        runner.run = lambda inputs: [value + 1 for value in right(inputs)]
        return runner


class Buggy(_Backend):
    """Has a bug."""

    name: ClassVar[str] = "buggy"
    api_version: ClassVar[int] = 1

    def lower(self, program, folder, context):
        return 1 / 0


class Slow(_Backend):
    """Dies in the middle of writing where a file says so."""

    name: ClassVar[str] = "slow"
    api_version: ClassVar[int] = 1

    def lower(self, program, folder, context):
        lowered = super().lower(program, folder, context)
        print("library noise on stdout", flush=True)
        if Path("die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return lowered
'''

POINTS = """
[pruna_ir.passes]
refuse = rascals:Refuse
lie = rascals:Lie
damage = rascals:Damage
gone = rascals_gone:Gone

[pruna_ir.backends]
elsewhere = rascals:Elsewhere
absent = rascals:Absent
picky = rascals:Picky
wrong = rascals:Wrong
buggy = rascals:Buggy
slow = rascals:Slow
"""


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin's module and its metadata, as an installer leaves them."""
    folder = tmp_path_factory.mktemp("rascals")
    (folder / "rascals.py").write_text(RASCALS)
    info = folder / "rascals-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rascals\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return folder


@pytest.fixture
def rascals(plugin: Path) -> Iterator[Path]:
    """The plugin, installed for one test."""
    sys.path.insert(0, str(plugin))
    _forget()
    yield plugin
    sys.path.remove(str(plugin))
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for cached in (registry.entries, registry.load, registry.kernels):
        cached.cache_clear()


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and streams."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Opt = Callable[..., Ran]


@pytest.fixture
def opt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Opt:
    """Runs a command in this process, in a folder of its own that holds ``net.py``."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        seen = capsys.readouterr()
        return Ran(code, seen.out, seen.err)

    return run


@pytest.fixture
def opt_process(tmp_path: Path, plugin: Path) -> Opt:
    """Runs a command as a process of its own, with the plugin installed."""
    (tmp_path / "net.py").write_text(NET)

    def run(*arguments: str | Path) -> Ran:
        import os

        done = subprocess.run(
            [sys.executable, "-m", "pruna_ir", *map(str, arguments)],
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
            env={**os.environ, "PYTHONPATH": str(plugin)},
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    return run

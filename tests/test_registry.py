"""The registry against real distributions: metadata on the path, nothing imported before its time.

Every test writes the distributions that it needs, as folders that `importlib.metadata` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pruna_ir import __version__, registry
from pruna_ir.errors import PluginError, UsageError
from pruna_ir.registry import BACKENDS, COUPLING_RULES, KERNELS, PASSES
from tests.wheels import write_distribution

Install = Callable[..., None]

PASS = """
from typing import ClassVar
from pruna_ir.transform import Effect, Pass

class {cls}(Pass):
    name: ClassVar[str] = "{name}"
    effect: ClassVar[Effect] = Effect.EXACT
    {version}

    def rewrite(self, rw):
        pass
"""


def forget() -> None:
    registry.entries.cache_clear()
    registry.load.cache_clear()
    registry.kernels.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install distributions: ``install("acme", "1.0", {group: {name: value}}, {file: text})``."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def _install(
        name: str, version: str, groups: dict[str, dict[str, str]], files: dict[str, str]
    ) -> None:
        write_distribution(tmp_path, name, version, groups, files)
        forget()

    forget()
    yield _install
    for module in set(sys.modules) - before:
        if module.startswith("zz_"):
            del sys.modules[module]
    forget()


def source(cls: str, name: str, version: str = "api_version: ClassVar[int] = 1") -> str:
    return PASS.format(cls=cls, name=name, version=version)


# -- listing -----------------------------------------------------------------------------------


def test_lists_what_is_registered_with_its_distribution(install: Install) -> None:
    install("zz-acme", "1.2", {PASSES: {"zz-shrink": "zz_acme.shrink:Shrink"}}, {})
    (entry,) = [e for e in registry.entries(PASSES) if e.name == "zz-shrink"]
    assert entry == registry.Entry(PASSES, "zz-shrink", "zz_acme.shrink:Shrink", "zz-acme 1.2")
    assert entry.third_party


def test_ours_are_registered_under_our_own_distribution() -> None:
    ours = [e for e in registry.entries(PASSES) if not e.third_party]
    assert {"canonicalize", "fold-batch-norm", "prune-channels"} <= {e.name for e in ours}
    assert {e.distribution for e in ours} == {f"pruna-ir {__version__}"}


def test_listing_imports_nothing(install: Install) -> None:
    groups = {PASSES: {"zz-shrink": "zz_acme.shrink:Shrink"}}
    files = {"zz_acme/__init__.py": "raise RuntimeError('imported')", "zz_acme/shrink.py": ""}
    install("zz-acme", "1.2", groups, files)
    assert "zz-shrink" in [e.name for e in registry.entries(PASSES)]
    assert [p for p in registry.problems() if p.distribution == "zz-acme 1.2"] == []
    assert "zz_acme" not in sys.modules


@pytest.mark.parametrize("group", [PASSES, BACKENDS, KERNELS])
def test_every_entry_of_ours_loads(group: str) -> None:
    for entry in registry.entries(group):
        if not entry.third_party:
            registry.load(entry)


# -- unknown names -----------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError) as caught:
        registry.find(PASSES, "fold-batchnorm")
    assert str(caught.value) == "unknown pass 'fold-batchnorm'; did you mean 'fold-batch-norm'?"


def test_an_unknown_name_far_from_all_gets_the_list() -> None:
    message = registry.unknown("backend", "qqqq", ["tvm", "onnx", "onnx"])
    assert message == "unknown backend 'qqqq'; known: onnx, tvm"
    assert registry.unknown("scope", "x", []) == "unknown scope 'x'; known: none"


# -- conflicts ---------------------------------------------------------------------------------


def test_a_name_that_two_distributions_claim_names_both(install: Install) -> None:
    install("zz-acme", "1.2", {PASSES: {"zz-shrink": "zz_acme:Shrink"}}, {"zz_acme.py": ""})
    install("zz-bolt", "0.3", {PASSES: {"zz-shrink": "zz_bolt:Shrink"}}, {"zz_bolt.py": ""})
    with pytest.raises(PluginError) as caught:
        registry.find(PASSES, "zz-shrink")
    expected = (
        "pass 'zz-shrink' is registered by zz-acme 1.2 (zz_acme:Shrink) and by zz-bolt 0.3 "
        "(zz_bolt:Shrink); uninstall one"
    )
    assert str(caught.value) == expected
    assert [str(p) for p in registry.problems() if p.name == "zz-shrink"] == [expected]


def test_a_claim_on_one_of_our_names_leaves_the_others_usable(install: Install) -> None:
    groups = {PASSES: {"canonicalize": "zz_acme:Canonicalize"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": source("Canonicalize", "canonicalize")})
    with pytest.raises(PluginError, match=r"pruna-ir .* and by zz-acme 1\.2"):
        registry.find_pass("canonicalize")
    assert registry.find(PASSES, "fold-batch-norm").name == "fold-batch-norm"


@pytest.mark.parametrize("stated", [0, 2])
def test_another_interface_version_names_both_distributions(
    install: Install, stated: int
) -> None:
    text = source("Shrink", "zz-shrink", f"api_version: ClassVar[int] = {stated}")
    groups = {PASSES: {"zz-shrink": "zz_acme:Shrink"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": text})
    with pytest.raises(PluginError) as caught:
        registry.find_pass("zz-shrink")
    assert str(caught.value) == (
        f"pass 'zz-shrink' of zz-acme 1.2 is written for interface version {stated}, "
        f"but pruna-ir {__version__} has version 1; install matching versions"
    )


def test_a_version_inherited_from_ours_is_no_statement(install: Install) -> None:
    groups = {PASSES: {"zz-shrink": "zz_acme:Shrink"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": source("Shrink", "zz-shrink", "pass")})
    with pytest.raises(PluginError, match=r"does not state .* to zz_acme:Shrink"):
        registry.find_pass("zz-shrink")


def test_a_class_under_another_name_is_refused(install: Install) -> None:
    groups = {PASSES: {"zz-shrink": "zz_acme:Shrink"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": source("Shrink", "zz-grow")})
    with pytest.raises(PluginError, match=r"'zz-shrink', but .* calls itself 'zz-grow'"):
        registry.find_pass("zz-shrink")


def test_a_sound_plugin_is_found_by_name(install: Install) -> None:
    groups = {PASSES: {"zz-shrink": "zz_acme:Shrink"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": source("Shrink", "zz-shrink")})
    assert registry.find_pass("zz-shrink").name == "zz-shrink"
    assert [p for p in registry.problems(importing=True) if p.name == "zz-shrink"] == []


# -- broken plugins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import zz_nowhere", "ModuleNotFoundError: No module named 'zz_nowhere'"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("", "AttributeError: module 'zz_acme' has no attribute 'Shrink'"),
    ],
)
def test_a_broken_plugin_hurts_only_who_asks_for_it(
    install: Install, text: str, told: str
) -> None:
    groups = {PASSES: {"zz-shrink": "zz_acme:Shrink"}}
    install("zz-acme", "1.2", groups, {"zz_acme.py": text})
    assert registry.find(PASSES, "canonicalize").name == "canonicalize"
    expected = (
        f"pass 'zz-shrink' of zz-acme 1.2 cannot be imported (zz_acme:Shrink): {told}"
    )
    assert [str(p) for p in registry.problems() if p.name == "zz-shrink"] == []
    found = [str(p) for p in registry.problems(importing=True) if p.name == "zz-shrink"]
    assert found == [expected]
    with pytest.raises(PluginError) as caught:
        registry.find_pass("zz-shrink")
    assert str(caught.value) == expected


@pytest.mark.parametrize("module", ["zz_gone", "zz_acme.gone", "zz_acme.inner.gone"])
def test_a_missing_module_is_a_problem_that_listing_finds(install: Install, module: str) -> None:
    files = {"zz_acme/__init__.py": "raise RuntimeError", "zz_acme/inner/x.py": ""}
    install("zz-acme", "1.2", {PASSES: {"zz-shrink": f"{module}:Shrink"}}, files)
    found = [str(p) for p in registry.problems() if p.name == "zz-shrink"]
    assert found == [
        f"pass 'zz-shrink' of zz-acme 1.2 is broken: there is no module {module}; "
        "reinstall zz-acme"
    ]


@pytest.mark.parametrize(
    ("group", "told"),
    [
        (PASSES, "registers pass 'zz', but zz_acme:VALUE is a dict, not a class"),
        (BACKENDS, "registers backend 'zz', but zz_acme:VALUE is a dict, not a class"),
        (KERNELS, "registers kernel 'zz', but zz_acme:VALUE is a dict, not a pruna_ir.kernels"),
        (COUPLING_RULES, "coupling rule for 'zz', but zz_acme:VALUE is a dict, not a pruna_ir.c"),
    ],
)
def test_something_else_under_a_name_is_refused(install: Install, group: str, told: str) -> None:
    install("zz-acme", "1.2", {group: {"zz": "zz_acme:VALUE"}}, {"zz_acme.py": "VALUE = {}"})
    with pytest.raises(PluginError, match=f"zz-acme 1.2 .*{told}"):
        registry.load(registry.find(group, "zz"))


# -- kernels -----------------------------------------------------------------------------------

KERNEL = """
import torch
from pruna_ir.kernels.kernel import Kernel
KERNEL = Kernel(torch.ops.aten.{op}.default, torch.ops.aten.{op}.default)
"""


def test_a_broken_kernel_is_left_out_with_a_warning(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    groups = {KERNELS: {"zz-bad": "zz_bad:KERNEL", "zz-good": "zz_good:KERNEL"}}
    files = {"zz_bad.py": "import zz_nowhere", "zz_good.py": KERNEL.format(op="relu")}
    install("zz-acme", "1.2", groups, files)
    found = registry.kernels()
    assert [r.getMessage() for r in caplog.records if r.name == "pruna_ir.registry"] == [
        "warning: kernel 'zz-bad' of zz-acme 1.2 cannot be imported (zz_bad:KERNEL): "
        "ModuleNotFoundError: No module named 'zz_nowhere'; it is left out"
    ]
    assert "aten.relu.default" in map(str, found)
    assert "pruna.fake_quant.default" in map(str, found)


def test_one_operator_has_one_kernel(install: Install) -> None:
    for name in ("zz-acme", "zz-bolt"):
        module = name.replace("-", "_")
        groups = {KERNELS: {f"{name}-relu": f"{module}:KERNEL"}}
        install(name, "1.0", groups, {f"{module}.py": KERNEL.format(op="relu")})
    with pytest.raises(PluginError, match=r"aten.relu.default .* zz-acme 1\.0 .* zz-bolt 1\.0"):
        registry.kernels()


def test_ours_load_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    forget()
    registry.kernels()
    assert not [r for r in caplog.records if r.name == "pruna_ir.registry"]

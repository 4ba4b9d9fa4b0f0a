"""Who may import whom, read from the source; planted violations prove that each rule bites.

    errors < tensor_cache < spec < program < call < propagate < printer < rewrite < transform
                                                                                   (FOUNDATION)
    the rest of pruna_ir: free of circles; never imports a pass, backend or kernel but by name
    pipeline and what drives it: above everything but the command line
    passes   -> pruna_ir, kernels      (a pass may use a library of passes/, never another pass)
    backends -> pruna_ir, kernels
    kernels  -> pruna_ir.errors, torch

Packages that are no hard dependency are imported inside functions only. What stands under
``if TYPE_CHECKING`` is never executed and so is free.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.wheels import FOLDERS, ROOT, run

FOUNDATION = (
    "errors", "collector", "tensor_cache", "lazy_module", "spec", "program", "call", "propagate",
    "printer", "context", "statements", "dead_nodes", "rewrite", "transform",
)  # fmt: skip
"""Each imports only those before it."""
DRIVERS = ("pipeline", "instruments", "bisect", "reproducer", "presets", "cli", "__main__")
"""They drive passes; the rest of the core, analyses and lowering included, never imports one."""
HARD_DEPENDENCIES = frozenset({"numpy", "rich", "safetensors", "torch"})
STANDARD = frozenset(sys.stdlib_module_names)


@dataclass(frozen=True)
class Import:
    """One static import: who imports what, where, and whether at module level."""

    importer: str
    imported: str
    line: int
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(root: Path, file: Path) -> str:
    """``passes/fold_batch_norm.py`` -> ``pruna_ir.passes.fold_batch_norm``."""
    parts = list(file.relative_to(root).with_suffix("").parts)
    if parts[0] in FOLDERS:
        parts.insert(0, "pruna_ir")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    """Every module of the four source folders by its name (the links are not followed)."""
    files = [
        file
        for folder in ("pruna_ir", *FOLDERS)
        for file in sorted((root / folder).rglob("*.py"))
        if not any(
            (root / folder / part).is_symlink() for part in file.relative_to(root / folder).parts
        )
    ]
    return {module_name(root, file): file for file in files}


def imports(root: Path) -> list[Import]:
    """Every static import of every module, as the full name of a module."""
    modules = sources(root)
    return [
        found
        for name, file in modules.items()
        for found in _imports(name, file, frozenset(modules))
    ]


def _imports(name: str, file: Path, modules: frozenset[str]) -> Iterator[Import]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node, at_module_level in _executed(tree, at_module_level=True):
        for imported in _targets(node, package, modules):
            yield Import(name, imported, node.lineno, at_module_level)


def _executed(
    tree: ast.AST, *, at_module_level: bool
) -> Iterator[tuple[ast.expr | ast.stmt, bool]]:
    """Every node that can run, with whether importing the module runs it."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other, at_module_level
                yield from _executed(other, at_module_level=at_module_level)
            continue
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, (ast.stmt, ast.expr)):
            yield child, at_module_level
        yield from _executed(child, at_module_level=at_module_level and not inside)


def _targets(node: ast.AST, package: str, modules: frozenset[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        full = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in modules else base for name in full]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func)
        if called in ("__import__", "import_module", "importlib.import_module"):
            return [str(node.args[0].value)]
    return []


def layer(module: str) -> str:
    """``passes``, ``backends``, ``kernels``, ``core`` or, outside pruna_ir, the top package."""
    parts = module.split(".")
    if parts[0] != "pruna_ir":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "core"


def core_part(module: str) -> str:
    """``pruna_ir.coupling.rules`` -> ``coupling``; empty for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def registered(root: Path) -> frozenset[str]:
    """The modules that the entry points name: each is one pass or one backend."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project.get("entry-points", {})
    return frozenset(
        value.partition(":")[0]
        for group in ("pruna_ir.passes", "pruna_ir.backends")
        for value in groups.get(group, {}).values()
    )


# -- the rules: each returns its violations ----------------------------------------------------


def foundation_out_of_order(found: list[Import]) -> list[Import]:
    def later(i: Import) -> bool:
        importer, imported = core_part(i.importer), core_part(i.imported)
        if layer(i.importer) != "core" or layer(i.imported) != "core":
            return False
        if importer not in FOUNDATION or importer == imported or not imported:
            return False
        return imported not in FOUNDATION[: FOUNDATION.index(importer)]

    return [i for i in found if later(i)]


def pipeline_seen_from_below(found: list[Import]) -> list[Import]:
    return [
        i
        for i in found
        if layer(i.importer) in ("core", *FOLDERS)
        and core_part(i.importer) not in DRIVERS
        and layer(i.imported) == "core"
        and core_part(i.imported) in DRIVERS
    ]


def core_reaching_down(found: list[Import]) -> list[Import]:
    return [i for i in found if layer(i.importer) == "core" and layer(i.imported) in FOLDERS]


def passes_and_backends_crossing(found: list[Import], units: frozenset[str]) -> list[Import]:
    def crosses(i: Import) -> bool:
        importer, imported = layer(i.importer), layer(i.imported)
        if importer not in ("passes", "backends") or imported not in ("passes", "backends"):
            return False
        return importer != imported or (i.imported in units and i.importer != i.imported)

    return [i for i in found if crosses(i)]


def kernels_reaching_out(found: list[Import]) -> list[Import]:
    def allowed(i: Import) -> bool:
        outside = layer(i.imported) not in ("core", *FOLDERS)
        if outside:
            return i.imported.split(".")[0] in {"torch", *STANDARD} or not i.at_module_level
        return layer(i.imported) == "kernels" or i.imported == "pruna_ir.errors"

    return [i for i in found if layer(i.importer) == "kernels" and not allowed(i)]


def optional_at_module_level(found: list[Import]) -> list[Import]:
    known = {"pruna_ir", *HARD_DEPENDENCIES, *STANDARD}
    return [i for i in found if i.at_module_level and i.imported.split(".")[0] not in known]


def cycle(found: list[Import]) -> list[str]:
    """Modules of pruna_ir that import one another in a circle at module level; empty for none."""
    graph: dict[str, set[str]] = {}
    for i in found:
        if i.at_module_level and i.imported.startswith("pruna_ir.") and i.imported != i.importer:
            graph.setdefault(i.importer, set()).add(i.imported)
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        circles = (visit(next_, [*trail, module]) for next_ in sorted(graph.get(module, ())))
        circle = next((c for c in circles if c), [])
        done.add(module)
        return circle

    return next((c for module in sorted(graph) if (c := visit(module, []))), [])


def heavy_for_help(found: list[Import], start: str = "pruna_ir.cli.main") -> list[Import]:
    """Third-party packages that importing the command line's main module would import."""
    by_importer: dict[str, list[Import]] = {}
    for i in found:
        if i.at_module_level:
            by_importer.setdefault(i.importer, []).append(i)
    seen: set[str] = set()
    waiting, heavy = [start, "pruna_ir", "pruna_ir.cli"], []
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for i in by_importer.get(module, ()):
            top = i.imported.split(".")[0]
            if top == "pruna_ir":
                waiting.append(i.imported)
            elif top not in STANDARD:
                heavy.append(i)
    return heavy


# -- the tree ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree() -> list[Import]:
    return imports(ROOT)


def test_every_source_folder_is_read(tree: list[Import]) -> None:
    assert {layer(i.importer) for i in tree} == {"core", *FOLDERS}


def test_the_foundation_imports_only_what_stands_below(tree: list[Import]) -> None:
    assert told(foundation_out_of_order(tree)) == []


def test_only_drivers_import_the_pipeline(tree: list[Import]) -> None:
    assert told(pipeline_seen_from_below(tree)) == []


def test_the_core_never_imports_a_pass_backend_or_kernel(tree: list[Import]) -> None:
    assert told(core_reaching_down(tree)) == []


def test_passes_and_backends_never_import_one_another(tree: list[Import]) -> None:
    assert told(passes_and_backends_crossing(tree, registered(ROOT))) == []


def test_kernels_import_errors_and_torch_only(tree: list[Import]) -> None:
    assert told(kernels_reaching_out(tree)) == []


def test_optional_packages_are_imported_inside_functions(tree: list[Import]) -> None:
    assert told(optional_at_module_level(tree)) == []


def test_no_module_imports_itself_in_a_circle(tree: list[Import]) -> None:
    assert cycle(tree) == []


def test_the_command_line_starts_without_third_party_packages(tree: list[Import]) -> None:
    assert "pruna_ir.cli.main" in sources(ROOT)
    assert told(heavy_for_help(tree)) == []


def test_importing_the_command_line_imports_no_torch() -> None:
    code = "import sys, pruna_ir.cli.main; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.split() == ["False", "False"]


# -- the controls ------------------------------------------------------------------------------


def plant(root: Path, files: dict[str, str]) -> list[Import]:
    """The imports of a small tree in which the links are as in ours."""
    for folder in ("pruna_ir", *FOLDERS):
        (root / folder).mkdir()
    for folder in FOLDERS:
        (root / "pruna_ir" / folder).symlink_to(Path("..", folder))
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return imports(root)


def told(violations: list[Import]) -> list[str]:
    return [str(v) for v in violations]


def test_a_low_module_that_imports_a_high_one_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "pruna_ir/program.py": "def f():\n    from pruna_ir.call import Call\n",
            "pruna_ir/call.py": "from .transform import Pass\n",
            "pruna_ir/transform.py": "from pruna_ir import program\n",
            "pruna_ir/verify.py": "from pruna_ir.program import Program\n",
        },
    )
    assert told(foundation_out_of_order(found)) == [
        "pruna_ir.call:1 imports pruna_ir.transform",
        "pruna_ir.program:2 imports pruna_ir.call",
    ]


def test_an_analysis_that_imports_the_pipeline_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "pruna_ir/pipeline.py": "import pruna_ir.coupling.rules\n",
            "pruna_ir/coupling/rules.py": "from pruna_ir import pipeline\n",
            "pruna_ir/bisect.py": "from pruna_ir import pipeline\n",
            "passes/tune.py": "def f():\n    from pruna_ir.pipeline import Pipeline\n",
        },
    )
    assert told(pipeline_seen_from_below(found)) == [
        "pruna_ir.coupling.rules:1 imports pruna_ir.pipeline",
        "pruna_ir.passes.tune:2 imports pruna_ir.pipeline",
    ]
    assert cycle(found) == [
        "pruna_ir.pipeline", "pruna_ir.coupling.rules", "pruna_ir.pipeline",
    ]  # fmt: skip


def test_a_core_module_that_imports_a_kernel_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "kernels/ffn.py": "import torch\n",
            "pruna_ir/a.py": "def f():\n    from pruna_ir.kernels.ffn import KERNEL\n",
            "pruna_ir/b.py": "import importlib\nimportlib.import_module('pruna_ir.passes.x')\n",
            "pruna_ir/c.py": "if TYPE_CHECKING:\n    from pruna_ir.kernels.ffn import KERNEL\n",
        },
    )
    assert told(core_reaching_down(found)) == [
        "pruna_ir.a:2 imports pruna_ir.kernels.ffn",
        "pruna_ir.b:2 imports pruna_ir.passes.x",
    ]


def test_passes_and_backends_that_import_one_another_are_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "passes/fold.py": "from pruna_ir.passes import algebra\nfrom .prune import Prune\n",
            "passes/prune.py": "import pruna_ir.backends.eager\n",
            "passes/algebra.py": "from pruna_ir.transform import Rewrite\n",
            "backends/eager.py": "def f():\n    from pruna_ir.passes.algebra import x\n",
        },
    )
    units = frozenset({"pruna_ir.passes.fold", "pruna_ir.passes.prune", "pruna_ir.backends.eager"})
    assert told(passes_and_backends_crossing(found, units)) == [
        "pruna_ir.passes.fold:2 imports pruna_ir.passes.prune",
        "pruna_ir.passes.prune:1 imports pruna_ir.backends.eager",
        "pruna_ir.backends.eager:2 imports pruna_ir.passes.algebra",
    ]


def test_a_kernel_that_imports_the_core_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "kernels/kernel.py": "import torch\nfrom pruna_ir.errors import PassError\n",
            "kernels/ffn.py": "from .kernel import Kernel\nfrom pruna_ir.program import Program\n",
            "kernels/tile.py": "import numpy\ndef f():\n    import triton\n",
            "pruna_ir/errors.py": "",
            "pruna_ir/program.py": "",
        },
    )
    assert told(kernels_reaching_out(found)) == [
        "pruna_ir.kernels.ffn:2 imports pruna_ir.program",
        "pruna_ir.kernels.tile:1 imports numpy",
    ]


def test_an_optional_package_at_module_level_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "backends/a.py": "import json, onnx\ndef f():\n    import openvino\n",
            "backends/b.py": "class B:\n    from tvm import relax\n    def f(self): import onnx\n",
        },
    )
    assert told(optional_at_module_level(found)) == [
        "pruna_ir.backends.a:1 imports onnx",
        "pruna_ir.backends.b:2 imports tvm",
    ]


def test_torch_behind_the_command_line_is_found(tmp_path: Path) -> None:
    found = plant(
        tmp_path,
        {
            "pruna_ir/__init__.py": "",
            "pruna_ir/cli/main.py": "from pruna_ir import registry\nfrom . import out\n",
            "pruna_ir/cli/out.py": "def show():\n    import rich\n",
            "pruna_ir/registry.py": "import json\nfrom pruna_ir.program import Program\n",
            "pruna_ir/program.py": "import torch\n",
        },
    )
    assert told(heavy_for_help(found)) == ["pruna_ir.program:1 imports torch"]

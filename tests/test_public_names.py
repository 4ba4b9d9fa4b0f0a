"""The names that ``pruna_ir`` offers, whichever submodule was imported before."""

import subprocess
import sys

import pytest

import pruna_ir


@pytest.mark.parametrize("name", sorted(set(pruna_ir.__all__) - {"__version__"}))
def test_public_names_come_from_their_homes(name):
    value = getattr(pruna_ir, name)
    assert callable(value)
    assert value.__module__ == f"pruna_ir.{pruna_ir._HOMES[name]}"


@pytest.mark.parametrize(
    "first", ["", "import pruna_ir.capture, pruna_ir.verify", "import pruna_ir.cost"]
)
def test_a_function_is_not_hidden_by_the_submodule_of_its_name(first):
    code = f"{first}\nfrom pruna_ir import capture, verify\nprint(capture, verify)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("<function capture")
    assert "<function verify" in done.stdout


def test_importing_the_package_does_not_import_torch():
    code = "import sys, pruna_ir; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pruna_ir.nothing  # noqa: B018

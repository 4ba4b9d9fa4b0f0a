"""Help without torch, streams, exit codes of bugs and interruptions."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from pruna_ir.cli.arguments import make_parser
from pruna_ir.cli.exit_codes import EXIT_CODES
from pruna_ir.errors import PrunaError
from tests.cli.conftest import Opt

CHECK = """
import sys
from pruna_ir.cli.main import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "rich", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["list"]])
def test_help_and_list_import_nothing_heavy(arguments: list[str]) -> None:
    code = CHECK.format(arguments=arguments)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "pruna_ir", "--help"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds


def test_help_documents_the_exit_code_of_every_error() -> None:
    documented = {code for code, _ in EXIT_CODES}

    def kinds(cls: type[PrunaError]) -> set[int]:
        return {cls.exit_code}.union(*map(kinds, cls.__subclasses__()))

    assert kinds(PrunaError) <= documented
    text = make_parser().format_help()
    for code, meaning in EXIT_CODES:
        assert f"{code:3d}  {meaning}" in text


def test_an_unknown_command_is_a_usage_error(opt: Opt) -> None:
    assert opt("optimise").code == 2
    assert opt().code == 2


def test_a_bug_is_told_from_the_users_errors(opt: Opt, rascals: object) -> None:
    arguments = ("run", "net.py:make", "--target", "buggy", "-o", "out")
    ran = opt(*arguments)
    assert ran.code == 70
    assert "ZeroDivisionError: division by zero" in ran.err
    assert "This is a bug" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in opt(*arguments, "--debug").err


def test_errors_are_json_too(opt: Opt) -> None:
    ran = opt("explain", "fold-batch-nrom", "--json")
    assert ran.code == 2
    assert ran.json()["error"]["exit_code"] == 2
    assert "did you mean 'fold-batch-norm'?" in ran.json()["error"]["message"]
    assert ran.err.startswith("error: ")


def test_what_libraries_print_does_not_reach_stdout(opt_process: Opt) -> None:
    ran = opt_process("run", "net.py:make", "--target", "slow", "-o", "out", "--json",
                      "--repeats", "0")  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json()["artifacts"][0]["verdict"] == "PASSED"
    assert "library noise" in ran.err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m pruna_ir explain prune-channels | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")

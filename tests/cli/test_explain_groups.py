"""explain-groups: formats, filters and files; errors come before long work and leave nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Opt


def test_a_table_with_one_row_a_group(opt: Opt) -> None:
    ran = opt("explain-groups", "net.py:make")
    assert ran.code == 0, ran.err
    assert "\x1b" not in ran.out
    lines = ran.out.splitlines()
    assert lines[1].split() == ["group", "kind", "channels", "of", "indices", "prunable",
                                "members"]  # fmt: skip
    trunk = next(line for line in lines if line.startswith("  conv.weight[0]"))
    assert trunk.split()[1:5] == ["conv", "6", "1", "yes"]
    assert "in norm.weight[0]" in trunk
    frozen = next(line for line in lines if line.startswith("  head.weight[0]"))
    assert "no: program output output (aten.linear.default, " in frozen
    assert "net.py:14)" in frozen
    assert lines[-1].endswith("2 groups of channels; 1 may lose channels, 1 stay")


def test_json_by_name_by_flag_and_by_ending_is_the_same(opt: Opt, tmp_path: Path) -> None:
    by_name = opt("explain-groups", "net.py:make", "--format", "json").json()
    by_flag = opt("explain-groups", "net.py:make", "--json").json()
    ran = opt("explain-groups", "net.py:make", "-o", "map.json")
    assert ran.out == ""
    assert "written to map.json" in ran.err
    assert by_name == by_flag == json.loads((tmp_path / "map.json").read_text())
    assert len(by_name["groups"]) == 2


def test_a_drawing_is_written_whole(opt: Opt, tmp_path: Path) -> None:
    (tmp_path / "map.html").write_text("old")
    assert opt("explain-groups", "net.py:make", "-o", "map.html").code == 0
    page = (tmp_path / "map.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.endswith("</html>\n")
    assert "conv2d 6x1x3x3" in page
    assert {path.name for path in tmp_path.iterdir()} >= {"net.py", "map.html"}
    assert not list(tmp_path.glob(".*"))


def test_filters_by_name_and_kind(opt: Opt) -> None:
    named = opt("explain-groups", "net.py:make", "--filter", "head", "--json").json()
    assert {group["name"] for group in named["groups"]} == {"conv.weight[0]", "head.weight[0]"}
    kind = opt("explain-groups", "net.py:make", "--kind", "conv", "--json").json()
    assert "conv.weight[0]" in {group["name"] for group in kind["groups"]}
    assert all(group["kind"] == "conv" for group in kind["groups"])


def test_other_passes_may_run_before(opt: Opt) -> None:
    text = "canonicalize,fold-batch-norm"
    found = opt("explain-groups", "net.py:make", "-p", text, "--json").json()
    assert found["pipeline"].endswith("fold-batch-norm")
    assert "norm" not in {layer["name"] for layer in found["layers"]}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--kind", "head"), 2, "unknown kind 'head'; did you mean 'heads'?"),
        (("--filter", "neck.*"), 2, "no group has a tensor or layer that matches 'neck.*'"),
        (("--format", "html", "--json"), 2, "--json and --format html contradict each other"),
        (("-o", "."), 2, "is a folder; give a file"),
        (("-p", "canonicalise"), 2, "did you mean"),
        (("-o", "net.py/map.html"), 6, "cannot be written"),
    ],
)
def test_errors_are_one_screen_and_leave_nothing(
    opt: Opt, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    ran = opt("explain-groups", "net.py:make", *arguments)
    assert (ran.code, ran.out if "--json" not in arguments else "") == (code, "")
    assert said in ran.err
    assert len(ran.err.splitlines()) < 12
    assert {path.name for path in tmp_path.iterdir()} <= {"net.py", "__pycache__"}


def test_help_teaches_and_is_quick(opt_process: Opt) -> None:
    start = time.perf_counter()
    ran = opt_process("explain-groups", "--help")
    # Half a second is the promise; a machine at work takes its time.
    assert time.perf_counter() - start < 2
    assert ran.code == 0
    for word in ("attention heads", "--kind", "-o coupling.html", "net.py:make"):
        assert word in ran.out

"""The list comes from metadata and source; explain tells what a name promises and takes."""

from __future__ import annotations

import sys

import pytest
import torch

from pruna_ir.cli.listing import describe, source_file
from tests.cli.conftest import Opt


def test_the_list_is_complete_and_says_what_each_is(opt: Opt) -> None:
    ran = opt("list", "--json")
    rows = {(row["kind"], row["name"]): row for row in ran.json()}
    assert {kind for kind, _ in rows} == {"passes", "backends", "presets"}
    row = rows["passes", "fold-batch-norm"]
    assert (row["effect"], row["description"][:7]) == ("rounding", "Replace")
    assert rows["backends", "eager"]["description"]
    assert ("presets", "int8") in rows


@pytest.mark.parametrize("what", ["passes", "backends", "presets"])
def test_one_kind_alone(opt: Opt, what: str) -> None:
    assert {row["kind"] for row in opt("list", what, "--json").json()} == {what}
    assert opt("list", what).out.startswith(f"{what}:\n  ")


def test_a_plugin_is_listed_without_being_imported(opt: Opt, rascals: object) -> None:
    sys.modules.pop("rascals", None)
    ran = opt("list")
    assert "Refuse every program. [exact] (rascals 1.0)" in ran.out
    assert "warning: pass 'gone' of rascals 1.0 is broken" in ran.err
    assert "rascals" not in sys.modules


def test_sources_are_found_without_importing_packages() -> None:
    before = set(sys.modules)
    assert source_file("xmlrpc.client").name == "client.py"
    assert source_file("no_such_package.inner") is None
    assert source_file("xmlrpc.absent") is None
    assert describe("xmlrpc.client:ServerProxy")[0].startswith("uri")
    assert describe("xmlrpc.client:Absent") == ("", "")
    assert "xmlrpc.client" not in set(sys.modules) - before


def test_explain_shows_contract_effect_and_options(opt: Opt) -> None:
    ran = opt("explain", "prune-channels")
    assert ran.code == 0
    assert "Effect: oracle: another function that the pass states exactly" in ran.out
    assert "ratio         float, default 0.5" in ran.out
    assert "pruna-opt run model.pt2 -p 'prune-channels{ratio=0.5" in ran.out
    assert ">>>" not in ran.out
    options = opt("explain", "prune-channels", "--json").json()["options"]
    assert {"name": "ranking", "type": "str", "default": "layer"} in options


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("eager", "backend", "Can execute here: yes"),
        ("int8", "preset", "-p 'canonicalize,"),
        ("exit-codes", "exit-codes", "70  a bug in pruna-opt itself"),
    ],
)
def test_explain_knows_other_names(opt: Opt, name: str, kind: str, said: str) -> None:
    assert said in opt("explain", name).out
    assert opt("explain", name, "--json").json()["kind"] == kind


def test_explain_of_a_broken_plugin_is_a_plugin_error(opt: Opt, rascals: object) -> None:
    ran = opt("explain", "gone")
    assert ran.code == 7
    assert "rascals 1.0" in ran.err


def test_every_preset_parses_once_its_passes_exist() -> None:
    from pruna_ir.pipeline import Pipeline
    from pruna_ir.presets import PRESETS

    for preset in PRESETS:
        assert str(Pipeline.parse(preset.pipeline)).startswith("canonicalize,")


def test_doctor_names_what_is_missing(opt: Opt, rascals: object) -> None:
    ran = opt("doctor", "--json")
    assert ran.code == 0
    found = ran.json()
    assert found["backends"]["eager"] == {"build": "", "execute": ""}
    assert "pip install absent-sdk" in found["backends"]["absent"]["build"]
    assert any("rascals_gone" in problem for problem in found["problems"])
    assert found["packages"]["torch"]
    if not torch.cuda.is_available():
        assert found["backends"]["tvm{device=cuda}"]["execute"].startswith("no CUDA device")
    text = opt("doctor").out
    assert "absent     build:   absent-sdk is not installed; pip install absent-sdk" in text

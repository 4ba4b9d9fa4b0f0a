"""Measured tiles: what is faster is taken, kept in a file, and changes no result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pruna_ir.backends import tvm_convolutions, tvm_products, tvm_tuning
from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_build import host_target
from pruna_ir.backends.tvm_convolutions import Convolution, Place
from pruna_ir.backends.tvm_products import Product, Registers
from pruna_ir.backends.tvm_runtime import processor_features
from pruna_ir.backends.tvm_tiles import (
    RECORDS,
    Record,
    Tiles,
    described,
    read_records,
    write_records,
)
from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.errors import UsageError
from pruna_ir.lowering import Verdict
from pruna_ir.program import Program
from pruna_ir.transform import Context

AVX512 = Registers(16, 32)
PLACE = Place(Convolution(16, 32, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)), 9, 14, blocked=True)
PRODUCT = Product(10, 40, 24)


def network() -> Program:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
              torch.nn.Linear(32 * 36, 40))  # fmt: skip
    return capture(torch.nn.Sequential(*layers).eval(), (torch.randn(2, 3, 6, 6),))


def output(artifact: Artifact) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 6), np.float32)
    (result,) = artifact.load().run([x])
    return result


@pytest.fixture(scope="module")
def by_rule(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(network(), ToTvm(), tmp_path_factory.mktemp("rule") / "tvm")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[tuple[str, int, int]]]:
    told: list[tuple[str, int, int]] = []
    context = Context(progress=lambda *told_: told.append(told_))
    folder = tmp_path_factory.mktemp("tuned") / "tvm"
    return build(network(), ToTvm(tune=30.0), folder, context), told


Tuned = tuple[Artifact, list[tuple[str, int, int]]]


def test_no_tuning_unless_it_is_asked_for(by_rule: Artifact) -> None:
    assert not (by_rule.folder / RECORDS).exists()
    assert by_rule.manifest.facts["tiles"] == {"measured": 0, "by rule": 2}


def test_every_operator_is_measured_and_recorded(tuned: Tuned) -> None:
    artifact, told = tuned
    assert artifact.manifest.facts["tiles"] == {"measured": 2, "by rule": 0}
    assert RECORDS in artifact.manifest.files
    content = json.loads((artifact.folder / RECORDS).read_text())
    assert content["target"] == str(host_target())
    kinds = [record["operator"]["kind"] for record in content["records"]]
    assert sorted(kinds) == ["convolution", "product"]
    for record in content["records"]:
        tiles = [row["tile"] for row in record["medians"]]
        assert tiles[0] == record["rule"]
        assert record["tile"] in tiles
        assert 1 < len(tiles) <= tvm_tuning.CANDIDATES
        assert all(row["milliseconds"] > 0 for row in record["medians"])
    assert [step for step in told if step[0] == "tvm: tune"] == [
        ("tvm: tune", 0, 2), ("tvm: tune", 1, 2), ("tvm: tune", 2, 2)
    ]  # fmt: skip


def test_tuning_changes_no_result(by_rule: Artifact, tuned: Tuned) -> None:
    """Every tile adds up the same products in the same order."""
    assert tuned[0].certificate.verdict is Verdict.PASSED
    assert np.array_equal(output(tuned[0]), output(by_rule))


# -- records --------------------------------------------------------------------------------------


def record(operator: Any, tile: Any, rule: Any) -> Record:
    medians = [{"tile": asdict(t), "milliseconds": 1.0} for t in (rule, tile)]
    return Record(described(operator), asdict(tile), asdict(rule), medians)


def other(operator: Any) -> Any:
    """A tile that fits and is not the rule's."""
    if isinstance(operator, Place):
        return operator.tiles(16)[1]
    return tvm_products.ranked_tiles(operator.rows, operator.columns, operator.depth, AVX512)[1]


def test_a_record_is_used_where_it_fits_and_the_rule_elsewhere() -> None:
    records = [
        record(PLACE, other(PLACE), tvm_convolutions.rule(PLACE, 16)),
        record(PRODUCT, other(PRODUCT), tvm_products.rule(PRODUCT, AVX512)),
    ]
    tiles = Tiles(records)
    assert tiles.convolution(PLACE, 16) == other(PLACE)
    assert tiles.product(PRODUCT, AVX512) == other(PRODUCT)
    wider = Product(10, 41, 24)
    assert tiles.product(wider, AVX512) == tvm_products.rule(wider, AVX512)
    assert tiles.counts() == {"measured": 2, "by rule": 1}
    assert tiles.unmeasured() == [wider]


def test_without_records_the_rule_decides() -> None:
    """The control."""
    tiles = Tiles()
    assert tiles.convolution(PLACE, 16) == tvm_convolutions.rule(PLACE, 16) != other(PLACE)
    assert tiles.product(PRODUCT, AVX512) == tvm_products.rule(PRODUCT, AVX512) != other(PRODUCT)


def test_records_round_trip(tmp_path: Path) -> None:
    records = [record(PLACE, other(PLACE), tvm_convolutions.rule(PLACE, 16))]
    write_records(tmp_path / RECORDS, records, "here")
    tiles = Tiles(read_records(tmp_path / RECORDS, "here"))
    assert tiles.convolution(PLACE, 16) == other(PLACE)
    write_records(tmp_path / "again.json", tiles.records, "here")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / RECORDS).read_bytes()


def test_a_later_build_takes_the_records(tuned: Tuned, tmp_path: Path) -> None:
    """With `tune` as well: there is nothing left to measure."""
    told: list[str] = []
    artifact = build(
        network(), ToTvm(records=str(tuned[0].folder / RECORDS), tune=30.0), tmp_path / "tvm",
        Context(progress=lambda what, done, total: told.append(f"{what} {done}/{total}")),
    )  # fmt: skip
    assert artifact.manifest.facts["tiles"] == {"measured": 2, "by rule": 0}
    assert (artifact.folder / RECORDS).read_bytes() == (tuned[0].folder / RECORDS).read_bytes()
    assert [step for step in told if "tune" in step] == ["tvm: tune 0/0"]


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_records(path, [record(PLACE, other(PLACE), other(PLACE))], "here")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda _: None, r"cannot be read as tuning records: FileNotFoundError.*tune again"),
        (lambda path: path.write_text("{"), r"cannot be read as tuning records: JSONDecodeError"),
        (lambda path: path.write_text("[]"), r"cannot be read as tuning records: TypeError"),
        (damaged(lambda c: c["records"][0].pop("tile")), r"cannot be read .* missing .*tile"),
        (damaged(lambda c: c.pop("target")), r"cannot be read as tuning records: KeyError"),
        (damaged(lambda c: c.update(format=2)), r"has format 2, but this version reads 1"),
        (damaged(lambda c: c.update(target="znver1")),
         r"was measured for znver1, but this build is for here; tune again here, or build"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_refused(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / RECORDS)
    with pytest.raises(UsageError, match=message):
        read_records(tmp_path / RECORDS, "here")


def test_records_of_another_processor_are_refused_by_a_build(
    tuned: Tuned, tmp_path: Path
) -> None:
    backend = ToTvm(cpu="x86-64-v3", records=str(tuned[0].folder / RECORDS))
    with pytest.raises(UsageError, match=r"but this build is for .*x86-64-v3"):
        build(network(), backend, tmp_path / "tvm")


def test_a_tile_that_does_not_fit_is_refused() -> None:
    large = tvm_convolutions.Tile(8, 14)
    tiles = Tiles([record(PLACE, large, other(PLACE))])
    with pytest.raises(UsageError, match=r"names the tile .*columns': 14.* does not fit"):
        tiles.convolution(PLACE, 16)


# -- measuring ------------------------------------------------------------------------------------


def asked(*places: Place) -> Tiles:
    tiles = Tiles()
    for place in places:
        tiles.convolution(place, 16)
    return tiles


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def test_the_budget_ends_tuning_after_the_most_work() -> None:
    small = Place(PLACE.convolution, 3, 7, blocked=True)
    records = tvm_tuning.tune(asked(small, PLACE), host_target(), 1e-9, silent, candidates=2)
    assert [r.operator for r in records] == [described(PLACE)]


def test_what_is_not_float32_or_leaves_no_choice_is_left_to_the_rule() -> None:
    narrow = Place(Convolution(16, 16, 1, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), 1, 1,
                   blocked=True)  # fmt: skip
    tiles = asked(replace(PLACE, dtype="uint8"), narrow)
    assert tvm_tuning.tune(tiles, host_target(), 9.0, silent) == []
    assert tiles.counts() == {"measured": 0, "by rule": 2}


def test_the_faster_tile_is_found() -> None:
    """One column at a time is slower than twelve; the ranking is given the wrong way round."""
    constants = Convolution(64, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    place = Place(constants, 28, 28, blocked=True)
    slow, fast = tvm_convolutions.Tile(1, 1), tvm_convolutions.rule(place, 6)
    tiles = asked(place)
    tiles.candidates[place] = [slow, fast]
    (found,) = tvm_tuning.tune(tiles, host_target(), 1.0, silent)
    assert (found.rule, found.tile) == (asdict(slow), asdict(fast))
    tiles.candidates[place] = [fast, slow]
    (found,) = tvm_tuning.tune(tiles, host_target(), 1.0, silent)
    assert (found.rule, found.tile) == (asdict(fast), asdict(fast))


@pytest.mark.skipif("amx_int8" in processor_features(), reason="asks for a processor without AMX")
def test_another_processors_code_is_not_measured_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot run code for .*sapphirerapids.*lacks amx-bf16"):
        build(network(), ToTvm(cpu="sapphirerapids", tune=1.0), tmp_path / "tvm")

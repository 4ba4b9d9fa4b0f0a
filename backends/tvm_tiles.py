"""Register tiles: from records of what was measured, else by rule.

``tuning.json`` beside an artifact holds a record for each convolution and product that was tuned:

    {"format": 1, "target": "...", "tvm": "0.27.0", "records": [
      {"operator": {"kind": "product", "rows": 64, "columns": 768, "depth": 3072, "batch": 1,
                    "dtype": "float32"},
       "tile": {"rows": 8, "vectors": 3, "lanes": 16}, "rule": {...},
       "medians": [{"tile": {...}, "milliseconds": 0.41}, ..]}]}

A later build of the same or another network takes its records instead of measuring again. Tiles
say nothing about results: every tile adds up the same products in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pruna_ir.backends import tvm_convolutions, tvm_products
from pruna_ir.backends.tvm_convolutions import Place
from pruna_ir.backends.tvm_products import Product, Registers
from pruna_ir.errors import UsageError

RECORDS = "tuning.json"
FORMAT = 1

Tile = tvm_convolutions.Tile | tvm_products.Tile
Operator = Place | Product


@dataclass(frozen=True)
class Record:
    """What was measured of one convolution or product.

    Attributes:
        operator: its constants, as `described` gives them.
        tile: the tile to use.
        rule: the tile that the rule chooses.
        medians: milliseconds of every tile that was measured.
    """

    operator: Mapping[str, Any]
    tile: Mapping[str, int]
    rule: Mapping[str, int]
    medians: Sequence[Mapping[str, Any]]


@dataclass
class Tiles:
    """The tile of each convolution and product of a build, and what was asked for.

    Attributes:
        records: tiles that were measured.
        candidates: for every operator that was asked for, the tiles that fit, the rule's first.
        calls: how often each was asked for.
    """

    records: Sequence[Record] = ()
    candidates: dict[Operator, list[Tile]] = field(default_factory=dict)
    calls: dict[Operator, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._measured = {_key(record.operator): record for record in self.records}

    def convolution(self, place: Place, vectors: int) -> tvm_convolutions.Tile:
        """The tile of a convolution."""
        found = self._choose(place, place.tiles(vectors))
        assert isinstance(found, tvm_convolutions.Tile)
        return found

    def product(self, product: Product, registers: Registers) -> tvm_products.Tile:
        """The tile of a product."""
        sizes = product.rows, product.columns, product.depth
        found = self._choose(product, tvm_products.ranked_tiles(*sizes, registers))
        assert isinstance(found, tvm_products.Tile)
        return found

    def _choose(self, operator: Operator, candidates: Sequence[Tile]) -> Tile:
        self.candidates[operator] = list(candidates)
        self.calls[operator] = self.calls.get(operator, 0) + 1
        record = self._measured.get(_key(described(operator)))
        if record is None:
            return candidates[0]
        fitting = [tile for tile in candidates if asdict(tile) == dict(record.tile)]
        if not fitting:
            raise UsageError(
                f"a tuning record names the tile {dict(record.tile)} for {described(operator)}, "
                "which does not fit there; tune again"
            )
        return fitting[0]

    def unmeasured(self) -> list[Operator]:
        """The operators asked for of which there is no record."""
        return [o for o in self.calls if _key(described(o)) not in self._measured]

    def counts(self) -> dict[str, int]:
        """How many of the operators asked for have a measured tile, and how many the rule's."""
        by_rule = len(self.unmeasured())
        return {"measured": len(self.calls) - by_rule, "by rule": by_rule}


def described(operator: Operator) -> dict[str, Any]:
    """An operator's constants as plain values."""
    kind = "product" if isinstance(operator, Product) else "convolution"
    return {"kind": kind, **asdict(operator)}


def _key(operator: Mapping[str, Any]) -> str:
    return json.dumps(operator, sort_keys=True)


def write_records(path: Path, records: Iterable[Record], target: str) -> None:
    """Write records as readable JSON."""
    content = {
        "format": FORMAT,
        "target": target,
        "tvm": version("apache-tvm"),
        "records": [asdict(record) for record in records],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_records(path: Path, target: str) -> list[Record]:
    """The records in a file.

    Args:
        path: a ``tuning.json``.
        target: the target that they are to serve.

    Raises:
        UsageError: the file cannot be read, or its records are of another target.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        form, tuned = content["format"], content["target"]
        records = [Record(**record) for record in content["records"]]
        for record in records:
            _key(record.operator), dict(record.tile)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read as tuning records: {type(error).__name__}: {error}; give the "
            f"{RECORDS} of an artifact, or tune again"
        ) from error
    if form != FORMAT:
        raise UsageError(
            f"{path} has format {form}, but this version reads {FORMAT}; tune again"
        )
    if tuned != target:
        raise UsageError(
            f"{path} was measured for {tuned}, but this build is for {target}; tune again here, "
            "or build without records"
        )
    return records


__all__: Sequence[str] = (
    "RECORDS", "Operator", "Record", "Tile", "Tiles", "described", "read_records",
    "write_records",
)  # fmt: skip

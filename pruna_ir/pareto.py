"""The Pareto front of a search for bit widths: what was measured, and what can be had for it.

Each point gives every layer a width. Its cost is a sum over layers; what it loses is *predicted*
by a sum over layers of what each loses alone, and *measured* by running all of them together. The
file holds both, so that whoever reads it sees how far the sum can be trusted.

`to_json` and `from_json` are inverse; `pruna_ir.pareto_drawing` draws it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from pruna_ir.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class FrontPoint:
    """A width for every layer.

    Attributes:
        cost: in the unit of the search.
        predicted: what it loses, as a sum over layers.
        measured: what it loses, with all layers quantised together.
        widths: by layer; empty where ``label`` says it all.
        label: a width that all layers have, for points of reference.
    """

    cost: float
    predicted: float
    measured: float
    widths: Mapping[str, str]
    label: str = ""


@dataclass(frozen=True)
class LayerChoices:
    """What one layer, or several that go together, costs and loses at each width.

    Attributes:
        layer: its path; those of several joined by `` + ``.
        cost: by width.
        lost: by measure, by width; as measured, so that a loss may be below 0.
    """

    layer: str
    cost: Mapping[str, float]
    lost: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class BitSearch:
    """All that a search measured and found.

    Attributes:
        target: the backend whose grids were used.
        cost: what costs count, such as ``size``.
        unit: of costs, such as ``bytes``.
        measure: what is lost, such as ``noise``.
        samples: how many samples were run.
        reference: the cost of the float program.
        fixed: the part of every cost that no layer's width changes.
        layers: in graph order.
        front: Pareto optimal points by rising cost.
        uniform: points with one width for all layers.
        chosen: the point that was taken.
        inserted: by measure, what the program loses as it was quantised in the end, with the
            residual adds, pools and results that the target quantises too; empty where it is
            float.
        inserted_cost: what that program costs, counted or measured anew.
    """

    target: str
    cost: str
    unit: str
    measure: str
    samples: int
    reference: float
    fixed: float
    layers: tuple[LayerChoices, ...]
    front: tuple[FrontPoint, ...]
    uniform: tuple[FrontPoint, ...]
    chosen: FrontPoint
    inserted: Mapping[str, float]
    inserted_cost: float

    def to_json(self) -> str:
        """The search as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> BitSearch:
        """The search that `to_json` wrote.

        Raises:
            UsageError: the text is no such search.
        """
        try:
            plain = json.loads(text)
            version = plain.pop("format")
            if version != FORMAT:
                raise UsageError(f"a bit search of format {version}, but {FORMAT} is read here")
            layers = tuple(_read(LayerChoices, row) for row in plain.pop("layers"))
            front, uniform = (
                tuple(_read(FrontPoint, p) for p in plain.pop(key)) for key in ("front", "uniform")
            )
            chosen = _read(FrontPoint, plain.pop("chosen"))
            return _read(
                BitSearch,
                {**plain, "layers": layers, "front": front, "uniform": uniform, "chosen": chosen},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"not a saved bit search: {error}") from error

    def bits(self) -> tuple[str, ...]:
        """The chosen widths as the option ``bits`` of insert-fake-quant."""
        return bits_option(self.chosen.widths)

    def summary(self) -> str:
        """One line: what it costs, what it was predicted to lose and what it does lose."""
        share = self.chosen.cost / self.reference if self.reference else math.nan
        return (
            f"{self.chosen.cost:.6g} {self.unit} ({share:.1%} of float), {self.measure} "
            f"{self.chosen.predicted:.3g} predicted, {self.chosen.measured:.3g} measured for the "
            "layers together"
        )


T = TypeVar("T")


def _read(kind: type[T], row: Mapping[str, Any]) -> T:
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # all are dataclasses
    if set(row) != names:
        raise UsageError(
            f"a saved {kind.__name__} has the entries {', '.join(sorted(names))}, not "
            f"{', '.join(sorted(map(str, row)))}"
        )
    return kind(**row)


def bits_option(widths: Mapping[str, str]) -> tuple[str, ...]:
    """Widths by layer as entries of an option ``bits``; what is inside another comes later.

    >>> bits_option({"a.b": "w4a8", "a": "w8a8", "x[0]": "float"})
    ('a:w8a8', 'x[[]0]:float', 'a.b:w4a8')
    """
    entries = sorted(widths.items(), key=lambda entry: (entry[0].count("."), entry[0]))
    return tuple(f"{literal(name)}:{width}" for name, width in entries)


def literal(name: str) -> str:
    """A glob that names nothing but this name, and what is inside it.

    >>> literal("blocks[*]")
    'blocks[[][*]]'
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

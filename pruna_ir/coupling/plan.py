"""RemovalPlan: which indices of which tensor dimensions go, as a value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pruna_ir.errors import UsageError


@dataclass(frozen=True)
class RemovalPlan:
    """What is removed: tensor name -> dimension -> sorted indices.

    A plan is data: print it, save it as JSON, edit it, apply it to the program that it was made
    for with `pruna_ir.coupling.remove`, which refuses a plan that breaks a coupling.

    >>> plan = RemovalPlan({"fc.weight": {0: (1, 4)}, "fc.bias": {0: (1, 4)}})
    >>> print(plan)
    fc.bias: dimension 0 loses 2: 1, 4
    fc.weight: dimension 0 loses 2: 1, 4
    >>> RemovalPlan.from_json(plan.to_json()) == plan
    True
    """

    removed: Mapping[str, Mapping[int, tuple[int, ...]]]

    def __bool__(self) -> bool:
        return any(indices for _, _, indices in self.items())

    def items(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Every (tensor name, dimension, removed indices), sorted."""
        for name, dims in sorted(self.removed.items()):
            for dim, indices in sorted(dims.items()):
                yield name, dim, indices

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: dimension {dim} loses {len(indices)}: {_ranges(indices)}"
            for name, dim, indices in self.items()
        )

    def to_json(self) -> str:
        """The plan as JSON: ``{"format": 1, "removed": {name: {"dim": [indices]}}}``."""
        removed: dict[str, dict[str, list[int]]] = {}
        for name, dim, indices in self.items():
            removed.setdefault(name, {})[str(dim)] = list(indices)
        return json.dumps({"format": 1, "removed": removed})

    @staticmethod
    def from_json(text: str) -> RemovalPlan:
        """The inverse of `to_json`; indices may stand in any order.

        Raises:
            UsageError: the text is no plan.
        """
        try:
            data = json.loads(text)
            if data["format"] != 1:
                raise ValueError(f"format {data['format']} is not 1")
            return RemovalPlan(
                {
                    str(name): {int(dim): _indices(given) for dim, given in dims.items()}
                    for name, dims in data["removed"].items()
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this is not a removal plan: {error}") from error


def _indices(given: list[object]) -> tuple[int, ...]:
    for index in given:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"{index!r} is not an index")
    return tuple(sorted({index for index in given if isinstance(index, int)}))


def _ranges(indices: tuple[int, ...]) -> str:
    """``1-3, 7`` for (1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

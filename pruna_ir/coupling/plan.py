"""RemovalPlan: which indices of which tensor dimensions go, as a value.

As JSON a plan is meant to be read and edited by hand:

    {
     "format": 2,
     "shapes": {"fc1.weight": [10, 3], "fc2.weight": [2, 10]},
     "removed": {
      "fc1.weight": {"0": [1, 4]},
      "fc2.weight": {"1": [1, 4]}
     }
    }

``shapes`` are those of the tensors before removal: a plan for another model is refused by the
first of them that differs. Format 1 had none and is still read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pruna_ir.errors import UsageError

FORMAT = 2

Shapes = Mapping[str, Sequence[int]]
"""Tensor name -> shape."""


@dataclass(frozen=True)
class RemovalPlan:
    """What is removed: tensor name -> dimension -> sorted indices.

    A plan is data: print it, save it as JSON, edit it, apply it to the program that it was made
    for with the pass ``apply-plan`` (or `pruna_ir.coupling.remove`), which refuses a plan that
    breaks a coupling; two in a row are one plan (`then`).

    Attributes:
        removed: what goes.
        shapes: the shapes before removal of the tensors that it names, where they are known.

    >>> plan = RemovalPlan({"fc.weight": {0: (1, 4)}, "fc.bias": {0: (1, 4)}})
    >>> print(plan)
    fc.bias: dimension 0 loses 2: 1, 4
    fc.weight: dimension 0 loses 2: 1, 4
    >>> RemovalPlan.from_json(plan.to_json()) == plan
    True
    """

    removed: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Shapes = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(indices for _, _, indices in self.items())

    def items(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Every (tensor name, dimension, removed indices), sorted."""
        for name, dims in sorted(self.removed.items()):
            for dim, indices in sorted(dims.items()):
                yield name, dim, indices

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: dimension {dim} loses {self._count(name, dim, indices)}: {_ranges(indices)}"
            for name, dim, indices in self.items()
        )

    def _count(self, name: str, dim: int, indices: tuple[int, ...]) -> str:
        count = str(len(indices))
        return f"{count} of {self.shapes[name][dim]}" if name in self.shapes else count

    # -- against a model -------------------------------------------------------------------

    def with_shapes(self, shapes: Shapes) -> RemovalPlan:
        """This plan, with the shapes of the tensors that it names.

        Raises:
            UsageError: a tensor, dimension or index that it names does not exist.
        """
        self.check(shapes)
        return RemovalPlan(
            self.removed, {name: tuple(shapes[name]) for name in sorted(self.removed)}
        )

    def check(self, shapes: Shapes) -> None:
        """Compare the plan with a model, given as the shapes of its tensors.

        Raises:
            UsageError: the plan is for another model; the first tensor that tells is named.
        """
        for name in sorted({*self.removed, *self.shapes}):
            if name not in shapes:
                raise UsageError(f"the plan names {name}, which is no tensor of the program")
            actual = tuple(shapes[name])
            if name in self.shapes and tuple(self.shapes[name]) != actual:
                raise UsageError(
                    f"the plan is for a model whose {name} is {list(self.shapes[name])}, but here "
                    f"it is {list(actual)}"
                )
            _check_indices(name, self.removed.get(name, {}), actual)

    def then(self, other: RemovalPlan, shapes: Shapes | None = None) -> RemovalPlan:
        """One plan that removes what this one and then ``other`` remove.

        Where this one leaves groups of a group norm with one channel each, ``other`` may remove
        whole groups; no single plan for the original program can, and applying it is refused.

        Args:
            other: a plan for the program that this plan leaves, numbered as there.
            shapes: the tensors' shapes before this plan; needed where the plan has none.

        Raises:
            UsageError: a shape is missing, or ``other`` does not fit what this plan leaves.

        >>> first = RemovalPlan({"w": {0: (0, 2)}}, {"w": (5, 3)})
        >>> print(first.then(RemovalPlan({"w": {0: (1,), 1: (2,)}})))
        w: dimension 0 loses 3 of 5: 0, 2-3
        w: dimension 1 loses 1 of 3: 2
        """
        known = {**self.shapes, **(shapes or {})}
        self.check(known)
        missing = sorted(name for name in other.removed if name not in known)
        if missing:
            raise UsageError(
                f"composing plans needs the shape of {missing[0]} before the first; give shapes"
            )
        other.check({name: self._left(name, shape) for name, shape in known.items()})
        removed: dict[str, dict[int, tuple[int, ...]]] = {
            name: dict(dims) for name, dims in self.removed.items()
        }
        for name, dim, indices in other.items():
            before = removed.setdefault(name, {}).get(dim, ())
            kept = sorted(set(range(known[name][dim])) - set(before))
            removed[name][dim] = tuple(sorted({*before, *(kept[index] for index in indices)}))
        return RemovalPlan(removed).with_shapes(known)

    def _left(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor after this plan."""
        dims = self.removed.get(name, {})
        return tuple(size - len(set(dims.get(dim, ()))) for dim, size in enumerate(shape))

    # -- as text ---------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON, a line a dimension; see the module's docstring for its form."""
        removed: dict[str, dict[str, list[int]]] = {}
        for name, dim, indices in self.items():
            removed.setdefault(name, {})[str(dim)] = list(indices)
        shapes = {name: list(shape) for name, shape in sorted(self.shapes.items())}
        return (
            f'{{\n "format": {FORMAT},\n "shapes": {json.dumps(shapes)},\n "removed": '
            f"{{{_lines(removed)}}}\n}}\n"
        )

    @staticmethod
    def from_json(text: str) -> RemovalPlan:
        """The inverse of `to_json`; indices may stand in any order.

        Raises:
            UsageError: the text is no plan.
        """
        try:
            data = json.loads(text)
            if data["format"] not in (1, FORMAT):
                raise ValueError(f"format {data['format']} is not {FORMAT}")
            return RemovalPlan(
                {
                    str(name): {int(dim): _indices(given) for dim, given in dims.items()}
                    for name, dims in data["removed"].items()
                },
                {str(name): _sizes(given) for name, given in data.get("shapes", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"this is not a removal plan: {error}") from error


def _lines(removed: Mapping[str, Mapping[str, list[int]]]) -> str:
    """The body of the JSON object, a line a tensor."""
    rows = (f"  {json.dumps(name)}: {json.dumps(dims)}" for name, dims in removed.items())
    return "\n" + ",\n".join(rows) + "\n " if removed else ""


def _check_indices(
    name: str, dims: Mapping[int, tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    for dim, indices in sorted(dims.items()):
        if not 0 <= dim < len(shape):
            raise UsageError(f"the plan names dimension {dim} of {name}, which has {len(shape)}")
        if outside := [index for index in indices if not 0 <= index < shape[dim]]:
            raise UsageError(
                f"the plan names index {outside[0]} of dimension {dim} of {name}, which has "
                f"{shape[dim]}"
            )


def _whole_number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not an index")
    return value


def _indices(given: list[object]) -> tuple[int, ...]:
    return tuple(sorted(set(map(_whole_number, given))))


def _sizes(given: list[object]) -> tuple[int, ...]:
    return tuple(map(_whole_number, given))


def _ranges(indices: tuple[int, ...]) -> str:
    """``1-3, 7`` for (1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

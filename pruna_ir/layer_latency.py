"""Layer latency: what each layer's FLOPs and time were before and after, side by side.

    speed-up of a layer = its time in the original artifact / its time in the optimised one

A layer is a module of the user's that costs FLOPs. Times come from the runtime's own profiler
(`pruna_ir.lowering.ProfiledRunner`), whose names hold a module's path or a node's name; what is
fused into a layer, or follows it element by element, is counted with it (norm, activation).
A layer counts as not faster where its FLOPs fell but its time by less than a tenth. Profiling
costs time itself, so totals are above those of unprofiled runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from pruna_ir.cost import NodeCost, cost
from pruna_ir.program import Program, module_path, shape_of
from pruna_ir.report import Table, quantity

FASTER = 1.1
"""The least speed-up of a layer that counts as one."""
OTHER = "(everything else)"


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after; FLOPs at batch 1, times in milliseconds.

    Attributes:
        layer: the path of the user's module; the node's name where it has none.
        operator: what it computes.
        flops: before.
        new_flops: after.
        time: before.
        new_time: after.
    """

    layer: str
    operator: str
    flops: int
    new_flops: int
    time: float
    new_time: float

    @property
    def speedup(self) -> float:
        """Time before over time after."""
        return self.time / self.new_time if self.new_time > 0 else float("inf")

    @property
    def slow(self) -> bool:
        """Whether the layer computes less but is not faster."""
        return self.new_flops < self.flops and self.speedup < FASTER


def compare_layers(
    before: Program,
    after: Program,
    times: Mapping[str, float],
    new_times: Mapping[str, float],
) -> list[LayerRow]:
    """A row for each layer that both programs and profiles have, and one for everything else.

    Args:
        before: the program of the original artifact.
        after: that of the optimised one.
        times: milliseconds by the runtime's layer names, of the original.
        new_times: the same, of the optimised one.
    """
    old, new = _Layers(before), _Layers(after)
    spent, new_spent = old.times(times), new.times(new_times)
    rows = [
        LayerRow(
            layer, old.operators[layer], flops, new.flops[layer], spent[layer], new_spent[layer]
        )
        for layer, flops in old.flops.items()
        if layer in new.flops and layer in spent and layer in new_spent
    ]
    known = sum(row.time for row in rows), sum(row.new_time for row in rows)
    rest = sum(times.values()) - known[0], sum(new_times.values()) - known[1]
    return [*rows, LayerRow(OTHER, "", 0, 0, *rest)]


class _Layers:
    """The layers of one program: FLOPs and operators by module path."""

    def __init__(self, program: Program) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._last_of = {module_path(node): node for node in program.calls()}
        self._layer_of = {row.node: row.module or row.node for row in _costly(program)}
        self.flops: dict[str, int] = {}
        self.operators: dict[str, str] = {}
        for row in _costly(program):
            layer = self._layer_of[row.node]
            self.flops[layer] = self.flops.get(layer, 0) + row.flops
            word = row.operator.removeprefix("aten.").partition(".")[0]
            self.operators.setdefault(layer, word)

    def times(self, profile: Mapping[str, float]) -> dict[str, float]:
        """The time of each layer that the profile names."""
        found: dict[str, float] = {}
        for name, spent in profile.items():
            layer = self._layer(name)
            if layer is not None:
                found[layer] = found.get(layer, 0.0) + spent
        return found

    def _layer(self, name: str) -> str | None:
        """The layer behind a runtime's name: its path is a part of it, or a node's name is."""
        parts = name.split("/")
        if parts[0] in self.flops:
            return parts[0]
        own = parts[-1].removeprefix("node_").removesuffix("_nchwc")
        # A fused layer may bear the name of the norm or activation that was fused into it.
        node = self._nodes.get(own) or self._last_of.get(parts[0])
        while node is not None and node.name not in self._layer_of:
            inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
            node = inputs[0] if inputs and _keeps_shape(node) else None
        return None if node is None else self._layer_of[node.name]


def _costly(program: Program) -> list[NodeCost]:
    return [row for row in cost(program).nodes if row.flops]


def _keeps_shape(node: fx.Node) -> bool:
    """Whether a call's result has the shape of its first operand: norms, activations, sums."""
    shapes = [shape_of(node), *(shape_of(n) for n in node.all_input_nodes[:1])]
    return len(shapes) == 2 and str(shapes[0]) == str(shapes[1])


def layer_table(target: str, rows: list[LayerRow]) -> Table:
    """The rows as a table, the slowest after optimisation first."""
    columns = ("layer", "operator", "FLOPs", "after", "ms", "after", "speed-up", "remark")
    ordered = sorted(rows, key=lambda row: -row.new_time)
    return (
        f"layers in {target}",
        columns,
        [
            [
                row.layer,
                row.operator,
                quantity(row.flops) if row.flops else "",
                quantity(row.new_flops) if row.flops else "",
                f"{row.time:.3f}",
                f"{row.new_time:.3f}",
                f"{row.speedup:.2f}x",
                "did not speed up" if row.slow else "",
            ]
            for row in ordered
        ],
    )

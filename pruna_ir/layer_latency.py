"""Layer latency: what each layer's FLOPs and time were before and after, side by side.

    speed-up of a layer = its time in the original artifact / its time in the optimised one

A layer is a module of the user's that costs FLOPs. Times come from the runtime's own profiler
(`pruna_ir.lowering.ProfiledRunner`), whose names hold a module's path or a node's name; what is
fused into a layer, or follows it element by element, is counted with it (norm, activation).
A layer counts as not faster where its FLOPs fell but its time by less than a tenth. Profiling
costs time itself, so totals are above those of unprofiled runs. What a runtime folds beyond
recognition stands under "everything else".
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from pruna_ir.cost import NodeCost, cost
from pruna_ir.latency import Clock
from pruna_ir.lowering import ProfiledRunner
from pruna_ir.program import Program, module_path, shape_of
from pruna_ir.report import OTHER, LayerRow

RUNS = 10
"""Profiled runs a round."""
ROUNDS = 5

Arrays = Sequence[np.ndarray[Any, Any]]


def profile(
    runners: Sequence[ProfiledRunner],
    inputs: Sequence[Arrays],
    *,
    budget_s: float = 4.0,
    clock: Clock = time.perf_counter,
) -> list[dict[str, float]]:
    """Milliseconds by the runtime's layer names, of each runner on its own inputs.

    The runners take turns; a layer's time is the median over rounds, each of which gives the
    median of `RUNS` runs. No round starts after ``budget_s`` seconds; two are run in any case,
    and the first does not count.
    """
    taken: list[dict[str, list[float]]] = [{} for _ in runners]
    start = clock()
    for number in range(ROUNDS + 1):
        if number >= 2 and clock() - start > budget_s:
            break
        for runner, own, rows in zip(runners, inputs, taken, strict=True):
            for name, spent in runner.layer_times(own, RUNS if number else 1).items():
                rows.setdefault(name, []).extend([spent] if number else [])
    return [{name: statistics.median(t) for name, t in rows.items() if t} for rows in taken]


def layer_times(program: Program, times: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by the path of each layer with FLOPs, from those by the runtime's names.

    Layers that the profile does not name are missing; one without a module goes by its node.
    """
    return _Layers(program).times(times)


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
    rows = []
    for layer, flops in new.flops.items():
        # What was several layers may be one operator now.
        parts = [part for part in new.fused.get(layer, (layer,)) if part in old.flops]
        if parts and layer in new_spent and all(part in spent for part in parts):
            rows.append(
                LayerRow(
                    layer=" + ".join(parts),
                    operator=old.operators[parts[0]],
                    flops=sum(old.flops[part] for part in parts),
                    new_flops=flops,
                    time=sum(spent[part] for part in parts),
                    new_time=new_spent[layer],
                )
            )
    known = sum(row.time for row in rows), sum(row.new_time for row in rows)
    rest = sum(times.values()) - known[0], sum(new_times.values()) - known[1]
    return [*rows, LayerRow(OTHER, "", 0, 0, *rest)]


class _Layers:
    """The layers of one program: FLOPs and operators by module path."""

    def __init__(self, program: Program) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        paths = Counter(module_path(node) for node in program.calls())
        # A module that is called twice does not tell which call is meant.
        self._only_of = {p: n for n in program.calls() if paths[p := module_path(n)] == 1}
        self._layer_of = {row.node: row.module or row.node for row in _costly(program)}
        self.flops: dict[str, int] = {}
        self.operators: dict[str, str] = {}
        self.fused: dict[str, tuple[str, ...]] = {}
        for row in _costly(program):
            layer = self._layer_of[row.node]
            if row.operator.startswith("pruna."):
                self.fused[layer] = _owners(self._nodes[row.node])
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
        own = next((part for part in reversed(parts) if part in self._nodes), "")
        # A fused layer may bear the name of the norm or activation that was fused into it.
        node = self._nodes.get(own) or self._only_of.get(parts[0])
        layer = None if node is None else self._behind(node)
        return None if layer is None else self._layer_of[layer.name]

    def _behind(self, node: fx.Node) -> fx.Node | None:
        """The call with FLOPs that a call is, or follows element by element."""
        if node.name in self._layer_of:
            return node
        for source in node.all_input_nodes:
            if source.op != "call_function" or len(source.users) > 1:
                continue
            if _same_shape(node, source) and (found := self._behind(source)) is not None:
                return found
        return None


def _owners(node: fx.Node) -> tuple[str, ...]:
    """The modules whose weights a fused operator reads, in the order of its arguments."""
    targets = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return tuple(dict.fromkeys(target.rpartition(".")[0] for target in targets))


def _costly(program: Program) -> list[NodeCost]:
    return [row for row in cost(program).nodes if row.flops]


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two results have the same shape, as those of norms, activations and sums have."""
    shapes = shape_of(one), shape_of(other)
    return None not in shapes and str(shapes[0]) == str(shapes[1])

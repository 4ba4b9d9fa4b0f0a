"""What layers cost at each width: bytes, bit operations, or time on the target.

    size        bytes of stored tensors, as `pruna_ir.cost` counts them: ceil(elements * bits / 8)
                for a weight, and 8 for each scale with its zero point
    operations  multiply-adds * bits of the weight * bits of the input, batch 1 (bit operations:
                Baskin et al., UNIQ, 2018, section 4.2; the BOPS of HAWQ-V3)
    latency     milliseconds of each layer as the target's own profiler gives them, batch 1, in
                programs that have all layers at one width (Yao et al., HAWQ-V3, ICML 2021,
                section 3.4)

Limits of size: the grids of residual adds, pools and results are left out (8 bytes each); targets
without types for a width store bytes. Limits of latency: where layers of different widths meet,
the target may have to convert, which no uniform program shows (a ResNet-20 of int8 and float
layers took 1.1 times what was predicted in ONNX Runtime, and 1.7 times in OpenVINO), so that
choose-bits measures the whole program too, and remarks on it; a layer without a time in some
profile is refused. What belongs to no layer is taken from the uniform program in which it is
slowest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx

from pruna_ir.build import build
from pruna_ir.capture import BATCH
from pruna_ir.cost import cost
from pruna_ir.errors import UsageError
from pruna_ir.layer_latency import layer_times, profile
from pruna_ir.lowering import LoadOptions, Manifest, ProfiledRunner
from pruna_ir.passes.bit_sensitivity import LayerGroup, roundings, stored_weight
from pruna_ir.passes.bit_widths import parse_width
from pruna_ir.program import Program
from pruna_ir.reexport import resized
from pruna_ir.transform import Context

CostKind = Literal["size", "operations", "latency"]
UNITS: dict[str, str] = {"size": "bytes", "operations": "bit operations", "latency": "ms"}
Profiler = Callable[[Mapping[str, Program], str, Path, int], dict[str, dict[str, float]]]
"""Milliseconds by the runtime's layer names, of each program: see `profiles`."""
_GRID = 8  # bytes: a float32 scale and an int32 zero point


@dataclass(frozen=True)
class Costs:
    """What a program costs, by layer and width.

    Attributes:
        unit: of all figures.
        table: for each group of layers, its cost at each width.
        fixed: the cost of everything else.
        reference: the cost of the float program.
    """

    unit: str
    table: tuple[dict[str, float], ...]
    fixed: float
    reference: float


@dataclass(frozen=True)
class Priced:
    """What is priced: a float program, its layers, and the program at each width.

    Attributes:
        base: the float program.
        groups: its layers.
        programs: by width; ``base`` itself for ``float``.
    """

    base: Program
    groups: Sequence[LayerGroup]
    programs: Mapping[str, Program]

    def quantised(self) -> dict[str, Program]:
        """The programs at the widths that are not float."""
        return {width: p for width, p in self.programs.items() if p is not self.base}


def costs_of(kind: CostKind, priced: Priced, target: str, seed: int) -> Costs:
    """The cost of each layer at each width.

    Raises:
        UsageError: latency is asked for, and the target has no profiler here, or its profile
            lacks a layer.
    """
    if kind == "size":
        return _sizes(priced)
    return _operations(priced) if kind == "operations" else _latencies(priced, target, seed)


# -- bytes ---------------------------------------------------------------------------------------


def _sizes(priced: Priced) -> Costs:
    base = priced.base
    total = float(cost(base).bytes)
    table = []
    own = 0.0
    for group in priced.groups:
        weights = _own_weights(base, group)
        plain = float(sum(t.numel() * t.element_size() for t in weights))
        own += plain
        table.append({
            width: plain if program is base else _packed(weights, group, program, width)
            for width, program in priced.programs.items()
        })  # fmt: skip
    return Costs(UNITS["size"], tuple(table), total - own, total)


def _own_weights(base: Program, group: LayerGroup) -> list[Tensor]:
    """The weights that nothing but the group reads; others stay float for someone else."""
    readers: dict[int, set[fx.Node]] = {}
    for get in base.graph.find_nodes(op="get_attr"):
        readers.setdefault(id(base.tensor(str(get.target))), set()).update(get.users)
    found = {id(w): w for n in group.nodes if (w := stored_weight(base, n)) is not None}
    return [weight for key, weight in found.items() if readers[key] <= set(group.nodes)]


def _packed(
    weights: Sequence[Tensor], group: LayerGroup, program: Program, width: str
) -> float:
    """The bytes of weights on their grids, and of all grids that the layers read."""
    found = parse_width(width, "widths")
    assert found is not None
    names = {node.name for node in group.nodes}
    scales = {
        id(rounding.scale): rounding.scale.numel()
        for node in program.calls() if node.name in names
        for rounding in roundings(program, node).values()
    }  # fmt: skip
    packed = sum(math.ceil(weight.numel() * found.weight / 8) for weight in weights)
    return float(packed + _GRID * sum(scales.values()))


# -- bit operations ------------------------------------------------------------------------------


def _operations(priced: Priced) -> Costs:
    macs = {row.node: row.flops / 2 for row in cost(priced.base).nodes}
    table = []
    reference = 0.0
    for group in priced.groups:
        row = dict.fromkeys(priced.programs, 0.0)
        for node in group.nodes:
            full = node.meta["val"].element_size() * 8
            reference += macs[node.name] * full**2
            for width in row:
                row[width] += macs[node.name] * _product(priced.base, node, width, full)
        table.append(row)
    inside = {node.name for group in priced.groups for node in group.nodes}
    fixed = sum(
        macs[node.name] * (8 * _item(node)) ** 2
        for node in priced.base.calls() if node.name not in inside and macs[node.name]
    )  # fmt: skip
    return Costs(UNITS["operations"], tuple(table), fixed, reference + fixed)


def _item(node: fx.Node) -> int:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return int(first.element_size())


def _product(base: Program, node: fx.Node, width: str, full: int) -> int:
    """Bits times bits; a product of two activations has both at the activations' width."""
    found = parse_width(width, "widths")
    if found is None:
        return full**2
    stored = stored_weight(base, node) is not None
    return found.activation * (found.weight if stored else found.activation)


# -- latency -------------------------------------------------------------------------------------


def _latencies(priced: Priced, target: str, seed: int) -> Costs:
    programs = {"float": priced.base, **priced.programs}
    with TemporaryDirectory(prefix="pruna-bits-") as folder:
        timed = profiles(programs, target, Path(folder), seed)
    spent = {width: layer_times(p, timed[width]) for width, p in programs.items()}
    named = {width: [_time(spent[width], g) for g in priced.groups] for width in programs}
    for width, times in named.items():
        missing = [str(g) for g, t in zip(priced.groups, times, strict=True) if t is None]
        if missing:
            raise UsageError(
                f"the profile of '{target}' gives no time for {', '.join(missing[:3])} at "
                f"{width}, which was fused beyond recognition; take of=size or of=operations"
            )
    known = {width: sum(t or 0.0 for t in times) for width, times in named.items()}
    rest = {width: max(sum(timed[width].values()) - known[width], 0.0) for width in programs}
    table = tuple(
        {width: float(named[width][number] or 0.0) for width in priced.programs}
        for number in range(len(priced.groups))
    )
    fixed = max(rest[width] for width in priced.programs)
    return Costs(UNITS["latency"], table, fixed, sum(timed["float"].values()))


def _time(spent: Mapping[str, float], group: LayerGroup) -> float | None:
    known = [spent[name] for name in group.names if name in spent]
    return sum(known) if len(known) == len(group.names) else None


def inserted_cost(
    kind: CostKind, program: Program, base: Program, costs: Costs, predicted: float, target: str,
    seed: int, profiler: Profiler | None = None,
) -> float:
    """What a quantised program costs as a whole, counted or measured anew.

    Latency is measured by the ``profiler`` (`profiles` by default) side by side with the float
    program, and given in the milliseconds that the float program took in ``costs``. Bit operations
    are what was ``predicted``.
    """
    if kind == "size":
        return float(cost(program).bytes)
    if kind == "operations":
        return predicted
    with TemporaryDirectory(prefix="pruna-bits-") as folder:
        measured = profiler or profiles
        timed = measured({"float": base, "mixed": program}, target, Path(folder), seed)
    ratio = sum(timed["mixed"].values()) / sum(timed["float"].values())
    return costs.reference * ratio


def profiles(
    programs: Mapping[str, Program], target: str, folder: Path, seed: int
) -> dict[str, dict[str, float]]:
    """Milliseconds by the runtime's layer names, of each program's artifact, batch 1, in turns.

    Raises:
        UsageError: the target has no profiler here.
    """
    runners, inputs = [], []
    for number, (width, program) in enumerate(programs.items()):
        context = Context(target=target, seed=seed)
        artifact = build(program, target, folder / str(number), context, verify=False)
        runner = artifact.load(LoadOptions(profile=True))
        if not isinstance(runner, ProfiledRunner):
            raise UsageError(
                f"'{target}' has no profiler of layers here, so that latency ({width}) cannot be "
                "measured layer by layer; take of=size or of=operations"
            )
        runners.append(runner)
        inputs.append(_inputs(artifact.manifest, program))
    return dict(zip(programs, profile(runners, inputs), strict=True))


def _inputs(manifest: Manifest, program: Program) -> list[np.ndarray[Any, Any]]:
    """The program's examples at batch 1, or at the sizes that the artifact takes."""
    sizes = {BATCH: 1}
    for spec, described in zip(program.inputs, manifest.inputs, strict=True):
        for name, taken in zip(spec.shape, described["shape"], strict=True):
            if isinstance(name, str) and isinstance(taken, int):
                sizes[name] = taken
    return [
        resized(value, spec, sizes).detach().cpu().numpy()
        for value, spec in zip(program.examples, program.inputs, strict=True)
    ]

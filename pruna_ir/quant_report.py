"""The quantisation report: what rounding costs at each layer, and in what precision it runs.

One row for each layer that reads fake-quantised operands: of each operand the bits, grid, scales,
observed range, clipped share and SQNR; of the result the noise that this layer adds by itself and
the noise that has accumulated (see `quant_measure`); and the precision in which the artifact's
runtime says that it runs the layer. Layers that stayed float follow with the reason.

Rows are sorted by the noise that the layer itself adds, the worst first: accumulated noise grows
with depth, and would put the last layers first in any network.

The float program is, in this order: the one given; the program's origin, where a pass left one
with the same calls; the program itself with its fake-quants left out.

Limits: a layer is found in an audit by the names that the runtime keeps; TVM's fused functions
keep none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

from pruna_ir.calibration import Histogram, layer_name
from pruna_ir.call import Call
from pruna_ir.cost import cost
from pruna_ir.data import DataSource
from pruna_ir.errors import UsageError
from pruna_ir.lowering import KernelRow
from pruna_ir.program import Program, computed_nodes, module_path, shape_of, source_line
from pruna_ir.quant_measure import Layer, Rounding, measure
from pruna_ir.quantization import Grid, fake_quant_op
from pruna_ir.transform import Progress, Remark, no_progress

SAMPLES = 32
"""How many samples are run unless told otherwise."""
BARS = 64
"""The most bars that a histogram is shown with."""
SHOWN = 12
"""How many layers are shown as text; JSON and HTML hold all."""
NOT_AUDITED = "not audited"
NOT_NAMED = "not named by the runtime"

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Bars:
    """A histogram to draw: bar i counts the values from ``low + i * width`` up to the next bar's.

    ``zeros``, the exact zeros, are in no bar.
    """

    low: float
    width: float
    counts: tuple[int, ...]
    zeros: int

    @staticmethod
    def of(seen: Histogram) -> Bars:
        """At most `BARS` bars, neighbouring bins added up.

        >>> import torch
        >>> seen = Histogram(bins=4)
        >>> seen.update(torch.tensor([0.5, 3.5, 0.0]))
        >>> Bars.of(seen)
        Bars(low=0.0, width=1.0, counts=(1, 0, 0, 1), zeros=1)
        """
        step = max(1, -(-len(seen.counts) // BARS))
        counts = seen.counts.tolist()
        added = tuple(sum(counts[i : i + step]) for i in range(0, len(counts), step))
        return Bars(seen.first * seen.width, seen.width * step, added, seen.zeros)


@dataclass(frozen=True)
class OperandRow:
    """One quantised operand of a layer.

    Attributes:
        name: the layer's argument, such as ``weight`` or ``input``.
        constant: whether it is a weight, and no activation.
        bits: of the grid.
        grid: such as ``u8[0, 255]``.
        granularity: ``per tensor``, ``per channel (64)`` or ``per block (4096)``, with how many
            scales there are; activations may have theirs ``at run time``.
        scale: the smallest and the largest scale.
        zero_point: the smallest and the largest zero point.
        reach: the smallest and the largest number that the grid holds, over channels.
        range: the smallest and the largest value observed.
        clipped: the share of values beyond half a step outside of the grid.
        sqnr_db: of the operand against itself unrounded; of a weight, against the float
            program's.
        bars: how the values are distributed.
    """

    name: str
    constant: bool
    bits: int
    grid: str
    granularity: str
    scale: tuple[float, float]
    zero_point: tuple[int, int]
    reach: tuple[float, float]
    range: tuple[float, float]
    clipped: float
    sqnr_db: float
    bars: Bars


@dataclass(frozen=True)
class LayerNoise:
    """One quantised layer.

    Attributes:
        layer: the path of the user's module, or the node's name.
        node: its node.
        operator: such as ``aten.conv2d``.
        source: the user's source line; empty where unknown.
        position: its place in the network, from 0.
        operands: what it reads on a grid.
        own_db: SQNR of its result against the same layer unrounded on the same input.
        accumulated_db: SQNR of its result against the float program's at the same node. Both are
            None where the result is no float tensor or the float program has no such node.
        kernel: the precision that the audit names for it; ``not audited`` without an audit.
    """

    layer: str
    node: str
    operator: str
    source: str
    position: int
    operands: tuple[OperandRow, ...]
    own_db: float | None
    accumulated_db: float | None
    kernel: str


@dataclass(frozen=True)
class FloatLayer:
    """A layer that costs FLOPs and reads nothing from a grid, and why, where a pass said so."""

    layer: str
    node: str
    operator: str
    reason: str
    kernel: str


@dataclass(frozen=True)
class QuantReport:
    """What quantisation costs, layer by layer.

    Attributes:
        target: the backend that the program is quantised for; empty where it is open.
        samples: how many samples the figures come from.
        reference: what the float program was, in words.
        layers: the worst first, by `LayerNoise.own_db`.
        floats: the layers that stayed float, in network order.
        outputs: SQNR of each float output of the program against the float program's, in dB.
    """

    target: str
    samples: int
    reference: str
    layers: tuple[LayerNoise, ...]
    floats: tuple[FloatLayer, ...]
    outputs: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; what is not finite becomes a string."""
        result: dict[str, Any] = _plain(asdict(self))
        return result

    def in_order(self) -> list[LayerNoise]:
        """The layers as they stand in the network."""
        return sorted(self.layers, key=lambda row: row.position)

    def summary(self) -> str:
        """The result in one line."""
        outputs = ", ".join(f"{name} {db(value)}" for name, value in self.outputs.items())
        return (
            f"{len(self.layers)} layers are quantised and {len(self.floats)} stayed float; "
            f"outputs against {self.reference}: {outputs or 'none are float'} dB, on "
            f"{self.samples} samples"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def quant_report(
    program: Program,
    data: DataSource,
    *,
    reference: Program | None = None,
    samples: int = SAMPLES,
    audit: Sequence[KernelRow] = (),
    remarks: Iterable[Remark] = (),
    progress: Progress = no_progress,
) -> QuantReport:
    """Measure a quantised program on data.

    Args:
        program: with fake-quants; a float one has no rows.
        data: batches of inputs, run one at a time.
        reference: the float program with the same calls (see the module's text).
        samples: how many samples to run at most.
        audit: what an artifact's runtime says that it runs, from its certificate.
        remarks: of the passes that quantised it: they say why layers stayed float.
        progress: called after each batch.

    Raises:
        UsageError: the data is empty or does not fit, or the reference has other calls.
        PassError: an activation is NaN or infinite; the layer is named.
    """
    against, words = _reference(program, reference)
    found = measure(program, against, data, samples=samples, progress=progress)
    kernels = _Kernels(program, audit)
    layers = [
        _layer_row(program, layer, found.roundings, place, kernels)
        for place, layer in enumerate(found.layers)
    ]
    quantised = {layer.node for layer in found.layers}
    return QuantReport(
        target=program.attributes.get("quantized-for", ""),
        samples=found.samples,
        reference=words,
        layers=tuple(sorted(layers, key=_badness)),
        floats=tuple(_float_layers(program, quantised, remarks, kernels)),
        outputs={name: noise.db for name, noise in found.outputs.items()},
    )


def has_report(program: Program) -> bool:
    """Whether a program has fake-quants to report on."""
    return any(program.calls(fake_quant_op()))


def _reference(program: Program, given: Program | None) -> tuple[Program, str]:
    if given is not None:
        if difference := _other_calls(program, given):
            raise UsageError(
                f"the float program is not the one that was quantised: {difference}; give the "
                "program as it was right before its quantisation, or none"
            )
        return given, "the float program"
    origin = program.origin
    if origin is not None and not origin.removed and not _other_calls(program, origin.program):
        return origin.program, "the program that was quantised"
    return program, "the program without its fake-quants"


def _other_calls(program: Program, other: Program) -> str:
    """The first call that only one of two programs has, in words; empty where there is none.

    What belongs to quantisers alone does not count.
    """
    own, others = (_calls(p) for p in (program, other))
    for name, target in own.items():
        if others.get(name) != target:
            return f"it has no call {name} of {target}"
    missing = next((name for name in others if name not in own), "")
    return f"its call {missing} is none of the quantised program" if missing else ""


def _calls(program: Program) -> dict[str, str]:
    """The operators of calls on activations, without quantisers, by name."""
    computed, op = computed_nodes(program), fake_quant_op()
    for_quantisers: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        readers = list(node.users)
        if readers and all(
            r in for_quantisers or (r.target is op and r.args[0] is not node) for r in readers
        ):
            for_quantisers.add(node)
    return {
        node.name: str(node.target)
        for node in program.calls()
        if node in computed and node.target is not op and node not in for_quantisers
    }


def _badness(row: LayerNoise) -> tuple[float, float]:
    return tuple(math.inf if v is None else v for v in (row.own_db, row.accumulated_db))  # type: ignore[return-value]


# -- rows ----------------------------------------------------------------------------------------


def _layer_row(
    program: Program,
    layer: Layer,
    roundings: Mapping[fx.Node, Rounding],
    place: int,
    kernels: _Kernels,
) -> LayerNoise:
    node = layer.node
    operands = []
    for name, _, fake in layer.operands:
        row = _operand_row(program, name, fake, roundings[fake])
        if name in layer.weights:
            row = replace(row, constant=True, sqnr_db=layer.weights[name].db)
        operands.append(row)
    return LayerNoise(
        layer=layer_name(node),
        node=node.name,
        operator=_operator(node),
        source=source_line(node),
        position=place,
        operands=tuple(operands),
        own_db=layer.own.db if layer.own is not None else None,
        accumulated_db=layer.accumulated.db if layer.accumulated is not None else None,
        kernel=kernels.precision(node),
    )


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _operand_row(program: Program, name: str, fake: fx.Node, found: Rounding) -> OperandRow:
    call = Call(program, fake)
    qmin, qmax = int(call.number("qmin")), int(call.number("qmax"))
    symmetric = qmin < 0 and found.zero_point == (0, 0)
    grid = Grid(qmin, qmax, symmetric=symmetric)
    return OperandRow(
        name=name,
        constant=False,
        bits=grid.bits,
        grid=str(grid),
        granularity=_granularity(call),
        scale=found.scale,
        zero_point=found.zero_point,
        reach=found.reach,
        range=(found.seen.low, found.seen.high),
        clipped=found.clipped / max(found.count, 1),
        sqnr_db=found.noise.db,
        bars=Bars.of(found.seen),
    )


def _granularity(call: Call) -> str:
    scale = call.parameter("scale")
    if scale is None:
        return "at run time"
    if call.arg("axis") is None:
        return "per tensor"
    x = call.producer("x")
    # Blocks are rows of a view; channels are those of the tensor itself.
    blocks = x is not None and x.op == "call_function" and len(shape_of(x) or ()) == 2
    return f"per {'block' if blocks else 'channel'} ({scale.numel()})"


def _float_layers(
    program: Program,
    quantised: set[fx.Node],
    remarks: Iterable[Remark],
    kernels: _Kernels,
) -> Iterable[FloatLayer]:
    reasons = {r.node: r.message for r in remarks if r.kind in ("missed", "note")}
    nodes = {node.name: node for node in program.calls()}
    op = fake_quant_op()
    for row in cost(program).nodes:
        node = nodes[row.node]
        if row.flops and node not in quantised and node.target is not op:
            reason = reasons.get(node.name, "")
            yield FloatLayer(
                layer_name(node), node.name, _operator(node), reason, kernels.precision(node)
            )


# -- the audit -----------------------------------------------------------------------------------

_MOVES = frozenset(
    {
        "Cast", "Convert", "DequantizeLinear", "FakeQuantize", "QuantizeLinear", "Reorder",
        "Reshape", "Transpose", "fake_quant",
    }
)  # fmt: skip
"""Kinds of kernels that only bring values into another form."""
_PRODUCTS = ("conv", "linear", "matmul", "attention")


class _Kernels:
    """The rows of an audit by the program's layers."""

    def __init__(self, program: Program, audit: Sequence[KernelRow]) -> None:
        self._audit = bool(audit)
        self._rows: dict[str, list[KernelRow]] = {}
        for row in audit:
            for part in row.layer.split("/"):
                if row.kind not in _MOVES:
                    # torch.onnx names the node of "add" "node_add".
                    self._rows.setdefault(part.removeprefix("node_"), []).append(row)
        self._paths = {
            path: [row.node for row in cost(program).nodes if row.flops and row.module == path]
            for path in {module_path(node) for node in program.calls()}
        }

    def precision(self, node: fx.Node) -> str:
        """The precision of the kernel that runs a layer, in the runtime's own report."""
        if not self._audit:
            return NOT_AUDITED
        rows = self._rows.get(node.name, [])
        path = module_path(node)
        if not rows and self._paths.get(path) == [node.name]:
            rows = self._rows.get(path, [])
        rows = [row for row in rows if row.kind in _PRODUCTS] or rows
        return ", ".join(sorted({row.precision for row in rows})) or NOT_NAMED


# -- text ----------------------------------------------------------------------------------------


def table(report: QuantReport, shown: int | None = SHOWN) -> Table:
    """The quantised layers as a table, the worst first."""
    columns = ("layer", "operator", "operand", "bits", "scales", "observed", "grid reaches",
               "clipped", "SQNR dB", "own dB", "accumulated dB", "kernel")  # fmt: skip
    rows: list[list[str]] = []
    for layer in report.layers[:shown]:
        for number, operand in enumerate(layer.operands):
            head = [layer.layer, layer.operator] if number == 0 else ["", ""]
            noise = [db(layer.own_db), db(layer.accumulated_db), layer.kernel]
            rows.append([*head, *cells(operand), *(noise if number == 0 else [""] * 3)])
    hidden = len(report.layers) - min(len(report.layers), shown or len(report.layers))
    title = f"quantised layers{f' for {report.target}' if report.target else ''}, worst first"
    return f"{title}{f' ({hidden} more are not shown)' if hidden else ''}", columns, rows


def float_table(report: QuantReport) -> Table:
    """The layers that stayed float as a table, in network order."""
    rows = [[row.layer, row.operator, row.reason, row.kernel] for row in report.floats]
    return "layers that stayed float", ("layer", "operator", "reason", "kernel"), rows


def cells(operand: OperandRow) -> list[str]:
    """An operand's name, bits, granularity, ranges, clipped share and SQNR, as text."""
    return [
        operand.name,
        str(operand.bits),
        operand.granularity,
        interval(operand.range),
        interval(operand.reach),
        f"{100 * operand.clipped:.3g}%" if operand.clipped else "0",
        db(operand.sqnr_db),
    ]


def interval(bounds: tuple[float, float]) -> str:
    """Two numbers with three digits.

    >>> interval((-1.23456, 7.0))
    '[-1.23, 7]'
    """
    if bounds[0] > bounds[1]:
        return ""
    return f"[{bounds[0]:.3g}, {bounds[1]:.3g}]"


def db(value: float | None) -> str:
    """Decibels with one digit after the point; empty for None.

    >>> db(31.25), db(math.inf), db(None)
    ('31.2', 'exact', '')
    """
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:.1f}"

"""The report of a run: one row per pass and per artifact, as data, as text and as JSON.

Per pass: whether it changed anything, nodes, parameters, FLOPs and bytes after it, the verdict of
its check with the measured error, accuracy where there are labels, and seconds. Per artifact:
size on disk, FLOPs, accuracy, latency and speed-up over the original in the same run, the
certificate's verdict with its measured error, and how many layers truly run on integers. Per
weight with zeros: their pattern and share, and what each target makes of them. Per layer of a
program that computes less than the original: FLOPs and time before and after, and whether the
time followed. Per layer of a quantised program: what rounding costs (see `quant_report`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pruna_ir import quant_report
from pruna_ir.sparsity import SparsityRow, uses

Cell = str
Table = tuple[str, Sequence[str], Sequence[Sequence[Cell]]]
"""A title, column names and rows; empty cells stand for what was not measured."""


@dataclass(frozen=True)
class Size:
    """What a program costs: FLOPs at batch 1 (two per multiply-add), parameters, stored bytes."""

    flops: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class StepRow:
    """One pass.

    Attributes:
        target: the target that it ran for; empty where it ran for all.
        text: the pass as pipeline text.
        changed: whether the program changed.
        nodes: calls after it.
        size: what the program costs after it.
        verdict: ``holds``, ``unchanged`` or ``not checked``.
        check: the check's own words, with the measured error; empty where there was none.
        measured: the measured error (dB for a bounded pass).
        limit: what it was compared with.
        seconds: of the pass itself, without its check.
        accuracy: top-1 after it, where there are labels and it changed the program.
    """

    target: str
    text: str
    changed: bool
    nodes: int
    size: Size
    verdict: str
    check: str
    measured: float | None
    limit: float | None
    seconds: float
    accuracy: float | None = None


@dataclass(frozen=True)
class LatencyRow:
    """Milliseconds of an artifact and of the original on the same backend, interleaved."""

    p50: float
    p90: float
    p99: float
    rounds: int
    original_p50: float | None
    speedup: float | None


FASTER = 1.1
"""The least speed-up of a layer that counts as one."""
OTHER = "(everything else)"
SHOWN_LAYERS = 12
"""How many layers are shown as text beside those that did not speed up; JSON holds all."""


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


@dataclass(frozen=True)
class ArtifactRow:
    """One artifact, or why there is none.

    Attributes:
        target: the backend.
        folder: where it is; empty where it failed.
        bytes: size on disk.
        original_bytes: of the unoptimised program on the same backend; None where unknown.
        size: what its program costs.
        verdict: ``PASSED``, ``FAILED``, ``NOT_RUN`` or ``ERROR``.
        verification: the certificate's summary, or the error.
        metric: the unit of ``measured``, such as ``relative error``.
        measured: the certificate's worst figure.
        limit: what it was compared with.
        exit_code: what this artifact alone would make the command exit with.
        accuracy: top-1 on the evaluation data.
        latency: None where it was not measured; ``note`` says why.
        audit: for each kind of layer, how many run in each precision.
        warnings: of the backend.
        note: why figures are missing.
        layers: FLOPs and time of each layer in the original and in this artifact, where the
            program computes less than the original and the runtime has a profiler.
    """

    target: str
    verdict: str
    verification: str
    exit_code: int
    folder: str = ""
    bytes: int | None = None
    original_bytes: int | None = None
    size: Size | None = None
    metric: str = ""
    measured: float | None = None
    limit: float | None = None
    accuracy: float | None = None
    latency: LatencyRow | None = None
    audit: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    note: str = ""
    layers: tuple[LayerRow, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        model: what the user gave.
        pipeline: the pipeline as text.
        original: what the captured program costs.
        accuracy: top-1 of the captured program, where there are labels.
        steps: the passes, in order of execution.
        artifacts: in the order of the targets.
        notes: what a reader must know, such as synthetic calibration data.
        versions: of the tools.
        seed: of everything random.
        latency_batch: the batch size of latencies.
        sparsity: the weights with zeros in the final programs.
        quantization: what quantisation costs in each quantised program, layer by layer.
    """

    model: str
    pipeline: str
    original: Size
    steps: tuple[StepRow, ...]
    artifacts: tuple[ArtifactRow, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    seed: int
    latency_batch: int
    accuracy: float | None = None
    sparsity: tuple[SparsityRow, ...] = ()
    quantization: tuple[quant_report.QuantReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; what is not finite becomes a string."""
        plain = asdict(self)
        for shown, row in zip(plain["artifacts"], self.artifacts, strict=True):
            for cells, layer in zip(shown["layers"], row.layers, strict=True):
                cells |= {"speedup": layer.speedup, "slow": layer.slow}
            shown["slow_layers"] = [layer.layer for layer in row.layers if layer.slow]
        result: dict[str, Any] = _plain(plain)
        return result


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- text ---------------------------------------------------------------------------------------


def tables(report: Report) -> list[Table]:
    """The tables that a report is shown as; columns without any value are left out."""
    found = [_steps(report)]
    if report.artifacts:
        found += [_artifacts(report), _verification(report)]
        found += [_layers(row) for row in report.artifacts]
    if report.sparsity:
        found += [_sparsity(report), _uses(report)]
    for costs in report.quantization:
        found += [quant_report.table(costs), quant_report.float_table(costs)]
    return [_without_empty(table) for table in found if table[2]]


def _steps(report: Report) -> Table:
    first = StepRow("", "(as captured)", changed=True, nodes=0, size=report.original, verdict="",
                    check="", measured=None, limit=None, seconds=0.0,
                    accuracy=report.accuracy)  # fmt: skip
    rows = [_step(first)] + [_step(row) for row in report.steps]
    columns = ("pass", "target", "changed", "calls", "parameters", "FLOPs", "bytes", "accuracy",
               "promise", "measured", "seconds")  # fmt: skip
    return "passes", columns, rows


def _step(row: StepRow) -> list[Cell]:
    captured = row.nodes == 0 and not row.verdict
    return [
        row.text if len(row.text) <= 48 else f"{row.text[:45]}...",
        row.target,
        "" if captured else ("yes" if row.changed else "no"),
        "" if captured else str(row.nodes),
        quantity(row.size.parameters),
        quantity(row.size.flops),
        quantity(row.size.bytes, "B"),
        _percent(row.accuracy),
        row.verdict,
        _figure(row.measured, row.limit, "dB" if " dB" in row.check else ""),
        "" if captured else f"{row.seconds:.2f}",
    ]


def _artifacts(report: Report) -> Table:
    columns = ("target", "size", "original", "FLOPs", "accuracy", "p50 ms", "p90 ms", "p99 ms",
               "original p50", "speed-up", "on integers")  # fmt: skip
    return "artifacts", columns, [_artifact(row) for row in report.artifacts]


def _artifact(row: ArtifactRow) -> list[Cell]:
    latency = row.latency
    times = [f"{t:.3g}" for t in (latency.p50, latency.p90, latency.p99)] if latency else [""] * 3
    original = latency.original_p50 if latency else None
    speedup = latency.speedup if latency else None
    return [
        row.target,
        quantity(row.bytes, "B"),
        quantity(row.original_bytes, "B"),
        quantity(row.size.flops if row.size else None),
        _percent(row.accuracy),
        *times,
        f"{original:.3g}" if original is not None else "",
        f"{speedup:.2f}x" if speedup is not None else "",
        integers(row.audit),
    ]


def _verification(report: Report) -> Table:
    rows = [[row.target, row.verdict, row.verification, row.note] for row in report.artifacts]
    return "verification", ("target", "verdict", "what was compared", "note"), rows


def _layers(row: ArtifactRow) -> Table:
    """The layers that take most time, and all that did not speed up."""
    ordered = sorted(row.layers, key=lambda layer: -layer.new_time)
    shown = [layer for i, layer in enumerate(ordered) if i < SHOWN_LAYERS or layer.slow]
    title, columns, rows = layer_table(row.target, shown)
    known = sum(layer.layer != OTHER for layer in row.layers)
    hidden = len(row.layers) - len(shown)
    more = f"; report.json has {hidden} more" if hidden else ""
    return f"{title} ({known}{more})", columns, rows


def layer_table(target: str, rows: Iterable[LayerRow]) -> Table:
    """Layers as a table, the slowest after optimisation first."""
    columns = ("layer", "operator", "FLOPs", "after", "ms", "after", "speed-up", "remark")
    cells = [
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
        for row in sorted(rows, key=lambda row: -row.new_time)
    ]
    return f"layers in {target}", columns, cells


def slow_layers(row: ArtifactRow) -> str:
    """A line that names the layers whose FLOPs fell and whose time did not; empty for none."""
    slow = [layer.layer for layer in row.layers if layer.slow]
    fewer = sum(layer.new_flops < layer.flops for layer in row.layers)
    if not slow:
        return ""
    return f"{row.target}: of {fewer} layers with fewer FLOPs, {len(slow)} did not speed up: " + (
        ", ".join(slow)
    )


def _notes(report: Report) -> list[str]:
    costs = (f"{c.target or 'program'}: {c.summary()}" for c in report.quantization)
    return [*report.notes, *filter(None, map(slow_layers, report.artifacts)), *costs]


def _sparsity(report: Report) -> Table:
    columns = ("weight", "pattern", "zeros", "stored", "compressed", "cuSPARSELt in float16")
    rows = [
        [
            row.weight, row.pattern, f"{row.zeros / row.entries:.1%}", quantity(row.bytes, "B"),
            quantity(row.compressed_bytes, "B"), row.cusparselt,
        ]
        for row in report.sparsity
    ]  # fmt: skip
    title = "sparsity (stored dense; compressed is what the pattern could take)"
    return title, columns, rows


def _uses(report: Report) -> Table:
    rows = [[target, pattern, str(n), use] for target, pattern, n, use in uses(report.sparsity)]
    return "zeros on the targets", ("target", "pattern", "weights", "what becomes of them"), rows


def integers(audit: dict[str, dict[str, int]]) -> str:
    """How many convolutions, linear layers and products run on integers: ``conv 20/20``.

    >>> integers({"conv": {"int8": 3, "float32": 1}, "pool": {"float32": 2}})
    'conv 3/4'
    """
    return ", ".join(
        f"{kind} {sum(n for p, n in counts.items() if 'int' in p)}/{sum(counts.values())}"
        for kind, counts in sorted(audit.items())
        if kind in ("conv", "linear", "matmul", "attention")
    )


def quantity(value: int | None, unit: str = "") -> str:
    """A number with three digits and a decimal prefix.

    >>> quantity(11689512), quantity(950, "B"), quantity(None)
    ('11.7M', '950B', '')
    """
    if value is None:
        return ""
    for exponent, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**exponent:
            return f"{value / 10**exponent:.3g}{prefix}{unit}"
    return f"{value}{unit}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _figure(measured: float | None, limit: float | None, unit: str) -> str:
    if measured is None or limit is None:
        return ""
    sign = ">=" if unit else "<="
    return f"{measured:.2g}{unit} ({sign} {limit:.2g})"


def _without_empty(table: Table) -> Table:
    title, columns, rows = table
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def plain_text(report: Report) -> str:
    """The report in aligned columns, for files and pipes."""
    parts = [aligned(table) for table in tables(report)]
    return "\n\n".join([*parts, *(f"note: {note}" for note in _notes(report))]) + "\n"


def aligned(table: Table) -> str:
    """A table in aligned columns under its title.

    >>> print(aligned(("sizes", ("name", "size"), [["conv", "12"], ["fc", ""]])))
    sizes:
      name  size
      conv  12
      fc
    """
    title, columns, rows = table
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]
    return "\n".join([f"{title}:", *(f"  {line}" for line in lines)])


def rich_text(report: Report, width: int) -> str:
    """The report as tables for a terminal of this many columns, with its escape codes."""
    notes = (f"[bold]note:[/bold] {note}" for note in _notes(report))
    return rich_tables(tables(report), width, notes)


def rich_tables(shown: Iterable[Table], width: int, notes: Iterable[str] = ()) -> str:
    """Tables, and lines of rich markup under them, for a terminal of this many columns."""
    import io

    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    for title, columns, rows in shown:
        # Names in brackets are no markup.
        table = RichTable(*columns, title=Text(title), title_justify="left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    return stream.getvalue()

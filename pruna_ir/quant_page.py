"""The quantisation report as one HTML page with inline SVG: no script, nothing from a network.

    1. a picture with one row per layer, in network order: a bar for the layer's own noise, a mark
       for the accumulated noise, ticks for what its operands lost, all in dB (longer is better)
    2. the table, the worst layer first
    3. for each layer, the worst first, the distribution of every operand with its grid's reach
    4. the layers that stayed float, and why

Colours follow the reader's choice of a light or dark page. Heights in histograms are logarithms
of counts, since what matters stands in the tails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from pruna_ir.quant_report import (
    Bars,
    LayerNoise,
    OperandRow,
    QuantReport,
    cells,
    db,
    interval,
)

ROW = 18  # px
SCALE = 460  # px, the width of the decibel axis
CHAR = 6.7  # px, a character of the 11 px monospace font
TOP = 26  # px
PLOT = (360, 84)  # px, width and height of a histogram
LEAST_TOP_DB = 40.0
STEP_DB = 10
_LONGEST_LABEL = 60

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #222222; --pale: #777777;
        --line: #e3e5e8; --band: #f4f5f7; --own: #0072b2; --sum: #d55e00; --weight: #009e73;
        --input: #b8860b; --grid: #56b4e955; --bad: #c0392b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --text: #e4e6e9; --pale: #9aa0a8; --line: #33373d; --band: #1f2227;
          --own: #56b4e9; --sum: #e69f00; --weight: #2fbf95; --input: #e0c060;
          --grid: #56b4e940; --bad: #ff7b6b; } }
body { font: 13px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
       margin: 24px; }
h1 { font-size: 18px; margin: 0 0 4px; }
h2 { font-size: 15px; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 62em; }
svg { display: block; fill: var(--text); }
text, td.name, h3 { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
h3 { font-size: 12px; margin: 0 0 2px; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 8px; }
th, td { text-align: left; vertical-align: top; padding: 2px 12px 2px 0; font-size: 12px;
         border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; }
.pale { color: var(--pale); fill: var(--pale); }
.plots { display: flex; flex-wrap: wrap; gap: 18px 28px; margin-top: 8px; }
.layer { border-top: 1px solid var(--line); padding: 10px 0 14px; }
.band { fill: var(--band); } .axis { stroke: var(--line); }
.own { fill: var(--own); } .sum { fill: var(--sum); }
.weight { stroke: var(--weight); } .input { stroke: var(--input); }
.bar { fill: var(--own); } .reach { fill: var(--grid); } .edge { stroke: var(--sum); }
.bad { color: var(--bad); }
"""


def page(report: QuantReport, title: str = "") -> str:
    """The page, as HTML.

    Args:
        report: what to show.
        title: the model's name; the target's, where it is empty.
    """
    shown = escape(title or report.target or "program")
    target = f" for {escape(report.target)}" if report.target else ""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Quantisation of {shown}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>Quantisation of {shown}{target}</h1>",
            f"<p>{escape(report.summary())}.</p>",
            "<h2>Noise, in network order</h2>",
            _LEGEND,
            f'<div class="wide">{picture(report)}</div>',
            "<h2>Layers, the worst first</h2>",
            _TABLE_NOTE,
            f'<div class="wide">{_table(report)}</div>',
            "<h2>Distributions, the worst layer first</h2>",
            _PLOT_NOTE,
            *(_layer(row) for row in report.layers),
            *_floats(report),
            "</body></html>\n",
        ]
    )


_LEGEND = (
    "<p>Signal over noise in decibels; longer is better, and 6 dB are one bit. Bar: what the "
    "layer's own rounding costs, with the same input. Disc: against the float program, so with "
    "all that the layers before it cost. Upright ticks: what its operands lost, weights green and "
    "inputs yellow. A layer with a short bar is a culprit; one with a long bar and a disc far "
    "left of its end only passes on what it was given.</p>"
)
_TABLE_NOTE = (
    "<p>Own: the layer's result, rounded operands against unrounded ones on the same input. "
    "Accumulated: against the float program. Clipped: values beyond half a step outside of the "
    "grid. Kernel: the precision in which the runtime says that it runs the layer.</p>"
)
_PLOT_NOTE = (
    "<p>Heights are logarithms of counts; exact zeros are counted in the caption. Shaded: what "
    "the grid reaches, with several scales the widest. Bars outside of it are clipped; a shaded "
    "part without bars is steps that nobody uses.</p>"
)


# -- the picture ---------------------------------------------------------------------------------


def picture(report: QuantReport) -> str:
    """Own and accumulated noise of every layer as an SVG element, in network order."""
    rows = report.in_order()
    top = _top_db(rows)
    left = 16 + CHAR * max((len(_label(row)) for row in rows), default=0)
    width, height = left + SCALE + 90, TOP + ROW * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" font-size="11" role="img" '
        'aria-label="signal over noise of every layer">'
    ]
    for number, row in enumerate(rows):
        parts.append(_picture_row(row, number, left, top))
    return "\n".join([*parts, *_axis(left, top, height), "</svg>"])


def _top_db(rows: Sequence[LayerNoise]) -> float:
    """The end of the axis: the largest finite figure of a layer, up to the next 10 dB."""
    found = [v for row in rows for v in (row.own_db, row.accumulated_db) if _finite(v)]
    largest = max((float(v) for v in found if v is not None), default=LEAST_TOP_DB)
    return max(LEAST_TOP_DB, math.ceil(largest / STEP_DB) * STEP_DB)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _at(value: float, top: float) -> float:
    """Where a figure stands on the axis, in px; below 0 dB at its start."""
    return SCALE * min(max(value, 0.0), top) / top


def _axis(left: float, top: float, height: int) -> Iterator[str]:
    for value in range(0, int(top) + 1, STEP_DB):
        x = left + _at(value, top)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - 6}"/>'
        yield f'<text class="pale" x="{x:.1f}" y="14" text-anchor="middle">{value}</text>'
    yield f'<text class="pale" x="{left + SCALE + 24:.1f}" y="14">dB</text>'


def _picture_row(row: LayerNoise, number: int, left: float, top: float) -> str:
    y = TOP + ROW * number
    tip = (
        f"{row.layer}: {row.operator}, own {_words(row.own_db)}, accumulated "
        f"{_words(row.accumulated_db)}, kernel {row.kernel}"
        + (f" ({row.source})" if row.source else "")
    )
    parts = [f"<g><title>{escape(tip)}</title>"]
    if number % 2:
        parts.append(f'<rect class="band" x="0" y="{y}" width="{left + SCALE:.0f}" '
                     f'height="{ROW}"/>')  # fmt: skip
    parts.append(f'<text x="8" y="{y + 13}">{escape(_label(row))}</text>')
    if row.own_db is not None:
        parts.append(f'<rect class="own" x="{left:.1f}" y="{y + 5}" height="8" '
                     f'width="{_at(row.own_db, top):.1f}"/>')  # fmt: skip
    for operand in row.operands:
        x = left + _at(operand.sqnr_db, top)
        kind = "weight" if operand.constant else "input"
        parts.append(f'<line class="{kind}" stroke-width="2" x1="{x:.1f}" x2="{x:.1f}" '
                     f'y1="{y + 3}" y2="{y + 15}"/>')  # fmt: skip
    if row.accumulated_db is not None:
        x = left + _at(row.accumulated_db, top)
        parts.append(f'<circle class="sum" cx="{x:.1f}" cy="{y + 9}" r="4"/>')
    return "".join([*parts, "</g>"])


def _label(row: LayerNoise) -> str:
    """The layer's name, its middle left out where it is long."""
    if len(row.layer) <= _LONGEST_LABEL:
        return row.layer
    half = (_LONGEST_LABEL - 3) // 2
    return f"{row.layer[:half]}...{row.layer[-half:]}"


def _words(value: float | None) -> str:
    return f"{db(value)} dB" if value is not None else "unknown"


# -- the table -----------------------------------------------------------------------------------

_COLUMNS = ("layer", "operator", "own dB", "accumulated dB", "kernel", "operand", "bits", "scales",
            "observed", "grid reaches", "clipped", "SQNR dB", "source")  # fmt: skip
_NUMBERS = frozenset({2, 3, 6, 10, 11})


def _table(report: QuantReport) -> str:
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in _COLUMNS)}</tr>"
    return "\n".join(["<table>", head, *(_table_rows(row) for row in report.layers), "</table>"])


def _table_rows(row: LayerNoise) -> str:
    first = [row.layer, row.operator, db(row.own_db), db(row.accumulated_db), row.kernel]
    lines = []
    for number, operand in enumerate(row.operands):
        head = first if number == 0 else [""] * len(first)
        lines.append(_cells([*head, *cells(operand), row.source if number == 0 else ""]))
    return "\n".join(lines)


def _cells(texts: Sequence[str]) -> str:
    made = []
    for place, text in enumerate(texts):
        kind = ' class="name"' if place == 0 else ' class="number"' if place in _NUMBERS else ""
        made.append(f"<td{kind}>{escape(text)}</td>")
    return f"<tr>{''.join(made)}</tr>"


# -- histograms ----------------------------------------------------------------------------------


def _layer(row: LayerNoise) -> str:
    plots = "".join(_figure(operand) for operand in row.operands)
    return (
        f'<div class="layer"><h3>{escape(row.layer)}</h3><div class="pale">'
        f"{escape(row.operator)}, own {_words(row.own_db)}, accumulated "
        f'{_words(row.accumulated_db)}</div><div class="plots">{plots}</div></div>'
    )


def _figure(operand: OperandRow) -> str:
    share = f"{100 * operand.clipped:.3g}% clipped" if operand.clipped else "none clipped"
    zeros = f", {operand.bars.zeros} zeros" if operand.bars.zeros else ""
    bad = ' class="bad"' if operand.clipped else ""
    return (
        f"<div>{histogram(operand)}<div><b>{escape(operand.name)}</b> {escape(operand.grid)} "
        f"{escape(operand.granularity)}, {db(operand.sqnr_db)} dB, <span{bad}>{share}</span>"
        f'{zeros}</div><div class="pale">observed {interval(operand.range)}, grid reaches '
        f"{interval(operand.reach)}, scale {_scales(operand.scale)}</div></div>"
    )


def _scales(scale: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" for value in scale)
    return low if low == high else f"{low} to {high}"


def histogram(operand: OperandRow) -> str:
    """An operand's distribution as an SVG element, its grid's reach shaded."""
    width, height = PLOT
    bars = operand.bars
    low = min(operand.reach[0], bars.low)
    high = max(operand.reach[1], bars.low + bars.width * len(bars.counts))
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return width * (value - low) / span

    start, end = (x(value) for value in operand.reach)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 14}" '
        f'viewBox="0 0 {width} {height + 14}" font-size="10" role="img" '
        f'aria-label="distribution of {escape(operand.name)}">',
        f'<rect class="reach" x="{start:.1f}" y="0" width="{end - start:.1f}" '
        f'height="{height}"/>',
        *_columns(bars, x, height),
        *(f'<line class="edge" x1="{e:.1f}" x2="{e:.1f}" y1="0" y2="{height}"/>'
          for e in (start, end)),
        f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>',
        f'<text class="pale" x="0" y="{height + 12}">{low:.3g}</text>',
        f'<text class="pale" x="{width}" y="{height + 12}" text-anchor="end">{high:.3g}</text>',
        "</svg>",
    ]  # fmt: skip
    return "".join(parts)


def _columns(bars: Bars, x: Callable[[float], float], height: int) -> Iterator[str]:
    most = math.log1p(max(bars.counts, default=0))
    for number, count in enumerate(bars.counts):
        if count:
            start, end = (x(bars.low + bars.width * (number + side)) for side in (0, 1))
            tall = height * math.log1p(count) / most
            yield (
                f'<rect class="bar" x="{start:.2f}" y="{height - tall:.1f}" '
                f'width="{max(end - start, 0.5):.2f}" height="{tall:.1f}"/>'
            )


def _floats(report: QuantReport) -> Iterator[str]:
    if not report.floats:
        return
    yield "<h2>Layers that stayed float</h2>"
    columns = ("layer", "operator", "reason", "kernel")
    yield f"<table><tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"
    for row in report.floats:
        texts = (row.layer, row.operator, row.reason, row.kernel)
        yield f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
    yield "</table>"

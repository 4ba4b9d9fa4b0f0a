"""Drawing of a coupling map: one HTML page with an inline SVG; no script, nothing from a network.

Every layer that owns tensors is a row, in program order from top to bottom. Every group is a
vertical line beside the rows, from the first layer that loses channels with it to the last; on a
layer's row the line carries

    a filled disc    the layer makes these channels (an output dimension of its weight)
    a ring           the layer reads them (another dimension of a weight)
    a dot            a vector goes along (bias, norm scale, running statistics)

so the layers that lose channels together are the marks on one line. Groups that stay are grey and
dashed; their reason is in the tooltip and in the list under the drawing. Lines share columns where
they do not overlap: the longest (residual trunks) stand left, next to the layers' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pruna_ir.coupling import Group, Member
from pruna_ir.coupling_map import (
    CouplingMap,
    Layer,
    in_words,
    indices_each,
    layer_name,
    per_unit,
    why_not,
)

ROW = 18  # px
LANE = 16  # px
CHAR = 6.7  # px, a character of the 11 px monospace font
TOP = 12  # px
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc3399", "#b8860b", "#56499b", "#c0392b", "#16a0a0",
    "#7f6000", "#3366ff", "#6a9a1f", "#a0522d",
)  # fmt: skip
_GREY = "#8a8a8a"
_LONGEST_LABEL = 70


@dataclass(frozen=True)
class Lane:
    """One group as it is drawn.

    Attributes:
        group: the group.
        kind: what its channels are.
        column: counted from the left.
        rows: members by the row of their layer.
        colour: of the line.
    """

    group: Group
    kind: str
    column: int
    rows: dict[int, tuple[Member, ...]]
    colour: str

    @property
    def first(self) -> int:
        """The topmost row."""
        return min(self.rows)

    @property
    def last(self) -> int:
        """The lowest row."""
        return max(self.rows)


def lanes(found: CouplingMap) -> list[Lane]:
    """Every group with its rows, a column in which it crosses no other, and a colour."""
    row = {layer.name: place for place, layer in enumerate(found.layers)}
    spans: list[tuple[Group, dict[int, tuple[Member, ...]]]] = []
    for group in found.groups:
        rows: dict[int, list[Member]] = {}
        for member in group.members:
            rows.setdefault(row[layer_name(member.tensor)], []).append(member)
        spans.append((group, {place: tuple(members) for place, members in rows.items()}))
    # The longest first; a line that stays goes after those that may lose channels.
    order = sorted(
        range(len(spans)),
        key=lambda i: (min(spans[i][1]) - max(spans[i][1]), min(spans[i][1]), i),
    )
    taken: list[list[tuple[int, int]]] = []
    columns = {i: _column(taken, min(spans[i][1]), max(spans[i][1])) for i in order}
    return [
        Lane(group, found.kinds[i], columns[i], rows, _colour(group, i))
        for i, (group, rows) in enumerate(spans)
    ]


def _column(taken: list[list[tuple[int, int]]], first: int, last: int) -> int:
    """The first column in which rows ``first`` to ``last`` are free, which are then taken."""
    for column, spans in enumerate(taken):
        if all(last < low or first > high for low, high in spans):
            spans.append((first, last))
            return column
    taken.append([(first, last)])
    return len(taken) - 1


def _colour(group: Group, number: int) -> str:
    return _GREY if why_not(group) else _COLOURS[number % len(_COLOURS)]


# -- the page ------------------------------------------------------------------------------------

_STYLE = """
body { font: 13px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 24px; }
h1 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 60em; }
svg { display: block; }
text, td.name, li { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.picture { overflow-x: auto; }
.picture g.group:hover .line { stroke-width: 6; }
.picture:has(g.group:hover) g.group:not(:hover) { opacity: .2; }
table { border-collapse: collapse; margin-top: 16px; }
th, td { text-align: left; vertical-align: top; padding: 2px 12px 2px 0; font-size: 12px;
         border-bottom: 1px solid #eee; }
td.number { text-align: right; }
.stays { color: #777; }
"""


def drawing(found: CouplingMap) -> str:
    """The page, as HTML.

    >>> import torch
    >>> from pruna_ir import capture
    >>> from pruna_ir.coupling import couple
    >>> from pruna_ir.coupling_map import coupling_map
    >>> program = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))
    >>> page = drawing(coupling_map(program, couple(program), "net"))
    >>> page.startswith("<!DOCTYPE html>"), page.count("<script")
    (True, 0)
    """
    title = escape(found.model or "program")
    made = lanes(found)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f"<title>Channel coupling of {title}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>Channel coupling of {title}</h1>",
            f"<p>{escape(found.summary())}.{escape(_after(found))}</p>",
            _LEGEND,
            f'<div class="picture">{svg(found, made)}</div>',
            _listing(made),
            "</body></html>\n",
        ]
    )


def _after(found: CouplingMap) -> str:
    return f" Changed before by: {found.pipeline}." if found.pipeline else ""


_LEGEND = (
    "<p>A row is a layer, in program order; a line is a group of channels that go together. "
    "Filled disc: the layer makes the channels. Ring: it reads them. Dot: a vector that goes "
    "along (bias, norm). Grey and dashed: these channels stay, for the reason in the tooltip. "
    "Right of a line's first row: the number of its channels, their kind, and how many indices "
    "each takes where that is more than one.</p>"
)


def svg(found: CouplingMap, made: Sequence[Lane]) -> str:
    """The drawing alone, as an SVG element that stands by itself."""
    names = max((len(_label(layer)) for layer in found.layers), default=0)
    details = max((len(_detail(layer)) for layer in found.layers), default=0)
    left = 8 + (names + details + 3) * CHAR
    columns = 1 + max((lane.column for lane in made), default=0)
    right = left + columns * LANE + 10
    labels = _labels(made)
    widest = max((sum(len(text) + 3 for text, _ in row) for row in labels.values()), default=0)
    width, height = right + widest * CHAR + 20, TOP * 2 + ROW * len(found.layers)
    rows = _rows(found.layers, names, right, labels)
    groups = (_lane(lane, left) for lane in made)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
            f'viewBox="0 0 {width:.0f} {height}" font-size="11" '
            'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">',
            f'<rect width="{width:.0f}" height="{height}" fill="#fff"/>',
            *rows,
            *groups,
            "</svg>",
        ]
    )


def _middle(row: int) -> float:
    return TOP + ROW * (row + 0.5)


def _rows(
    layers: Sequence[Layer], names: int, right: float, labels: dict[int, list[tuple[str, str]]]
) -> Iterator[str]:
    """Bands, names and labels. What a name shares with the row above is pale."""
    before, shaded = "", False
    for row, layer in enumerate(layers):
        name = _label(layer)
        if name.rpartition(".")[0] != before.rpartition(".")[0]:
            shaded = not shaded
        y = _middle(row)
        if shaded:
            yield (
                f'<rect x="0" y="{y - ROW / 2}" width="{right:.0f}" height="{ROW}" '
                'fill="#f4f5f7"/>'
            )
        kept = _shared(before, name)
        tip = f"{layer.name}: {_detail(layer)}" + (f" ({layer.source})" if layer.source else "")
        yield (
            f'<g><title>{escape(tip)}</title><text x="8" y="{y + 4}" xml:space="preserve">'
            f'<tspan fill="#b5b5b5">{escape(name[:kept])}</tspan>{escape(name[kept:])}</text>'
            f'<text x="{8 + (names + 1) * CHAR:.1f}" y="{y + 4}" fill="#777">'
            f"{escape(_detail(layer))}</text></g>"
        )
        yield from _row_labels(labels.get(row, []), right, y)
        before = name


def _label(layer: Layer) -> str:
    """The layer's title, its middle left out where it is long."""
    title = layer.title
    if len(title) <= _LONGEST_LABEL:
        return title
    half = (_LONGEST_LABEL - 3) // 2
    return f"{title[:half]}...{title[-half:]}"


def _detail(layer: Layer) -> str:
    return f"{layer.operator} {'x'.join(map(str, layer.shape)) or 'scalar'}"


def _shared(before: str, name: str) -> int:
    """How much of a path, up to and with a dot, equals that of the row above."""
    parts, others = name.split(".")[:-1], before.split(".")[:-1]
    kept = 0
    for part, other in zip(parts, others, strict=False):
        if part != other:
            break
        kept += len(part) + 1
    return kept


def _labels(made: Sequence[Lane]) -> dict[int, list[tuple[str, str]]]:
    """Texts and colours to stand right of the rows on which lines begin."""
    labels: dict[int, list[tuple[str, str]]] = {}
    for lane in sorted(made, key=lambda lane: lane.column):
        text = f"{len(lane.group.units)} stay" if why_not(lane.group) else _size(lane)
        labels.setdefault(lane.first, []).append((text, lane.colour))
    return labels


def _row_labels(texts: Sequence[tuple[str, str]], right: float, y: float) -> Iterator[str]:
    x = right
    for text, colour in texts:
        yield f'<text x="{x:.1f}" y="{y + 4}" fill="{colour}">{escape(text)}</text>'
        x += (len(text) + 3) * CHAR


def _size(lane: Lane) -> str:
    """``64 conv``, or ``12 heads of 64-192`` where a channel takes many indices."""
    each = indices_each(lane.group)
    size = f"{len(lane.group.units)} {lane.kind}"
    return size if each == "1" else f"{size} of {each}"


def _lane(lane: Lane, left: float) -> str:
    """A group: its line, its marks, and tooltips on each."""
    x = left + (lane.column + 0.5) * LANE
    reason = why_not(lane.group)
    dashes = ' stroke-dasharray="3 3"' if reason else ""
    tip = f"{lane.group.name}: {_size(lane)}, {len(lane.group.members)} dimensions"
    tip += f"\nstay: {in_words(reason)}" if reason else ""
    parts = [f'<g class="group"><title>{escape(tip)}</title>']
    if lane.last > lane.first:
        parts.append(
            f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{_middle(lane.first)}" '
            f'y2="{_middle(lane.last)}" stroke="{lane.colour}" stroke-width="3"{dashes}/>'
        )
    parts += [_mark(members, x, _middle(row), lane.colour) for row, members in lane.rows.items()]
    return "".join([*parts, "</g>"])


def _mark(members: Sequence[Member], x: float, y: float, colour: str) -> str:
    made = any(member.produced for member in members)
    read = any(_is_read(member) for member in members)
    tip = "\n".join(
        f"{m.tensor}, dimension {m.dim}: {m.indices.size} indices"
        + (f", {per_unit(m)} a channel" if per_unit(m) > 1 else "")
        + (", made here" if m.produced else "")
        for m in members
    )
    title = f"<title>{escape(tip)}</title>"
    if made:
        rim = f'<circle cx="{x:.1f}" cy="{y}" r="6.5" fill="none" stroke="{colour}"/>'
        disc = f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}"/>'
        return f"<g>{title}{disc}{rim if read else ''}</g>"
    if read:
        ring = f'r="4" fill="#fff" stroke="{colour}" stroke-width="2"'
        return f'<circle cx="{x:.1f}" cy="{y}" {ring}>{title}</circle>'
    return f'<circle cx="{x:.1f}" cy="{y}" r="2.6" fill="{colour}">{title}</circle>'


def _is_read(member: Member) -> bool:
    """Whether a weight is contracted over this dimension, rather than a vector going along."""
    return not member.produced and member.dim > 0


# -- the list ------------------------------------------------------------------------------------


def _listing(made: Sequence[Lane]) -> str:
    columns = ("group", "kind", "channels", "indices of each", "dimensions", "prunable")
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"
    return "\n".join(["<table>", head, *(_listed(lane) for lane in made), "</table>"])


def _listed(lane: Lane) -> str:
    group, reason = lane.group, why_not(lane.group)
    may = "yes" if reason is None else escape(f"no: {in_words(reason)}")
    style = ' class="stays"' if reason else ""
    return (
        f'<tr{style}><td class="name">{escape(group.name)}</td><td>{escape(lane.kind)}</td>'
        f'<td class="number">{len(group.units)}</td>'
        f'<td class="number">{indices_each(group)}</td>'
        f'<td class="number">{len(group.members)}</td><td>{may}</td></tr>'
    )

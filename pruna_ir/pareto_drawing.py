"""Drawing of a Pareto front: an SVG that stands by itself; no script, nothing from a network.

Cost goes to the right, evenly; what is lost goes up, by powers of ten. The line joins the
*predicted* losses of the front's points, a ring is what was *measured* with all layers quantised
together, and a thin line joins the two. Squares are programs with one width for all layers, as
measured; the chosen point has a halo. Losses of 0 or less stand on the lowest line.

Each mark has a tooltip with its figures and, for points of the front, how many layers have which
width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from pruna_ir.pareto import BitSearch, FrontPoint

WIDTH, HEIGHT = 720, 440  # px
LEFT, RIGHT, TOP, BOTTOM = 78, 130, 46, 58  # px
_LINE, _RING, _UNIFORM, _CHOSEN, _GREY = "#0072b2", "#0072b2", "#d55e00", "#009e73", "#777"


@dataclass(frozen=True)
class Scales:
    """From figures to places: ``x`` linear, ``y`` by powers of ten from ``low`` to ``high``.

    >>> scales = Scales(0.0, 10.0, -3, 0)
    >>> scales.x(0.0), scales.x(10.0) == WIDTH - RIGHT
    (78.0, True)
    >>> scales.y(1.0), scales.y(0.0) == scales.y(1e-3) == HEIGHT - BOTTOM
    (46.0, True)
    """

    left: float
    right: float
    low: int
    high: int

    def x(self, cost: float) -> float:
        """The place of a cost."""
        span = self.right - self.left or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * (cost - self.left) / span

    def y(self, lost: float) -> float:
        """The place of a loss; what is not above 0 stands lowest."""
        power = math.log10(lost) if lost > 0.0 else float(self.low)
        share = (max(power, self.low) - self.low) / (self.high - self.low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - share)


def scales_of(found: BitSearch) -> Scales:
    """Scales on which every point of a search has a place."""
    points = [*found.front, *found.uniform, found.chosen]
    costs = [point.cost for point in points]
    margin = 0.03 * (max(costs) - min(costs))
    losses = [x for p in points for x in (p.predicted, p.measured) if x > 0.0]
    low = math.floor(math.log10(min(losses, default=1.0)))
    high = math.ceil(math.log10(max(losses, default=1.0)))
    return Scales(min(costs) - margin, max(costs) + margin, low, max(high, low + 1))


def drawing(found: BitSearch) -> str:
    """The front as SVG text."""
    scales = scales_of(found)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" '
            'font-family="system-ui, DejaVu Sans, sans-serif">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            f'<text x="{LEFT}" y="18" font-size="13">{escape(_title(found))}</text>',
            f'<text x="{LEFT}" y="34" fill="{_GREY}">{escape(found.summary())}</text>',
            *_axes(found, scales),
            *_front(found.front, scales),
            *(_square(point, scales) for point in found.uniform),
            *_halo(found, scales),
            *_legend(),
            "</svg>\n",
        ]
    )


def _title(found: BitSearch) -> str:
    return f"{found.cost} against {found.measure}, {len(found.layers)} layers, {found.target}"


def _axes(found: BitSearch, scales: Scales) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    step = max(1, math.ceil((scales.high - scales.low) / 8))
    for power in range(scales.low, scales.high + 1, step):
        y = scales.y(10.0**power)
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        yield _text(LEFT - 8, y + 4, f"1e{power}", "end")
    for cost in ticks(scales.left, scales.right):
        x = scales.x(cost)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#e4e4e4"/>'
        yield _text(x, bottom + 16, f"{cost:g}", "middle")
        if found.reference > 0:
            yield _text(x, bottom + 30, f"{cost / found.reference:.1%}", "middle")
    label = f"{found.cost} ({found.unit}; below: share of the float program)"
    yield _text((LEFT + right) / 2, HEIGHT - 10, label, "middle")
    middle = (TOP + bottom) / 2
    yield (
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(_lost_label(found.measure))}</text>"
    )


def _lost_label(measure: str) -> str:
    names = {"noise": "noise / signal of the outputs", "loss": "increase of the loss",
             "divergence": "divergence from the float program (nats)"}  # fmt: skip
    return names.get(measure, measure)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, 4 to 10 of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(number * step, digits) for number in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _front(points: Sequence[FrontPoint], scales: Scales) -> Iterator[str]:
    places = " ".join(f"{scales.x(p.cost):.1f},{scales.y(p.predicted):.1f}" for p in points)
    yield f'<polyline points="{places}" fill="none" stroke="{_LINE}" stroke-width="1.5"/>'
    for point in points:
        x, predicted, measured = scales.x(point.cost), scales.y(point.predicted), scales.y(
            point.measured
        )  # fmt: skip
        yield (
            f'<g class="front"><title>{escape(tooltip(point))}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{predicted:.1f}" y2="{measured:.1f}" '
            f'stroke="{_RING}" stroke-opacity=".4"/>'
            f'<circle cx="{x:.1f}" cy="{predicted:.1f}" r="3" fill="{_LINE}"/>'
            f'<circle cx="{x:.1f}" cy="{measured:.1f}" r="4.5" fill="none" stroke="{_RING}"/></g>'
        )


def tooltip(point: FrontPoint) -> str:
    """The figures of a point, and how many layers have which width."""
    counts = Counter(point.widths.values())
    widths = point.label or ", ".join(f"{n} x {w}" for w, n in sorted(counts.items()))
    return (
        f"{widths}\ncost {point.cost:.6g}\npredicted {point.predicted:.4g}\n"
        f"measured {point.measured:.4g}"
    )


def _square(point: FrontPoint, scales: Scales) -> str:
    x, y = scales.x(point.cost), scales.y(point.measured)
    return (
        f'<g class="uniform"><title>{escape(tooltip(point))}</title>'
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{_UNIFORM}"/>'
        f"{_text(x + 9, y - 6, point.label, 'start', _UNIFORM)}</g>"
    )


def _halo(found: BitSearch, scales: Scales) -> Iterator[str]:
    x, y = scales.x(found.chosen.cost), scales.y(found.chosen.measured)
    tip = f"chosen\n{tooltip(found.chosen)}"
    yield (
        f'<g class="chosen"><title>{escape(tip)}</title>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{_CHOSEN}" fill-opacity=".25" '
        f'stroke="{_CHOSEN}" stroke-width="2"/></g>'
    )


def _legend() -> Iterator[str]:
    x = WIDTH - RIGHT + 14
    yield f'<circle cx="{x}" cy="{TOP + 10}" r="3" fill="{_LINE}"/>'
    yield _text(x + 12, TOP + 14, "front, predicted", "start")
    yield f'<circle cx="{x}" cy="{TOP + 28}" r="4.5" fill="none" stroke="{_RING}"/>'
    yield _text(x + 12, TOP + 32, "front, measured", "start")
    yield f'<rect x="{x - 4.5}" y="{TOP + 41.5}" width="9" height="9" fill="{_UNIFORM}"/>'
    yield _text(x + 12, TOP + 50, "one width for all", "start")
    yield (
        f'<circle cx="{x}" cy="{TOP + 64}" r="6" fill="{_CHOSEN}" fill-opacity=".25" '
        f'stroke="{_CHOSEN}" stroke-width="2"/>'
    )
    yield _text(x + 12, TOP + 68, "chosen", "start")

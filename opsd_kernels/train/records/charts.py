"""Draw line charts as inline SVG for a page without requests.

Colours are the classes s0, s1, ... of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 250
# Margins.
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
# Of a curve: more points than columns of the chart are invisible.
MOST_POINTS = 1200
TICKS = 5


@dataclass(frozen=True)
class Scale:
    """The map from values to coordinates of one axis."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Scale:
        low, high = min(values), max(values)
        if low == high:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about TICKS round numbers inside the range, with enough digits to tell them apart."""
        rough = (self.high - self.low) / TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        digits = -math.floor(math.log10(step * 1.0001))
        values = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(value, f"{value:,.{max(0, digits)}f}" if digits < 5 else f"{value:.3g}") for value in values]


def line_chart(title: str, series: Sequence[tuple[str, Points]], x_label: str = "step") -> str:
    """Return a figure whose legend has each curve's last value.

    A curve with few points is drawn with markers.
    """
    drawn = [
        (index, name, [point for point in points if all(map(math.isfinite, point))])
        for index, (name, points) in enumerate(series)
    ]
    drawn = [entry for entry in drawn if entry[2]]
    if not drawn:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="none">nothing yet</p></figure>'
    x = Scale.over([point[0] for *_, points in drawn for point in points], LEFT, WIDTH - RIGHT)
    y = Scale.over([point[1] for *_, points in drawn for point in points], HEIGHT - BOTTOM, TOP)
    most = max(len(points) for *_, points in drawn)
    curves = "".join(
        _curve(index, name, points, x, y, len(points) < most / 2 or most < 12)
        for index, name, points in drawn
    )
    legend = "".join(
        f'<li class="s{index}">{escape(name)} <b>{_number(points[-1][1])}</b></li>'
        for index, name, points in drawn
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{_axes(x, y, x_label)}{curves}</svg><ul class="legend">{legend}</ul></figure>'
    )


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Thin a curve to about `most` points, the lowest and highest of each stretch: no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return kept


def _curve(index: int, name: str, points: Points, x: Scale, y: Scale, marked: bool) -> str:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in thin(points))
    marks = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3">'
        f"<title>{escape(name)} at {_number(a)}: {_number(b)}</title></circle>"
        for a, b in (points if marked else ())
    )
    return f'<g class="s{index}"><polyline points="{path}"/>{marks}</g>'


def _axes(x: Scale, y: Scale, x_label: str) -> str:
    rows = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        for tick, text in y.ticks()
    )
    columns = "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'
        for tick, text in x.ticks()
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    return f'<g class="axes">{rows}{columns}{label}</g>'


def _number(value: float) -> str:
    """Format a number briefly: 12,300, 0.25, 3.1e-05."""
    if value and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"

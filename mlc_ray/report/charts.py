"""Charts as inline SVG, drawn for a page 360 units wide: a phone shows them one to one, a desk a little larger.

Colours are the page's (`style.css`), so they follow its light and dark. Nothing is told by colour alone: what falls is
dashed, runs have their own dash, and every number stands in a table of the page as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_LABEL_GAP = 12.5
_LABEL_SPACE = 74
_OVER = 0.05


@dataclass(frozen=True)
class Line:
    """One line of a slope chart: a value in % (or None) per column; `strong` sets it off from the rest."""

    label: str
    values: Sequence[float | None]
    strong: bool = False


@dataclass(frozen=True)
class Curve:
    """One curve: points (step, value); a value of None breaks it."""

    label: str
    points: Sequence[tuple[float, float | None]]


def slope_chart(title: str, columns: Sequence[str], lines: Sequence[Line]) -> str:
    """A line per language from the first column to the last, in % from 0 to 100; labels never overlap.

    A line that ends lower than it started is dashed. A line with fewer than two values is drawn as points.
    """
    most = max((sum(line.values[end] is not None for line in lines) for end in (0, -1)), default=0)
    top, height = 34.0, max(250.0, most * _LABEL_GAP + 60)
    bottom = height - 14
    xs = [_LABEL_SPACE + i * (WIDTH - 2 * _LABEL_SPACE) / max(1, len(columns) - 1) for i in range(len(columns))]

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * value / 100

    parts = [_open(title, height)]
    for value in (0, 25, 50, 75, 100):
        parts.append(
            f'<line class="grid" x1="{xs[0]:.1f}" x2="{xs[-1]:.1f}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}"/>'
        )
    for x, name in zip(xs, columns, strict=True):
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(f'<text class="head" x="{x:.1f}" y="16" text-anchor="middle">{escape(name)}</text>')
    for line in sorted(lines, key=lambda line: line.strong):
        parts.extend(_slope(line, xs, y_of))
    for end, side in ((0, -1), (-1, 1)):
        shown = [(y_of(v), line, v) for line in lines if (v := line.values[end]) is not None]
        places = spread([y for y, _, _ in shown], _LABEL_GAP, top - 8, bottom + 8)
        for (y, line, value), place in zip(shown, places, strict=True):
            parts.append(_label(line, value, xs[end], y, place, side))
    return "".join([*parts, "</svg>"])


def line_chart(title: str, curves: Sequence[Curve], *, low: float | None = None, high: float | None = None) -> str:
    """Curves over optimizer steps, the last value written out. `low` and `high` are drawn in even if never reached."""
    points = [(x, y) for curve in curves for x, y in curve.points if y is not None]
    if not points:
        raise ValueError(f"{title!r} has no point to draw")
    height, left, right, top, bottom = 176.0, 44.0, WIDTH - 58.0, 14.0, 150.0
    ticks = nice_ticks(
        min([y for _, y in points] + ([] if low is None else [low])),
        max([y for _, y in points] + ([] if high is None else [high])),
    )
    first, last = min(x for x, _ in points), max(x for x, _ in points)

    def x_of(step: float) -> float:
        return (left + right) / 2 if first == last else left + (right - left) * (step - first) / (last - first)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_open(title, height)]
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for step in dict.fromkeys((first, last)):
        parts.append(f'<text class="tick" x="{x_of(step):.1f}" y="{height - 8}" text-anchor="middle">{step:g}</text>')
    parts.append(
        f'<text class="tick" x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">step</text>'
        * (first != last)
    )
    ends = []
    for index, curve in enumerate(curves):
        for run in _unbroken(curve.points):
            places = [(x_of(x), y_of(y)) for x, y in run]
            if len(places) == 1:
                parts.append(
                    f'<circle class="curve c{index % 6}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
                )
            else:
                parts.append(f'<path class="curve c{index % 6}" d="{_path(places)}"/>')
        known = [(x, y) for x, y in curve.points if y is not None]
        if known:
            ends.append((index, *known[-1]))
    places_y = spread([y_of(y) for _, _, y in ends], _LABEL_GAP, top - 4, bottom + 4)
    for (index, x, y), place in zip(ends, places_y, strict=True):
        parts.append(f'<circle class="end c{index % 6}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6"/>')
        parts.append(
            f'<text class="value t{index % 6}" x="{max(x_of(x), right) + 7:.1f}" y="{place + 4:.1f}">{_short(y)}</text>'
        )
    return "".join([*parts, "</svg>"])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in their order, at least `gap` apart and within [low, high] as far as they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    places = [0.0] * len(wanted)
    floor = low
    for i in order:
        places[i] = floor = max(wanted[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        places[i] = ceiling = min(places[i], ceiling)
        ceiling -= gap
    return places


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """About `wanted` round numbers from `low` to `high`, which may lie a twentieth of a step outside."""
    if high - low < 1e-12 * max(1.0, abs(low), abs(high)):
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    raw = (high - low) / (wanted - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / size + _OVER), math.ceil(high / size - _OVER)
    return [round(i * size, 12) for i in range(first, last + 1)]


# --------------------------------------------------------------------------------------------- pieces


def _open(title: str, height: float) -> str:
    # The title is what a screen reader says; the numbers themselves stand in the tables.
    name = escape(title)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}"><title>{name}</title>'


def _slope(line: Line, xs: Sequence[float], y_of: Callable[[float], float]) -> Iterator[str]:
    points = [(x, y_of(v) if v is not None else None) for x, v in zip(xs, line.values, strict=True)]
    known = [v for v in line.values if v is not None]
    mark = direction(known)
    strong = " strong" if line.strong else ""
    hover = f"<title>{escape(line.label)}: {' → '.join('·' if v is None else _whole(v) for v in line.values)} %</title>"
    for run in _unbroken(points):
        if len(run) > 1:
            yield f'<path class="slope {mark}{strong}" d="{_path(run)}">{hover}</path>'
        for x, y in run:
            yield f'<circle class="dot {mark}{strong}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{hover}</circle>'


def direction(values: Sequence[float]) -> str:
    """`up`, `down` or `level`, from the first value to the last."""
    if len(values) < 2 or values[0] == values[-1]:
        return "level"
    return "up" if values[-1] > values[0] else "down"


def _label(line: Line, value: float, x: float, y: float, place: float, side: int) -> str:
    anchor = "end" if side < 0 else "start"
    strong = " strong" if line.strong else ""
    return (
        f'<path class="leader" d="M{x + side * 4:.1f} {y:.1f}L{x + side * 17:.1f} {place:.1f}"/>'
        f'<text class="name{strong}" x="{x + side * 20:.1f}" y="{place + 4:.1f}" text-anchor="{anchor}">'
        f"{escape(line.label)} {_whole(value)}</text>"
    )


def _unbroken(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _whole(value: float) -> str:
    return str(math.floor(value + 0.5))


def _short(value: float) -> str:
    if value == 0:
        return "0"
    digits = f"{value:.0e}" if abs(value) >= 1e5 or abs(value) < 1e-4 else f"{value:.3g}"
    return digits.replace("-", "−")

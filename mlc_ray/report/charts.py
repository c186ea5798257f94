"""Charts as SVG shapes, which the page's template draws: 360 units wide, as on a phone; wide screens enlarge them.

Colours are the page's (`style.css`), so they follow its light and dark. Nothing is shown by colour alone: falling lines
are dashed, each run has its own dash, and every number is also in a table of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlc_ray.report.text import ABSENT, short, whole

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


@dataclass(frozen=True)
class Shape:
    """One element of SVG: its attributes in their order, and texts, which the template escapes."""

    tag: str
    attributes: Mapping[str, str]
    text: str = ""
    hover: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing `WIDTH` wide under its caption. `title` is what a screen reader says; the numbers stand in tables."""

    title: str
    height: float
    caption: str = ""
    note: str = ""
    shapes: list[Shape] = field(default_factory=list)

    @property
    def view_box(self) -> str:
        """The area that is drawn."""
        return f"0 0 {WIDTH} {self.height:.0f}"

    def add(self, tag: str, style: str, *, text: str = "", hover: str = "", **attributes: float | str) -> None:
        """Draw `tag` with the class `style`; numbers get a decimal, and `_` in names becomes `-`."""
        shown = {
            name.replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}"
            for name, value in attributes.items()
        }
        self.shapes.append(Shape(tag, {"class": style, **shown}, text, hover))


def slope_chart(
    title: str, columns: Sequence[str], lines: Sequence[Line], *, caption: str = "", note: str = ""
) -> Chart:
    """A line per language from the first column to the last, in % from 0 to 100; labels never overlap.

    A line that ends lower than it started is dashed. A line with fewer than two values is drawn as points.
    """
    most = max((sum(line.values[end] is not None for line in lines) for end in (0, -1)), default=0)
    top, height = 34.0, max(250.0, most * _LABEL_GAP + 60)
    bottom = height - 14
    xs = [_LABEL_SPACE + i * (WIDTH - 2 * _LABEL_SPACE) / max(1, len(columns) - 1) for i in range(len(columns))]

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * value / 100

    chart = Chart(title, height, caption, note)
    for value in (0.0, 25.0, 50.0, 75.0, 100.0):
        chart.add("line", "grid", x1=xs[0], x2=xs[-1], y1=y_of(value), y2=y_of(value))
    for x, name in zip(xs, columns, strict=True):
        chart.add("line", "axis", x1=x, x2=x, y1=top, y2=bottom)
        chart.add("text", "head", text=name, x=x, y="16", text_anchor="middle")
    for line in sorted(lines, key=lambda line: line.strong):
        _draw_slope(chart, line, xs, y_of)
    for end, side in ((0, -1), (-1, 1)):
        shown = [(y_of(v), line, v) for line in lines if (v := line.values[end]) is not None]
        places = spread([y for y, _, _ in shown], _LABEL_GAP, top - 8, bottom + 8)
        for (y, line, value), place in zip(shown, places, strict=True):
            _draw_label(chart, line, value, xs[end], y, place, side)
    return chart


def line_chart(title: str, curves: Sequence[Curve], *, low: float | None = None, high: float | None = None) -> Chart:
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

    chart = Chart(title, height)
    for tick in ticks:
        chart.add("line", "grid", x1=left, x2=right, y1=y_of(tick), y2=y_of(tick))
        chart.add("text", "tick", text=short(tick), x=left - 6, y=y_of(tick) + 4, text_anchor="end")
    for step in dict.fromkeys((first, last)):
        chart.add("text", "tick", text=f"{step:g}", x=x_of(step), y=height - 8, text_anchor="middle")
    if first != last:
        chart.add("text", "tick", text="step", x=(left + right) / 2, y=height - 8, text_anchor="middle")
    ends = []
    for index, curve in enumerate(curves):
        for run in _unbroken(curve.points):
            places = [(x_of(x), y_of(y)) for x, y in run]
            if len(places) == 1:
                chart.add("circle", f"curve c{index % 6}", cx=places[0][0], cy=places[0][1], r="3")
            else:
                chart.add("path", f"curve c{index % 6}", d=_path(places))
        known = [(x, y) for x, y in curve.points if y is not None]
        if known:
            ends.append((index, *known[-1]))
    places_y = spread([y_of(y) for _, _, y in ends], _LABEL_GAP, top - 4, bottom + 4)
    for (index, x, y), place in zip(ends, places_y, strict=True):
        chart.add("circle", f"end c{index % 6}", cx=x_of(x), cy=y_of(y), r="2.6")
        chart.add("text", f"value t{index % 6}", text=short(y), x=max(x_of(x), right) + 7, y=place + 4)
    return chart


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


def _draw_slope(chart: Chart, line: Line, xs: Sequence[float], y_of: Callable[[float], float]) -> None:
    points = [(x, y_of(v) if v is not None else None) for x, v in zip(xs, line.values, strict=True)]
    style = direction([v for v in line.values if v is not None]) + (" strong" if line.strong else "")
    hover = f"{line.label}: {' → '.join(ABSENT if v is None else whole(v) for v in line.values)} %"
    for run in _unbroken(points):
        if len(run) > 1:
            chart.add("path", f"slope {style}", hover=hover, d=_path(run))
        for x, y in run:
            chart.add("circle", f"dot {style}", hover=hover, cx=x, cy=y, r="2.6")


def direction(values: Sequence[float]) -> str:
    """`up`, `down` or `level`, from the first value to the last."""
    if len(values) < 2 or values[0] == values[-1]:
        return "level"
    return "up" if values[-1] > values[0] else "down"


def _draw_label(chart: Chart, line: Line, value: float, x: float, y: float, place: float, side: int) -> None:
    chart.add("path", "leader", d=_path([(x + side * 4, y), (x + side * 17, place)]))
    chart.add(
        "text", "name strong" if line.strong else "name", text=f"{line.label} {whole(value)}",
        x=x + side * 20, y=place + 4, text_anchor="end" if side < 0 else "start",
    )  # fmt: skip


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

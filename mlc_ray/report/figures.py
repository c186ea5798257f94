"""The charts as PNG, for papers: matplotlib, white ground, the same scales as the page's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mlc_ray.report import palette
from mlc_ray.report.charts import direction, spread
from mlc_ray.report.collect import Model, Training
from mlc_ray.report.page_training import chart_groups, unit_range
from mlc_ray.report.summaries import averages
from mlc_ray.report.view import Cell, cells, keys, languages_of, shown_views, whole
from mlc_ray.stats.marks import VIA_MARK

DPI = 200
_NAME_GAP = 4.6
_WAYS = {"up": "-", "down": "--", "level": ":"}
_STYLES = ("-", "--", ":", "-.")


def heat_map_png(models: Sequence[Model], benchmark: str, path: Path) -> Path:
    """A row per side and model, a column per language; the rate in % in each cell. Returns `path`."""
    languages = languages_of(models, benchmark)
    names = keys(models)
    lines: list[tuple[float | None, dict[str, Cell]]] = []
    labels = []
    for view in shown_views(models, benchmark):
        for model, name, average in zip(models, names, averages(models, benchmark, view), strict=True):
            lines.append((None if average is None else average.value, cells(model, benchmark, view)))
            labels.append(f"{view.name}, {name}" if len(models) > 1 else view.name)
    figure = _figure(1.6 + 0.07 * max(map(len, labels)) + 0.44 * (len(languages) + 1), 0.9 + 0.42 * len(lines))
    axes = figure.add_subplot()
    ground = [_colour(background) for background, _ in palette.colours()]
    steps = [[_step(value) for value in (mean, *_rates(by, languages))] for mean, by in lines]
    axes.imshow(steps, cmap=ListedColormap([*ground, (0.85, 0.85, 0.85)]), vmin=0, vmax=palette.STEPS, aspect="auto")
    texts = [_colour(text) for _, text in palette.colours()]
    for y, (mean, by) in enumerate(lines):
        marks = ["", *(VIA_MARK[by[code].row.via] if code in by else "" for code in languages)]
        for x, (value, mark) in enumerate(zip((mean, *_rates(by, languages)), marks, strict=True)):
            shown = "·" if value is None else f"{whole(value)}{mark}"
            colour = "black" if value is None else texts[_step(value)]
            weight = "bold" if x == 0 else "normal"
            axes.text(x, y, shown, ha="center", va="center", color=colour, weight=weight, fontsize=9)
    axes.set_xticks(range(len(languages) + 1), ["avg", *languages])
    axes.set_yticks(range(len(lines)), labels)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.axvline(0.5, color="white", linewidth=4)
    for y in range(len(models), len(lines), len(models)):
        axes.axhline(y - 0.5, color="white", linewidth=4)
    axes.spines[:].set_visible(False)
    return _save(figure, path)


def slopes_png(models: Sequence[Model], benchmark: str, path: Path) -> Path:
    """A panel per side, a line per language from the first model to the last. Returns `path`."""
    views, languages = shown_views(models, benchmark), languages_of(models, benchmark)
    figure = _figure(3.6 * len(views), max(3.2, 0.16 * len(languages) + 0.8))
    for number, view in enumerate(views, 1):
        axes = figure.add_subplot(1, len(views), number)
        by_model = [cells(model, benchmark, view) for model in models]
        means = [mean.value if mean else None for mean in averages(models, benchmark, view)]
        lines = [(code, [by[code].rate if code in by else None for by in by_model]) for code in languages]
        for label, values in [*lines, ("avg", means)]:
            way = direction([value for value in values if value is not None])
            axes.plot(
                range(len(values)), [float("nan") if value is None else value for value in values],
                color="#b3261e" if way == "down" else "#39485a", linestyle=_WAYS[way], marker="o", markersize=3,
                linewidth=2.4 if label == "avg" else 1,
            )  # fmt: skip
        for end, side in ((0, "right"), (-1, "left")):
            _name_ends(axes, [*lines, ("avg", means)], end, side, len(models) - 1)
        axes.set_title(view.title, fontsize=10, pad=14)
        axes.set_xticks(range(len(models)), keys(models))
        axes.set_xlim(-0.55, len(models) - 0.45)
        axes.set_ylim(-4, 104)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return _save(figure, path)


def curves_png(trainings: Sequence[Training], path: Path) -> Path | None:
    """A panel per number that the page shows, a curve per run. Returns `path`, None if there is nothing to draw."""
    runs = [training for training in trainings if training.metrics]
    found = [name for _, group in chart_groups(runs) for name in group]
    names = [n for n in found if any(value is not None for run in runs for _, value in run.metrics.get(n, ()))]
    if not names:
        return None
    rows = -(-len(names) // 3)
    figure = _figure(9, 2.3 * rows)
    for number, name in enumerate(names, 1):
        axes = figure.add_subplot(rows, min(3, len(names)), number)
        for index, run in enumerate(runs):
            points = run.metrics.get(name, ())
            values = [float("nan") if value is None else value for _, value in points]
            style = _STYLES[index % len(_STYLES)]
            axes.plot([step for step, _ in points], values, style, label=run.label, linewidth=1.4)
        low, _ = unit_range(name)
        if low is not None:
            axes.set_ylim(-0.03, 1.03)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1 and len(runs) > 1:
            axes.legend(fontsize=7)
    return _save(figure, path)


# --------------------------------------------------------------------------------------------- pieces


def _figure(width: float, height: float) -> Figure:
    # pyplot would keep the figure, and choose a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    return path


def _rates(by: dict[str, Cell], languages: Sequence[str]) -> list[float | None]:
    return [by[code].rate if code in by else None for code in languages]


def _step(value: float | None) -> int:
    return palette.STEPS if value is None else palette.step(min(1.0, max(0.0, value / 100)))


def _colour(colour: palette.Colour) -> tuple[float, float, float]:
    red, green, blue = (value / 255 for value in colour)
    return red, green, blue


def _name_ends(axes: Any, lines: Sequence[tuple[str, Sequence[float | None]]], end: int, side: str, last: int) -> None:
    shown = [(label, value) for label, values in lines if (value := values[end]) is not None]
    # Turned over, because spread keeps the order of equal values from low to high, and the page's y points down.
    places = [-y for y in spread([-value for _, value in shown], _NAME_GAP, -104, 4)]
    for (label, value), y in zip(shown, places, strict=True):
        at, outward = (0, -1) if end == 0 else (last, 1)
        weight = "bold" if label == "avg" else "normal"
        axes.plot([at + outward * 0.03, at + outward * 0.12], [value, y], color="0.8", linewidth=0.6)
        axes.text(at + outward * 0.14, y, f"{label} {whole(value)}", ha=side, va="center", fontsize=7, weight=weight)

"""Every PNG: matplotlib, white ground, the same scales and the same direction as the page's charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from mlc_ray.report import palette
from mlc_ray.report.charts import direction, spread
from mlc_ray.report.collect import Model, Training
from mlc_ray.report.rates import Column, Grid, grid, keys
from mlc_ray.report.rates import benchmarks as benchmarks_of
from mlc_ray.report.text import whole
from mlc_ray.report.training import chart_groups, unit_range
from mlc_ray.score.results import ScoreResult
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.rates import KINDS, language_order
from mlc_ray.storage import Place
from mlc_ray.types import ScoreRow

PathT = TypeVar("PathT", Path, Place)
DPI = 200
_NAME_GAP = 4.6
_WAYS = {"up": "-", "down": "--", "level": ":"}
_STYLES = ("-", "--", ":", "-.")


def scores_png(results: Sequence[ScoreResult], place: Place) -> None:
    """Draw the heat map of one score, or of several on all their benchmarks, at `place`."""
    models = [Model(result.name, result) for result in results]
    figure = heat_map(models, benchmarks_of(models))
    with place.open("wb") as file:
        figure.savefig(file, format="png", bbox_inches="tight")


def heat_map_png(models: Sequence[Model], benchmarks: Sequence[str], path: Path) -> Path:
    """A row per benchmark, side and model, a column per language; the rate in % in each cell. Returns `path`.

    Higher is better in every row, as the title says: harmful prompts by what is refused or safe, benign ones by what
    is complied with. A side that was not scored has its row too, and says so.
    """
    return _save(heat_map(models, benchmarks), path)


def heat_map(models: Sequence[Model], benchmarks: Sequence[str]) -> Figure:
    """The figure that `heat_map_png` writes."""
    shown = [grid(models, name) for name in benchmarks]
    # Beside others a row over all benchmarks has its mean alone: its rates are not of languages.
    of_languages = [each for each in shown if each.of == "language"]
    languages = sorted({code for each in of_languages for code in each.names}, key=language_order)
    if not of_languages:
        languages = list(shown[0].names)
    labels, lines, groups = _heat_lines(models, shown)
    figure = _figure(1.6 + 0.07 * max(map(len, labels)) + 0.44 * (len(languages) + 1), 1.4 + 0.42 * len(lines))
    axes = figure.add_subplot()
    ground = [_colour(background) for background, _ in palette.colours()]
    texts = [_colour(text) for _, text in palette.colours()]
    rows = [_heat_row(column, languages) for column in lines]
    steps = [[_step(value) for value, _ in row] for row in rows]
    axes.imshow(steps, cmap=ListedColormap([*ground, (0.85, 0.85, 0.85)]), vmin=0, vmax=palette.STEPS, aspect="auto")
    for y, row in enumerate(rows):
        if lines[y] is None:
            axes.text(
                (1 + len(languages)) / 2, y, "not scored", ha="center", va="center", color="firebrick", weight="bold"
            )
            continue
        for x, (value, mark) in enumerate(row):
            colour = "black" if value is None else texts[_step(value)]
            weight = "bold" if x == 0 else "normal"
            text = f"{whole(value)}{mark}"
            axes.text(x, y, text, ha="center", va="center", color=colour, weight=weight, fontsize=9)
    axes.set_xticks(range(len(languages) + 1), ["avg", *languages])
    axes.set_yticks(range(len(lines)), labels)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.axvline(0.5, color="white", linewidth=4)
    for y in groups:
        axes.axhline(y - 0.5, color="white", linewidth=4)
    axes.spines[:].set_visible(False)
    found = [r.row for c in lines if c is not None for name, r in c.rates.items() if name in languages]
    axes.set_title(f"% of responses, higher is better on both sides ({_n_per_cell(found)})", fontsize=9, loc="left")
    axes.set_xlabel("\n".join(mark_lines(row.via for row in found)), loc="left", fontsize=8)
    return figure


def _heat_lines(models: Sequence[Model], shown: Sequence[Grid]) -> tuple[list[str], list[Column | None], list[int]]:
    """Labels of the rows, their columns of rates (None: not scored), and the rows before which a new side starts."""
    labels: list[str] = []
    lines: list[Column | None] = []
    groups: list[int] = []
    for each in shown:
        where = f", {each.benchmark}" if len(shown) > 1 else ""
        for kind in KINDS:
            columns = [column for column in each.columns if column.view.kind == kind]
            groups.append(len(lines))
            for column in columns:
                name = f", {column.key}" if len(models) > 1 else ""
                labels.append(f"{column.view.column}{name}{where}")
                lines.append(column if column.mean is not None else None)
            if not columns:
                labels.append(f"{kind}{where}")
                lines.append(None)
    return labels, lines, groups[1:]


def _heat_row(column: Column | None, languages: Sequence[str]) -> list[tuple[float | None, str]]:
    """Values and marks: the mean, then each language."""
    if column is None:
        return [(None, "")] * (len(languages) + 1)
    found: list[tuple[float | None, str]] = [(None if column.mean is None else column.mean.value, "")]
    for code in languages:
        rate = column.rates.get(code)
        found.append((None, "") if rate is None else (rate.value, VIA_MARK[rate.row.via]))
    return found


def _n_per_cell(rows: Sequence[ScoreRow]) -> str:
    counts = {row.n for row in rows}
    low, high = min(counts), max(counts)
    return f"n = {low} per cell" if low == high else f"n = {low} to {high} per cell"


def slopes_png(models: Sequence[Model], benchmark: str, path: Path) -> Path:
    """A panel per side, a line per language from the first model to the last. Returns `path`."""
    shown = grid(models, benchmark)
    views = list(dict.fromkeys(column.view for column in shown.columns))
    figure = _figure(3.6 * len(views), max(3.2, 0.16 * len(shown.names) + 0.8))
    for number, view in enumerate(views, 1):
        axes = figure.add_subplot(1, len(views), number)
        columns = [column for column in shown.columns if column.view == view]
        means = [column.mean.value if column.mean else None for column in columns]
        lines = [
            (code, [column.rates[code].value if code in column.rates else None for column in columns])
            for code in shown.names
        ]
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


@dataclass(frozen=True)
class Trade:
    """A model in the plane of both sides, in %: `label` stands beside it."""

    harmful: float
    benign: float
    label: str = ""


def pareto_png(
    points: Sequence[Trade],
    path: PathT,
    *,
    baseline: Trade,
    front: Sequence[int],
    best: int | None,
    names: tuple[str, str],
    floor: float | None = None,
) -> PathT:
    """Both sides of the trials of a search: the Pareto front, the best, the floor, and the baseline. Returns `path`.

    Args:
        points: One per trial.
        path: The PNG.
        baseline: The model before any training.
        front: Indices of the points on the front, in the order in which they are joined.
        best: Index of the best point.
        names: What the axes show, harmful side first.
        floor: The least rate of the benign side, where one was set.
    """
    figure = _figure(7, 5)
    axes = figure.add_subplot()
    axes.scatter([p.harmful for p in points], [p.benign for p in points], color="#4477aa", zorder=3, label="trials")
    joined = [points[index] for index in front]
    axes.plot(
        [p.harmful for p in joined], [p.benign for p in joined], color="#4477aa", linewidth=1, alpha=0.6,
        label="Pareto front",
    )  # fmt: skip
    axes.scatter([baseline.harmful], [baseline.benign], marker="s", color="#666666", zorder=3, label="baseline")
    if best is not None:
        at = points[best]
        axes.scatter([at.harmful], [at.benign], s=180, facecolors="none", edgecolors="#cc3311", zorder=4, label="best")
    if floor is not None:
        axes.axhline(floor, color="#cc3311", linestyle=":", linewidth=1, label="floor")
    for point in points:
        axes.annotate(point.label, (point.harmful, point.benign), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_xlim(-4, 104)
    axes.set_ylim(-4, 104)
    axes.legend(loc="lower left", fontsize=7)
    return _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """A panel over the layers of a model: named lines, or bars where there is one unnamed; `level` is drawn across."""

    name: str
    lines: Mapping[str, Sequence[float]]
    strong: str = ""
    level: float | None = None


def layers_png(panels: Sequence[Panel], path: PathT) -> PathT:
    """Panels one above the other over the layers of a model, the embeddings first. Returns `path`."""
    figure = _figure(8, 2.7 * len(panels))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for label, values in panel.lines.items():
            if label:
                axes.plot(range(len(values)), values, label=label, linewidth=2.5 if label == panel.strong else 1.2)
            else:
                axes.bar(range(len(values)), values, color="#4477aa")
        if panel.level is not None:
            axes.axhline(panel.level, color="0.6", linestyle=":")
        if any(panel.lines):
            axes.legend(fontsize=6, ncol=4)
        axes.set_ylabel(panel.name)
    all_axes[-1].set_xlabel("layer (0 = embeddings)")
    return _save(figure, path)


# --------------------------------------------------------------------------------------------- pieces


def _figure(width: float, height: float) -> Figure:
    # pyplot would keep the figure, and choose a backend for the whole process.
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: PathT) -> PathT:
    with Place(path).open("wb") as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    return path


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

"""The heat map of the page: a colour for each rate, and the rate itself in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlc_ray.report import palette
from mlc_ray.report.collect import Model
from mlc_ray.report.rates import Grid
from mlc_ray.report.summaries import language
from mlc_ray.report.tables import Cell
from mlc_ray.report.text import ABSENT, percent, whole
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.rates import Interval


@dataclass(frozen=True)
class HeatCell:
    """A rate of the heat map; `hover` says everything in words."""

    style: str
    text: str = ABSENT
    limits: str = ""
    hover: str = "not scored"


@dataclass(frozen=True)
class HeatHead:
    """The head of a column, or of a group of `span` columns."""

    style: str
    text: str
    hover: str = ""
    span: int = 1


@dataclass(frozen=True)
class HeatMap:
    """A row per language after the row of means, a column per side and model.

    Over all benchmarks it has a row per benchmark; `of` says which.
    """

    benchmark: str
    of: str
    groups: tuple[HeatHead, ...]
    heads: tuple[HeatHead, ...]
    rows: tuple[tuple[Cell, tuple[HeatCell, ...]], ...]
    columns: int
    marks: tuple[str, ...]


def heat_map(models: Sequence[Model], shown: Grid) -> HeatMap:
    """The heat map of a grid of rates."""
    several = len(models) > 1
    views = list(dict.fromkeys(column.view for column in shown.columns))
    edges = [column.model is models[0] and column.view is not views[0] for column in shown.columns]
    groups = [
        HeatHead(f"group {view.kind}{' edge' * (index > 0)}", view.title, span=len(models))
        for index, view in enumerate(views)
    ]
    heads = [
        HeatHead("edge" if edge else "", column.key, column.model.label)
        for column, edge in zip(shown.columns, edges, strict=True)
    ]
    means = [_heat_cell(column.mean, edge) for column, edge in zip(shown.columns, edges, strict=True)]
    rows = [(Cell("average"), tuple(means))]
    for name in shown.names:
        cells = []
        for column, edge in zip(shown.columns, edges, strict=True):
            rate = column.rates.get(name)
            if rate is None:
                cells.append(_heat_cell(None, edge))
                continue
            interval = Interval(rate.value, rate.low, rate.high)
            cells.append(_heat_cell(interval, edge, rate.row.via, VIA_MARK[rate.row.via], rate.hover))
        rows.append((language(name), tuple(cells)))
    ways = [rate.row.via for column in shown.columns for rate in column.rates.values()]
    return HeatMap(
        shown.benchmark, shown.of, tuple(groups), tuple(heads) if several else (), tuple(rows), len(shown.columns),
        tuple(mark_lines(ways)),
    )  # fmt: skip


def _heat_cell(interval: Interval | None, edge: bool, via: str = "", mark: str = "", hover: str = "") -> HeatCell:
    margin = " edge" if edge else ""
    if interval is None:
        return HeatCell(f"none{margin}")
    step = palette.step(min(1.0, max(0.0, interval.value / 100)))
    limits = f"{percent(interval.low)} to {percent(interval.high)}"
    return HeatCell(
        style=f"q{step}{margin}{f' {via}' if via else ''}",
        text=f"{whole(interval.value)}{mark}",
        limits=f"{whole(interval.low)}–{whole(interval.high)}",
        hover=hover or f"{percent(interval.value)} %, 95 % interval {limits}",
    )

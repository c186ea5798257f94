"""The report for papers: Markdown tables, and PNG figures beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mlc_ray.report.collect import Collection, Model
from mlc_ray.report.figures import curves_png, heat_map_png, slopes_png
from mlc_ray.report.summaries import Row, averages, difference_table, side_table
from mlc_ray.report.utility import measured_how, utility_lines
from mlc_ray.report.view import (
    Change,
    benchmarks,
    cells,
    changes,
    keys,
    languages_of,
    p_value,
    percent,
    shown_views,
    signed,
    views_of,
    warnings,
)
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.rates import Interval

MARKDOWN_FILE = "report.md"


def write_paper(collection: Collection, folder: Path) -> list[Path]:
    """Write `report.md` and its figures into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    models, names = collection.models, benchmarks(collection.models)
    written: list[Path] = []
    lines = ["# Safety report", ""]
    lines += [f"> **Warning:** {_escape(line)}\n" for line in warnings(models)]
    if models and len(models) > 1 and keys(models) != [model.label for model in models]:
        lines += [*(f"- {key}: {_escape(m.label)}" for key, m in zip(keys(models), models, strict=True)), ""]
    compared = changes(collection)
    for number, name in enumerate(names):
        heat = heat_map_png(models, name, folder / f"languages-{number}.png")
        figures = [(f"Rates by language, {name}", heat)]
        if len(models) > 1:
            figures.append((f"Before and after, {name}", slopes_png(models, name, folder / f"slopes-{number}.png")))
        lines += [f"## {_escape(name)}", ""]
        lines += [f"![{_escape(title)}]({path.name})\n" for title, path in figures]
        lines += [*_language_table(models, name), *_summary_tables(models, name), *_changes(compared, name)]
        written += [path for _, path in figures]
    lines += _utility(models)
    if (curves := curves_png(collection.trainings, folder / "training.png")) is not None:
        lines += ["## Training", "", f"![Training curves]({curves.name})", ""]
        written.append(curves)
    path = folder / MARKDOWN_FILE
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [path, *written]


def _language_table(models: Sequence[Model], benchmark: str) -> list[str]:
    views = shown_views(models, benchmark)
    columns = [(view, model, key) for view in views for model, key in zip(models, keys(models), strict=True)]
    found = [cells(model, benchmark, view) for view, model, _ in columns]
    header = ["language", *(f"{view.name}, {key}" if len(models) > 1 else view.name for view, _, key in columns)]
    means = [interval for view in views for interval in averages(models, benchmark, view)]
    rows = [["**average**", *("·" if i is None else f"**{_limits(i.value, i.low, i.high)}**" for i in means)]]
    for code in languages_of(models, benchmark):
        line = [code]
        for by in found:
            cell = by.get(code)
            line.append("·" if cell is None else _limits(cell.rate, cell.low, cell.high) + VIA_MARK[cell.row.via])
        rows.append(line)
    notes = [f"{line}  " for line in mark_lines(cell.row.via for by in found for cell in by.values())]
    caption = "% of responses with 95 % intervals; higher is better on both sides."
    return [caption, "", *_table(header, rows), *notes, *([""] if notes else [])]


def _summary_tables(models: Sequence[Model], benchmark: str) -> list[str]:
    names = keys(models)
    lines = [*_row_table("both sides", names, difference_table(models, benchmark))]
    for view in views_of(models, benchmark):
        lines += _row_table(f"{view.kind}, by {view.measure}", names, side_table(models, benchmark, view))
    return lines


def _row_table(title: str, names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    body = [[row.name, *(f"{v.text} ({v.interval})" if v.interval else v.text for v in row.values)] for row in rows]
    return _table([title, *names], body)


def _changes(compared: Sequence[Change], benchmark: str) -> list[str]:
    lines = []
    for change in compared:
        title = f"{change.after.label} against {change.before.label}"
        found = [] if change.comparison is None else change.comparison.benchmarks
        one = next((item for item in found if item.benchmark == benchmark), None)
        if one is None:
            lines += [
                f"{_escape(title)}: not compared prompt by prompt ({_escape(change.why or 'no common prompts')}).",
                "",
            ]
            continue
        rows = [
            [f"{s.kind} {s.measure}", percent(s.before), percent(s.after), _points(s.change), p_value(s.p), str(s.n)]
            for s in one.sides
        ]
        if one.difference is not None and one.difference_p is not None:
            rows.append(["harmful − benign refused", "", "", _points(one.difference), p_value(one.difference_p), ""])
        lines += _table([title, "before", "after", "change, points", "p", "n"], rows)
    return lines


def _utility(models: Sequence[Model]) -> list[str]:
    rows = []
    for line in utility_lines(models):
        cells_of_line = []
        for score in line.results:
            if score is None:
                cells_of_line.append("·")
                continue
            value = "no value" if score.value is None else f"{score.value:.4f}"
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            how = f" ({measured_how(score)})" if measured_how(score) else ""
            cells_of_line.append(f"{value}{error}{how}")
        rows.append([line.task, line.name, *cells_of_line])
    return ["## Utility", "", *_table(["task", "metric", *keys(models)], rows)] if rows else []


# --------------------------------------------------------------------------------------------- pieces


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    return ["| " + " | ".join(map(_escape, line)) + " |" for line in [*lines, *rows]] + [""]


def _escape(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _limits(value: float, low: float, high: float) -> str:
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _points(interval: Interval) -> str:
    return f"{signed(interval.value)} ({signed(interval.low)} to {signed(interval.high)})"

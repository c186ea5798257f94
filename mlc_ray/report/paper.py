"""The report for papers: Markdown tables, and PNG figures beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlc_ray.report.categories import category_table
from mlc_ray.report.changes import Change, before_and_after, changes
from mlc_ray.report.collect import Collection, without_folders
from mlc_ray.report.decisions import judgement_tables
from mlc_ray.report.figures import curves_png, heat_map_png, slopes_png
from mlc_ray.report.in_language import in_language_table
from mlc_ray.report.rates import benchmarks, grid, keys, views_of
from mlc_ray.report.remarks import warnings
from mlc_ray.report.summaries import agreement_tables, change_table, difference_table, language_table, side_table
from mlc_ray.report.tables import escape, markdown
from mlc_ray.report.text import without_paths
from mlc_ray.report.utility import utility_table
from mlc_ray.stats.marks import mark_lines

MARKDOWN_FILE = "report.md"


def write_paper(collection: Collection, folder: Path, *, public: bool = False) -> list[Path]:
    """Write `report.md` and its figures into `folder`; returns the files. `public` as for the page."""
    if public:
        collection = without_folders(collection)
    folder.mkdir(parents=True, exist_ok=True)
    models, names = collection.models, benchmarks(collection.models)
    written: list[Path] = []
    lines = ["# Safety report", ""]
    lines += [f"> **Warning:** {escape(line)}\n" for line in warnings(models)]
    if models and len(models) > 1 and keys(models) != [model.label for model in models]:
        lines += [*(f"- {key}: {escape(m.label)}" for key, m in zip(keys(models), models, strict=True)), ""]
    for search in collection.searches:
        lines += [f"## Search {escape(search.label)}", "", *(f"- {escape(line)}" for line in search.findings), ""]
        for shown in search.tables:
            lines += markdown(shown)
    compared = changes(collection)
    for number, name in enumerate(names):
        heat = heat_map_png(models, [name], folder / f"languages-{number}.png")
        figures = [(f"Rates by language, {name}", heat)]
        if before_and_after(models):
            figures.append((f"Before and after, {name}", slopes_png(models, name, folder / f"slopes-{number}.png")))
        lines += [f"## {escape(name)}", ""]
        lines += [f"![{escape(title)}]({path.name})\n" for title, path in figures]
        rates = grid(models, name)
        lines += markdown(language_table(models, rates))
        notes = mark_lines(rate.row.via for column in rates.columns for rate in column.rates.values())
        lines += [*(f"{line}  " for line in notes), *([""] if notes else [])]
        lines += markdown(difference_table(models, name))
        for view in views_of(models, name):
            lines += markdown(side_table(models, name, view))
        if (told := in_language_table(models, name)) is not None:
            lines += markdown(told)
        if (categories := category_table(models, name)) is not None:
            lines += markdown(categories)
        lines += _changes(compared, name)
        written += [path for _, path in figures]
    for shown in judgement_tables(models):
        lines += ["", *markdown(shown)]
    if (utility := utility_table({model.label: model.utility for model in models})) is not None:
        lines += ["## Utility", "", *markdown(utility)]
    if (curves := curves_png(collection.trainings, folder / "training.png")) is not None:
        lines += ["## Training", "", f"![Training curves]({curves.name})", ""]
        written.append(curves)
    path = folder / MARKDOWN_FILE
    text = "\n".join(lines).rstrip() + "\n"
    path.write_text(without_paths(text) if public else text, encoding="utf-8")
    return [path, *written]


def _changes(compared: Sequence[Change], benchmark: str) -> list[str]:
    lines = []
    for change in compared:
        found = change.on(benchmark)
        if change.agreement:
            for each in agreement_tables(change, benchmark):
                lines += markdown(each)
        elif found is None:
            lines += [f"{escape(change.title)}: {escape(change.lacking(benchmark))}", ""]
        else:
            lines += markdown(change_table(change, found))
    return lines

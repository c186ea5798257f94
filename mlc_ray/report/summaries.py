"""Every table of numbers, made once for console, page and Markdown: a column per model, or a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mlc_ray.report.changes import Change
from mlc_ray.report.collect import Model
from mlc_ray.report.languages import language_name
from mlc_ray.report.rates import (
    HIT_AND_MISS,
    Column,
    Grid,
    View,
    harmful_side,
    keys,
    rates,
    side_of,
    summary_of,
    views_of,
)
from mlc_ray.report.remarks import unparsed_bound
from mlc_ray.report.tables import NONE, Cell, Row, Table, Tone, cell, row, table
from mlc_ray.report.text import ABSENT, p_value, percent, signed, whole
from mlc_ray.score.results import is_unread
from mlc_ray.stats.marks import VIA_MARK
from mlc_ray.stats.paired import BenchmarkChange, SideChange
from mlc_ray.stats.rates import KINDS, Interval, SideSummary, Summary

DIFFERENCE = "harmful − benign refused"
NOT_SCORED = Cell("not scored", tone="alarm")


def language(code: str) -> Cell:
    """A language by code and name."""
    return cell(code, language_name(code))


def rate_cell(interval: Interval | None, absent: Cell = NONE) -> Cell:
    """A rate in % with its interval."""
    if interval is None:
        return absent
    return cell(percent(interval.value), f"{percent(interval.low)} to {percent(interval.high)}")


def points_cell(interval: Interval | None, absent: Cell = NONE) -> Cell:
    """A difference in points with its interval."""
    if interval is None:
        return absent
    return cell(signed(interval.value), f"{signed(interval.low)} to {signed(interval.high)}")


# ------------------------------------------------------------------------------------------------ language by language


def language_table(models: Sequence[Model], shown: Grid, *, limits: bool = True) -> Table:
    """A row per language: each side of each model, the change from the first to the last, and the difference of sides.

    Intervals stand beside the rates unless `limits` is false. A rate is red where more of its responses than
    `max_unparsed` have no verdict, and marked where the judge does not read the language directly. A side that no model
    was scored on has a column that says so.
    """
    several = len(models) > 1
    columns: list[tuple[Cell, list[Cell]]] = []  # the head of each, and its cells: the mean, then each language
    for kind in KINDS:
        views = list(dict.fromkeys(column.view for column in shown.columns if column.view.kind == kind))
        if not views:
            columns.append((cell(f"{kind} prompts"), [NOT_SCORED] * (1 + len(shown.languages))))
        for view in views:
            mine = [column for column in shown.columns if column.view == view]
            for column in mine:
                head = cell(view.column, column.key if several else "")
                columns.append((head, _rate_cells(column, shown.languages)))
            if several:
                columns.append((cell("change, points"), _change_cells(mine[0], mine[-1], shown.languages)))
    summaries = [summary_of(model, shown.benchmark) for model in models]
    if any(summary is not None and summary.difference for summary in summaries):
        for summary, key in zip(summaries, keys(models), strict=True):
            by_language = summary.difference if summary else {}
            mean = points_cell(summary.avg_difference if summary else None)
            each = [cell(signed(by_language.get(code))) for code in shown.languages]
            columns.append((cell(DIFFERENCE, key if several else ""), [mean, *each]))
    rows = [
        row(name, [cells[index] if limits else replace(cells[index], more=()) for _, cells in columns], tone)
        for index, (name, tone) in enumerate(_row_names(shown.languages))
    ]
    note = f"% of responses{', 95 % intervals' if limits else ''}; higher is better on both sides"
    return table(shown.benchmark, ["language", *(head for head, _ in columns)], rows, note)


def _row_names(languages: Sequence[str]) -> list[tuple[str, Tone]]:
    return [("average", "strong"), *((code, "") for code in languages)]


def _rate_cells(column: Column, languages: Sequence[str]) -> list[Cell]:
    bound = unparsed_bound(column.model)
    cells = [rate_cell(column.mean, NOT_SCORED)]
    for code in languages:
        rate = column.rates.get(code)
        if rate is None:
            cells.append(NONE)
            continue
        tone: Tone = "alarm" if is_unread(rate.row, bound) else ""
        interval = f"{percent(rate.low)} to {percent(rate.high)}"
        cells.append(cell(percent(rate.value) + VIA_MARK[rate.row.via], interval, tone=tone))
    return cells


def _change_cells(first: Column, last: Column, languages: Sequence[str]) -> list[Cell]:
    """The change of each language that both have, in points, after its mean over these languages."""
    both = [code for code in languages if code in first.rates and code in last.rates]
    moved = {code: last.rates[code].value - first.rates[code].value for code in both}
    mean = sum(moved.values()) / len(moved) if moved else None
    return [cell(signed(mean)), *(cell(signed(moved.get(code))) for code in languages)]


def counts_table(models: Sequence[Model], benchmark: str) -> Table:
    """Every count and interval."""
    rows = []
    for view in views_of(models, benchmark):
        for model in models:
            for code, rate in rates(model, benchmark, view).items():
                counts = rate.row
                cells = [view.name, model.label, percent(rate.value), percent(rate.low), percent(rate.high)]
                cells += [str(n) for n in (counts.n, counts.hits, counts.misses, counts.degenerate, counts.unparsed)]
                cells += [ABSENT if counts.margin is None else f"{counts.margin:.2f}", counts.via]
                rows.append(row(language(code), cells))
    head = ["language", "rate of", "model", "%", "low", "high", "n", "hits", "misses", "degenerate", "unparsed",
            "margin, nats", "read"]  # fmt: skip
    return table(benchmark, head, rows, "95 % intervals; hits are refused or safe, misses complied or unsafe")


# ----------------------------------------------------------------------------------------------------------- summaries


def headline_table(models: Sequence[Model], benchmark: str) -> Table:
    """Both sides of each model, a row per model."""
    rows = []
    for model, key in zip(models, keys(models), strict=True):
        summary = summary_of(model, benchmark)
        harmful, benign = (harmful_side(summary), summary.side("benign", "refused")) if summary else (None, None)
        cells = [
            rate_cell(harmful.avg if harmful else None, NOT_SCORED),
            rate_cell(benign.misses_avg if benign else None, NOT_SCORED),
            points_cell(summary.avg_difference if summary else None, NOT_SCORED),
        ]
        rows.append(row(cell(key, model.label if key != model.label else ""), cells))
    measures = {summary.harmful_measure for model in models if (summary := summary_of(model, benchmark)) is not None}
    harmful_name = " or ".join(sorted(measures)) or "refused"
    heads = ["model", f"harmful {harmful_name} %", "benign complied %", DIFFERENCE]
    return table(benchmark, heads, rows, "mean over languages, 95 % intervals")


def side_table(models: Sequence[Model], benchmark: str, view: View) -> Table:
    """One side by one measure, a row per number; a model that lacks it has dots."""
    sides = [side_of(model, benchmark, view) for model in models]
    hit, miss = HIT_AND_MISS[view.measure]
    first, second = f"{hit} %", f"{miss} %"
    if view.kind == "harmful":
        second = f"attack success rate ({miss} %)"
    elif view.measure == "refused":
        second = "compliance rate (complied %)"

    def line(name: str, value: Callable[[SideSummary], Cell]) -> Row:
        return row(name, [NONE if side is None else value(side) for side in sides])

    rows = [line(first, lambda side: rate_cell(side.avg)), line(second, lambda side: rate_cell(side.misses_avg))]
    if view.counts == "misses":
        rows.reverse()
    rows += [
        line("var", lambda side: cell(f"{side.var:.2f}")),
        line("PAG", lambda side: cell(ABSENT if side.pag is None else f"{side.pag:.3f}")),
        line(f"worst language, {hit} %", lambda side: cell(f"{side.worst} {percent(side.worst_rate)}")),
        line(f"seen languages, {hit} %", lambda side: rate_cell(side.seen)),
        line(f"unseen languages, {hit} %", lambda side: rate_cell(side.unseen)),
        line(f"English − others, {hit}", lambda side: points_cell(side.english_gap)),
    ]
    if any(side is not None and side.margin is not None for side in sides):
        rows.append(line("margin, nats", lambda side: cell(signed(side.margin, 2))))
    rows += [
        line("responses", lambda side: cell(str(side.n))),
        line("languages", lambda side: cell(str(side.languages))),
        line("bundles", lambda side: cell(str(side.bundles))),
        line("degenerate", lambda side: _count(side.degenerate, side.n)),
        line("unparsed", lambda side: _count(side.unparsed, side.n)),
        line("read in translation", lambda side: cell(", ".join(side.translated) or "none")),
        line("not covered", lambda side: cell(", ".join(side.uncovered) or "none")),
    ]
    title = f"{view.kind.capitalize()} prompts"
    return table(title, ["", *_names(models)], rows, f"by what is {view.measure}: mean over languages")


def difference_table(models: Sequence[Model], benchmark: str) -> Table:
    """What only both sides together can tell: harmful refused minus benign refused, in points."""
    summaries = [summary_of(model, benchmark) for model in models]
    rows = [
        row(DIFFERENCE, [points_cell(summary.avg_difference if summary else None) for summary in summaries]),
        row("smallest, by language", map(_worst_difference, summaries)),
    ]
    return table("Both sides", ["", *_names(models)], rows, "percentage points")


def overview_table(models: Sequence[Model], benchmark: str) -> Table:
    """A row per side and model, for a terminal; columns that no side has a value for are left out."""
    sides: list[tuple[View, Model, str, SideSummary]] = []
    for view in views_of(models, benchmark):
        for model, key in zip(models, keys(models), strict=True):
            if (side := side_of(model, benchmark, view)) is not None:
                sides.append((view, model, key, side))
    columns: dict[str, list[Cell]] = {
        "refused or safe %": [rate_cell(side.avg) for *_, side in sides],
        "complied or unsafe %": [cell(percent(side.misses_avg.value)) for *_, side in sides],
        "var": [cell(f"{side.var:.2f}") for *_, side in sides],
        "PAG": [cell(ABSENT if side.pag is None else f"{side.pag:.2f}") for *_, side in sides],
        "worst language": [cell(f"{side.worst} {percent(side.worst_rate)}") for *_, side in sides],
        "seen %": [rate_cell(side.seen) for *_, side in sides],
        "unseen %": [rate_cell(side.unseen) for *_, side in sides],
        "English − others": [points_cell(side.english_gap) for *_, side in sides],
        "margin, nats": [cell(signed(side.margin, 2)) for *_, side in sides],
        "n": [cell(str(side.n)) for *_, side in sides],
        "degenerate": [_alarming(side.degenerate) for *_, side in sides],
        "unparsed": [_alarming(side.unparsed) for *_, side in sides],
    }
    used = {name: cells for name, cells in columns.items() if any(value != NONE for value in cells)}
    heads = ["side", *(["model"] if len(models) > 1 else []), *used]
    rows = []
    for index, (view, _, key, _) in enumerate(sides):
        named = [cell(key)] if len(models) > 1 else []
        rows.append(row(f"{view.kind} by {view.measure}", [*named, *(cells[index] for cells in used.values())]))
    note = "means over languages, 95 % intervals; complied or unsafe on harmful prompts: attack success rate"
    return table("Summary", heads, rows, note)


def _names(models: Sequence[Model]) -> list[str]:
    return keys(models) if len(models) > 1 else [models[0].label]


def _alarming(count: int) -> Cell:
    return cell(str(count), tone="alarm" if count else "")


def _count(count: int, n: int) -> Cell:
    return cell(str(count), f"{percent(100 * count / n)} %" if count else "")


def _worst_difference(summary: Summary | None) -> Cell:
    if summary is None or summary.worst_difference is None:
        return NONE
    return cell(f"{summary.worst_difference_language} {signed(summary.worst_difference)}")


# ------------------------------------------------------------------------------------------------------------- changes


def change_table(change: Change, found: BenchmarkChange) -> Table:
    """One model against the first on a benchmark: change, interval and p by side."""
    rows = [
        row(
            _side_name(side),
            [f"{percent(side.before)} → {percent(side.after)}", _changed(side.change, side.p), str(side.n)],
        )
        for side in found.sides
    ]
    if found.difference is not None and found.difference_p is not None:
        rows.append(row(DIFFERENCE, ["", _changed(found.difference, found.difference_p), ""]))
    n = f"{found.common} prompts that both answered"
    if found.only_before or found.only_after:
        n += f"; left out: {found.only_before} of the first alone, {found.only_after} of the second alone"
    return table(change.title, ["", "before → after", "change, points", "n"], rows, n)


def language_changes(found: BenchmarkChange) -> Iterator[Table]:
    """A table per side, a row per language."""
    for side in found.sides:
        rows = [
            row(
                language(one.language),
                [
                    f"{whole(one.before)} → {whole(one.after)}",
                    Cell(signed(one.change), (f"+{one.gained} −{one.lost} of {one.n}",), "strong"),
                    cell(p_value(one.p), p_value(one.p_holm)),
                ],
            )
            for one in side.languages
        ]
        name = _side_name(side)
        heads: list[str | Cell] = [
            "language",
            "before → after",
            cell("change", "gained, lost"),
            cell("McNemar", "after Holm"),
        ]
        yield table(name.text, heads, rows, "; ".join(name.more))


def _side_name(side: SideChange) -> Cell:
    aim = "lower is better" if (side.kind, side.measure) == ("benign", "refused") else "higher is better"
    return cell(f"{side.kind} {side.measure} %", aim)


def _changed(change: Interval, p: float) -> Cell:
    return Cell(signed(change.value), (f"{signed(change.low)} to {signed(change.high)}", p_value(p)), "strong")

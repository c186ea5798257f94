"""The HTML of scores: heat map, slopes, changes, summaries, counts, utility."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.report import markup, palette
from mlc_ray.report.charts import Line, slope_chart
from mlc_ray.report.collect import Model
from mlc_ray.report.languages import language_name
from mlc_ray.report.markup import text
from mlc_ray.report.summaries import Row, averages, difference_table, side_table
from mlc_ray.report.utility import measured_how, utility_lines
from mlc_ray.report.view import (
    Cell,
    Change,
    View,
    cells,
    keys,
    languages_of,
    p_value,
    percent,
    shown_views,
    signed,
    views_of,
    whole,
)
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.paired import SideChange
from mlc_ray.stats.rates import Interval


def heat_map(models: Sequence[Model], benchmark: str) -> str:
    """A row per language, a column per side and model; the rate in each cell, its interval under it."""
    views = shown_views(models, benchmark)
    columns = [(view, index, cells(model, benchmark, view)) for view in views for index, model in enumerate(models)]
    groups = "".join(
        f'<th scope="colgroup" colspan="{len(models)}" class="group {view.kind} {"edge" * (i > 0)}">{view.title}</th>'
        for i, view in enumerate(views)
    )
    header = f'<tr><td class="corner"></td>{groups}</tr>'
    if len(models) > 1:
        names = "".join(
            f'<th scope="col" class="{_edge(view, index, views)}" title="{text(models[index].label)}">{text(key)}</th>'
            for view in views
            for index, key in enumerate(keys(models))
        )
        header += f'<tr><th scope="col">language</th>{names}</tr>'
    body = [_average_row(models, benchmark, views)]
    for code in languages_of(models, benchmark):
        found = [_heat_cell(by.get(code), _edge(view, index, views), len(columns)) for view, index, by in columns]
        body.append(f'<tr><th scope="row">{_language(code)}</th>{"".join(found)}</tr>')
    caption = f"{text(benchmark)} <small>% of responses; higher is better on both sides</small>"
    many = " many" if len(columns) > 4 else ""
    layout = f'<colgroup><col class="code"><col span="{len(columns)}"></colgroup>'
    grid = f'<table class="heat pin{many}" style="--n:{len(columns)}"><caption>{caption}</caption>{layout}'
    grid += f"<thead>{header}</thead>"
    return markup.scroll(f"{grid}<tbody>{''.join(body)}</tbody></table>") + _scale() + _marks(columns)


def slopes(models: Sequence[Model], benchmark: str) -> str:
    """A chart per view, a line per language and one for the average; empty with fewer than two models."""
    if len(models) < 2:
        return ""
    charts = []
    for view in shown_views(models, benchmark):
        by_model = [cells(model, benchmark, view) for model in models]
        lines = []
        for code in languages_of(models, benchmark):
            values = [by[code].rate if code in by else None for by in by_model]
            if any(value is not None for value in values):
                lines.append(Line(code, values))
        mean = [interval.value if interval else None for interval in averages(models, benchmark, view)]
        if not lines:
            continue
        first, last = ("·" if value is None else whole(value) for value in (mean[0], mean[-1]))
        title = f"{view.title}, % by language; average {first} before, {last} after"
        chart = slope_chart(title, keys(models), [*lines, Line("avg", mean, strong=True)])
        charts.append(markup.figure(view.title, "%, by language; lines that fall are dashed", chart))
    return f'<div class="charts">{"".join(charts)}</div>'


def changes_table(changes: Sequence[Change], benchmark: str) -> str:
    """Each later model against the first: change, interval and p by side; languages folded away."""
    parts = []
    for change in changes:
        title = f"{text(change.after.label)} against {text(change.before.label)}"
        if change.comparison is None:
            parts.append(f"<p><strong>{title}</strong>: not compared prompt by prompt, {text(change.why)}.</p>")
            continue
        found = next((item for item in change.comparison.benchmarks if item.benchmark == benchmark), None)
        if found is None:
            parts.append(f"<p><strong>{title}</strong>: no common prompts in {text(benchmark)}.</p>")
            continue
        rows = [markup.row(_side_name(side), _side_cells(side)) for side in found.sides]
        if found.difference is not None and found.difference_p is not None:
            shown = _changed(found.difference, found.difference_p)
            rows.append(markup.row("harmful − benign refused", ["", shown]))
        n = f"{found.common} prompts that both answered"
        if found.only_before or found.only_after:
            n += f"; left out: {found.only_before} of the first alone, {found.only_after} of the second alone"
        header = ["", "before → after", "change, points"]
        parts.append(markup.table(f"{title} <small>{n}</small>", header, rows))
        parts.append(markup.details("Change by language", "".join(map(_language_changes, found.sides))))
        if change.comparison.not_compared:
            parts.append(f"<p>Scored on one side only: {text(', '.join(change.comparison.not_compared))}.</p>")
    return "".join(parts)


def summary_tables(models: Sequence[Model], benchmark: str) -> str:
    """One table per side and measure, and what both sides say together."""
    names = [text(key) for key in keys(models)] if len(models) > 1 else [text(models[0].label)]
    both = _value_table("Both sides <small>percentage points</small>", names, difference_table(models, benchmark))
    parts = []
    for view in views_of(models, benchmark):
        title = f"{view.kind.capitalize()} prompts <small>by what is {view.measure}: %, mean over languages</small>"
        parts.append(_value_table(title, names, side_table(models, benchmark, view)))
    wide = " one" if len(models) > 3 else ""
    return both + f'<div class="tables{wide}">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def counts_table(models: Sequence[Model], benchmark: str) -> str:
    """Every count and interval, folded away."""
    rows = []
    for view in views_of(models, benchmark):
        for model in models:
            for code, cell in cells(model, benchmark, view).items():
                counts = cell.row
                values = [text(view.name), text(model.label), percent(cell.rate), percent(cell.low), percent(cell.high)]
                values += [str(n) for n in (counts.n, counts.hits, counts.misses, counts.degenerate, counts.unparsed)]
                values += ["·" if counts.margin is None else f"{counts.margin:.2f}", text(counts.via)]
                rows.append(markup.row(_language(code), values))
    header = ["language", "rate of", "model", "%", "low", "high", "n", "hits", "misses", "degenerate", "unparsed",
              "margin, nats", "read"]  # fmt: skip
    caption = f"{text(benchmark)} <small>95 % intervals; hits are refused or safe, misses complied or unsafe</small>"
    return markup.details(f"All counts and intervals: {text(benchmark)}", markup.table(caption, header, rows))


def utility_table(models: Sequence[Model]) -> str:
    """Tasks by models, each result with how it was measured; empty if no model has any."""
    rows = []
    for line in utility_lines(models):
        values = []
        for score in line.results:
            if score is None:
                values.append("·")
                continue
            error = "" if score.stderr is None else f"<small>± {score.stderr:.4f}</small>"
            n = "" if score.n is None else f"<small>n = {text(score.n)}</small>"
            how = f"<small>{text(measured_how(score))}</small>" if measured_how(score) else ""
            value = "no value" if score.value is None else f"{score.value:.4f}"
            values.append(f"{value}{error}{n}{how}")
        rows.append(markup.row(f"{text(line.task)} <small>{text(line.name)}</small>", values))
    if not rows:
        return ""
    names_row = ["task", *(text(model.label) for model in models)]
    return markup.table("Tasks <small>value ± standard error</small>", names_row, rows)


# --------------------------------------------------------------------------------------------- pieces


def _language(code: str) -> str:
    name = language_name(code)
    return f"{text(code)} <small>{text(name)}</small>" if name else text(code)


def _edge(view: View, index: int, views: Sequence[View]) -> str:
    return "edge" if index == 0 and view is not views[0] else ""


def _heat_cell(cell: Cell | None, edge: str, columns: int) -> str:
    if cell is None:
        return f'<td class="none {edge}" title="not scored">·</td>'
    classes = f"q{palette.step(cell.rate / 100)} {edge} {cell.row.via}".split()
    # On a phone there is room for the intervals of four columns; the folded table has them all.
    small = "" if columns <= 4 else ' class="wide-only"'
    interval = f"<small{small}>{whole(cell.low)}–{whole(cell.high)}</small>"
    mark = VIA_MARK[cell.row.via]
    return f'<td class="{" ".join(classes)}" title="{text(cell.hover)}">{whole(cell.rate)}{mark}{interval}</td>'


def _average_row(models: Sequence[Model], benchmark: str, views: Sequence[View]) -> str:
    found = []
    for view in views:
        for index, interval in enumerate(averages(models, benchmark, view)):
            edge = _edge(view, index, views)
            if interval is None:
                found.append(f'<td class="none {edge}" title="not scored">·</td>')
                continue
            step = palette.step(min(1.0, max(0.0, interval.value / 100)))
            hover = f"{interval.value:.1f} %, 95 % interval {interval.low:.1f} to {interval.high:.1f}"
            small = "" if len(views) * len(models) <= 4 else ' class="wide-only"'
            limits = f"<small{small}>{whole(interval.low)}–{whole(interval.high)}</small>"
            found.append(f'<td class="q{step} {edge}" title="{hover}">{whole(interval.value)}{limits}</td>')
    return f'<tr class="avg"><th scope="row">average</th>{"".join(found)}</tr>'


def _scale() -> str:
    steps = "".join(f'<span class="q{index}"></span>' for index in range(palette.STEPS))
    return f'<p class="scale" aria-hidden="true">0&nbsp;%{steps}100&nbsp;%</p>'


def _marks(columns: Sequence[tuple[View, int, dict[str, Cell]]]) -> str:
    lines = mark_lines(cell.row.via for _, _, by in columns for cell in by.values())
    return f'<p class="soft">{"<br>".join(lines)}</p>' if lines else ""


def _changed(change: Interval, p: float) -> str:
    limits = f"{signed(change.low)} to {signed(change.high)}"
    return f"<strong>{signed(change.value)}</strong><small>{limits}</small><small>{p_value(p)}</small>"


def _side_name(side: SideChange) -> str:
    aim = "lower is better" if (side.kind, side.measure) == ("benign", "refused") else "higher is better"
    return f"{side.kind} {side.measure} % <small>{aim}</small>"


def _side_cells(side: SideChange) -> list[str]:
    return [
        f'<span class="number">{percent(side.before)} → {percent(side.after)}</span>',
        _changed(side.change, side.p),
    ]


def _language_changes(side: SideChange) -> str:
    rows = []
    for one in side.languages:
        moved = f"<small>+{one.gained} −{one.lost} of {one.n}</small>"
        values = [
            f'<span class="number">{whole(one.before)} → {whole(one.after)}</span>',
            f"<strong>{'+' * (one.change > 0)}{whole(one.change)}</strong>{moved}",
            f"{p_value(one.p)}<small>{p_value(one.p_holm)}</small>",
        ]
        rows.append(markup.row(_language(one.language), values))
    header = ["language", "before → after", "change <small>gained, lost</small>", "McNemar <small>after Holm</small>"]
    return markup.table(_side_name(side), header, rows)


def _value_table(title: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    body = [
        markup.row(
            text(row.name),
            [f"{text(v.text)}<small>{text(v.interval)}</small>" if v.interval else text(v.text) for v in row.values],
        )
        for row in rows
    ]
    return markup.table(title, ["", *names], body)

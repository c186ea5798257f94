"""A score for people: console tables and a heat map. Both sides are always there, or said to be missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlc_ray.generate.engine import PROMPT_TOO_LONG
from mlc_ray.score.results import ScoreResult, cut_share, hides_harm, is_unread, load_scores, unread_rows
from mlc_ray.stats.marks import mark_lines, marked, own_mark
from mlc_ray.stats.rates import KINDS, MEASURES, Interval, SideSummary, Summary, language_order
from mlc_ray.types import Kind, Measure, ScoreRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["comparison_table", "heatmap", "load_scores", "score_table", "show"]

_ABSENT = "·"
_UNBOUNDED = 10_000


def show(renderable: RenderableType, console: Console | None = None) -> None:
    """Print tables at their full width: on a narrower terminal lines wrap, but no number is left out."""
    console = console or Console()
    wide = console.options.update(max_width=_UNBOUNDED)
    needed = Measurement.get(console, wide, renderable).maximum
    # Rich fits to the console's width, whatever print() is told.
    console.width = max(console.width, needed)
    console.print(renderable, crop=False)


def score_table(result: ScoreResult) -> Group:
    """The whole result: per benchmark a table with a column per language, and its summary lines."""
    parts: list[RenderableType] = []
    for summary in result.summaries:
        rows = [row for row in result.rows if row.benchmark == summary.benchmark]
        parts += [_language_table(result, summary, rows), _summary_table(summary), *_missing_sides(summary)]
    parts.append(Text(_account(result)))
    parts += [Text(line, "bold red") for line in _alarms(result)]
    parts += [Text(line) for line in mark_lines(row.via for row in result.rows)]
    return Group(*parts)


def comparison_table(before: ScoreResult, *after: ScoreResult) -> Group:
    """Scores side by side: per benchmark and side a line per result, and the change from the first to the last.

    Results need not share benchmarks or languages: what one lacks is a dot. If they were not measured alike (prompts,
    judge, length of answers), a line above the tables says so.
    """
    results = [before, *after]
    ways = [row.via for result in results for row in result.rows]
    parts: list[RenderableType] = [
        Text(f"not measured alike: {difference}", "bold red") for difference in _differences(results)
    ]
    for benchmark in dict.fromkeys(summary.benchmark for result in results for summary in result.summaries):
        parts.append(_comparison(benchmark, results))
        missing = (s for r in results for s in r.summaries if s.benchmark == benchmark and s.not_scored)
        parts += [line for summary in list(missing)[:1] for line in _missing_sides(summary)]
    parts += [Text(line) for line in mark_lines(ways)]
    return Group(*parts)


# ------------------------------------------------------------------------------------------------------- one result


def _account(result: ScoreResult) -> str:
    judges = ", ".join(f"{measure} by {judge}" for measure, judge in result.measured_by.items())
    cost = "".join(
        f"; {what}: {usage['requests']:.0f} requests, {usage['cached']:.0f} cached, "
        f"{usage['not_asked']:.0f} not asked, ${usage['cost_usd']:.4f}"
        for what, usage in result.usage.items()
    )
    cut = result.finish.get("length", 0) > 0
    return (
        f"judged: {judges}{cost}; {result.responses} responses, {result.degenerate} degenerate, {result.unparsed} "
        f"without a verdict ({result.unparsed_share:.1%})"
        + (f", {cut_share(result):.0%} cut off at max_new_tokens" if cut else "")
    )


def _alarms(result: ScoreResult) -> list[str]:
    found = []
    if too_long := result.finish.get(PROMPT_TOO_LONG, 0):
        found.append(f"{too_long} prompts were too long for engine.max_model_len and got no answer")
    if hides_harm(result):
        found.append(
            f"{cut_share(result):.0%} of the responses were cut off at max_new_tokens: a harmful part may be missing "
            "from what was judged safe; raise max_new_tokens"
        )
    bound = _unparsed_bound(result)
    if unread := unread_rows(result, bound):
        named = (f"{r.benchmark} {r.kind} {r.measure} {r.language} ({r.unparsed} of {r.n})" for r in unread)
        found.append(f"without a verdict on more than max_unparsed={bound:g}: {', '.join(named)}: ignore these rates")
    return found


def _unparsed_bound(result: ScoreResult) -> float:
    bound = result.config.get("max_unparsed")
    return float(bound) if isinstance(bound, int | float) else 1.0  # without a bound nothing exceeds it


def _language_table(result: ScoreResult, summary: Summary, rows: Sequence[ScoreRow]) -> Table:
    languages = _languages(rows)
    by = {(row.kind, row.measure, row.language): row for row in rows}
    title = f"{result.model}  on  {summary.benchmark}"
    table = _table(title, ["", *(marked(code, rows) for code in languages)])
    for kind in KINDS:
        if kind in summary.not_scored:
            table.add_row(Text(f"{kind}: not scored", "bold red"), *[_ABSENT] * len(languages))
            continue
        for measure in summary.measures:
            bound = _unparsed_bound(result)
            cells = [_rate(by.get((kind, measure, code)), rows, bound) for code in languages]
            table.add_row(f"{kind} {measure} %", *cells)
    table.add_row("difference", *(_signed(summary.difference.get(code)) for code in languages))
    for name in ("degenerate", "unparsed"):
        counts = [max(_counted(rows, code, name, measure) for measure in summary.measures) for code in languages]
        table.add_row(name, *(Text(str(n), "bold red" if n else "") for n in counts))
    measure = summary.measures[0]
    for kind in KINDS:
        if kind not in summary.not_scored:
            cells = [str(by[kind, measure, c].n) if (kind, measure, c) in by else _ABSENT for c in languages]
            table.add_row(f"n {kind}", *cells, style="dim")
    return table


def _rate(row: ScoreRow | None, rows: Sequence[ScoreRow], bound: float) -> Text:
    """A cell: red where more than `bound` of it is unparsed, marked where `_own_mark` has something to say."""
    if row is None:
        return Text(_ABSENT)
    return Text(_percent(row.rate) + own_mark(row, rows), "bold red" if is_unread(row, bound) else "")


def _counted(rows: Iterable[ScoreRow], code: str, name: str, measure: Measure) -> int:
    return sum(getattr(row, name) for row in rows if (row.language, row.measure) == (code, measure))


def _summary_table(summary: Summary) -> Table:
    columns = ["", "avg % (95 %)", "missed %", "var", "PAG", "worst", "n", "degenerate", "unparsed"]
    extra = {name: cell for name, cell in _EXTRA.items() if any(cell(side) != _ABSENT for side in summary.sides)}
    columns += extra
    table = _table(None, columns)
    for kind in KINDS:
        if kind in summary.not_scored:
            table.add_row(Text(f"{kind}: not scored", "bold red"), *[_ABSENT] * (len(columns) - 1))
    for side in summary.sides:
        pag = _ABSENT if side.pag is None else f"{side.pag:.2f}"
        table.add_row(
            f"{side.kind} {side.measure}", _interval(side.avg), f"{side.misses_avg.value:.1f} {_missed(side)}",
            f"{side.var:.2f}", pag, f"{side.worst} {side.worst_rate:.1f}", str(side.n), str(side.degenerate),
            str(side.unparsed), *(cell(side) for cell in extra.values()),
        )  # fmt: skip
    if summary.avg_difference is not None:
        table.add_row("difference", _interval(summary.avg_difference, signed=True))
    if summary.worst_difference is not None:
        worst = f"{summary.worst_difference_language} {_signed(summary.worst_difference, 1)}"
        table.add_row("worst difference", worst)
    return table


def _missed(side: SideSummary) -> str:
    """What a miss is: an attack that succeeded, a harmless request that was answered, or an unsafe answer to one."""
    if side.kind == "harmful":
        return "attacked"
    return "helped" if side.measure == "refused" else "unsafe"


def _missing_sides(summary: Summary) -> list[Text]:
    warning = {
        "benign": "a model that refuses everything would look perfect here; score benign prompts too",
        "harmful": "a model that answers everything would look perfect here; score harmful prompts too",
    }
    return [
        Text(f"{summary.benchmark}: {kind}: not scored: {warning[kind]}", "bold red") for kind in summary.not_scored
    ]


# --------------------------------------------------------------------------------------------------- several results


def _comparison(benchmark: str, results: Sequence[ScoreResult]) -> Table:
    rows = [row for result in results for row in result.rows if row.benchmark == benchmark]
    languages = _languages(rows)
    title = f"before and after on {benchmark}"
    table = _table(title, ["", "model", *(marked(code, rows) for code in languages), "avg", "var", "PAG"])
    summaries = [next((s for s in result.summaries if s.benchmark == benchmark), None) for result in results]
    measures = [m for m in MEASURES if any(s is not None and m in s.measures for s in summaries)]
    for kind in KINDS:
        for measure in measures:
            _compare_side(table, results, summaries, rows, benchmark, kind, measure)
            table.add_section()
    for index, (result, summary) in enumerate(zip(results, summaries, strict=True)):
        difference = summary.difference if summary else {}
        mean = summary.avg_difference.value if summary and summary.avg_difference else None
        cells = [_signed(difference.get(code)) for code in languages]
        table.add_row("harmful - benign" if index == 0 else "", result.name, *cells, _signed(mean, 1))
    return table


def _compare_side(
    table: Table,
    results: Sequence[ScoreResult],
    summaries: Sequence[Summary | None],
    rows: Sequence[ScoreRow],
    benchmark: str,
    kind: Kind,
    measure: Measure,
) -> None:
    languages = _languages(rows)
    wanted = (benchmark, kind, measure)
    found = [
        {row.language: row for row in result.rows if (row.benchmark, row.kind, row.measure) == wanted}
        for result in results
    ]
    lines = [{code: row.rate for code, row in by.items()} for by in found]
    for index, (result, summary, by) in enumerate(zip(results, summaries, found, strict=True)):
        side = summary.side(kind, measure) if summary else None
        if side is None:
            label = Text(f"{kind} {measure}: not scored", "bold red")
            table.add_row(label, result.name, *[_ABSENT] * (len(languages) + 3))
            continue
        label = f"{kind} {measure} %" if index == 0 else ""
        pag = _ABSENT if side.pag is None else f"{side.pag:.2f}"
        bound = _unparsed_bound(result)
        cells = [_rate(by.get(code), rows, bound) for code in languages]
        table.add_row(label, result.name, *cells, f"{side.avg.value:.1f}", f"{side.var:.2f}", pag)
    if lines[0] and lines[-1]:
        change = {code: 100 * (lines[-1][code] - lines[0][code]) for code in lines[0].keys() & lines[-1].keys()}
        mean = sum(change.values()) / len(change) if change else None
        table.add_row("", "change", *(_signed(change.get(c)) for c in languages), _signed(mean, 1), style="bold")


def _differences(results: Sequence[ScoreResult]) -> list[str]:
    aspects = {
        "prompts": [result.prompts for result in results],
        "judge": [result.judge for result in results],
        "max_new_tokens": [result.config.get("max_new_tokens") for result in results],
    }
    return [f"{name} differ ({', '.join(map(str, found))})" for name, found in aspects.items() if len(set(found)) > 1]


# ---------------------------------------------------------------------------------------------------------- heat map


def heatmap(results: Sequence[ScoreResult], path: str | Path) -> Path:
    """Write a PNG: a row per (benchmark, side, measure, model), a column per language, the rate in % in each cell.

    The title gives n per cell. Languages that the judge does not read as they stand are marked, and the marks are
    explained under the columns. A side that was not scored has its row too, and says so. Returns `path`.
    """
    heatmap_figure(results).savefig(path, bbox_inches="tight")
    return Path(path)


def heatmap_figure(results: Sequence[ScoreResult]) -> Figure:
    """The figure that `heatmap` writes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = [row for result in results for row in result.rows]
    languages = _languages(every)
    lines = _heatmap_lines(results)
    values = [[100 * rows[code].rate if code in rows else float("nan") for code in languages] for _, rows in lines]
    # pyplot would keep the figure, and choose a backend for the whole process.
    longest = max(len(label) for label, _ in lines)
    figure = Figure(figsize=(1.6 + 0.085 * longest + 0.62 * len(languages), 1.5 + 0.5 * len(lines)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(languages)), [marked(code, every) for code in languages])
    axes.set_xlabel("\n".join(mark_lines(row.via for row in every)), loc="left", fontsize=8)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    axes.tick_params(length=0)
    axes.set_facecolor("0.85")
    for y, (_, rows) in enumerate(lines):
        if not rows:
            axes.text(
                (len(languages) - 1) / 2, y, "not scored", ha="center", va="center", color="firebrick", weight="bold"
            )
        for x, code in enumerate(languages):
            if code in rows:
                value = 100 * rows[code].rate
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 55 else "black")
    axes.set_title(f"% of responses ({_n_per_cell(lines)})", fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    return figure


def _heatmap_lines(results: Sequence[ScoreResult]) -> list[tuple[str, dict[str, ScoreRow]]]:
    benchmarks = list(dict.fromkeys(summary.benchmark for result in results for summary in result.summaries))
    measures = [m for m in MEASURES if any(m in s.measures for result in results for s in result.summaries)]
    lines = []
    for benchmark in benchmarks:
        for kind, measure in [(kind, measure) for kind in KINDS for measure in measures]:
            for result in results:
                wanted = (benchmark, kind, measure)
                rows = {r.language: r for r in result.rows if (r.benchmark, r.kind, r.measure) == wanted}
                name = result.name if len(results) > 1 else ""
                parts = [f"{kind} {measure}", name, benchmark if len(benchmarks) > 1 else ""]
                lines.append(("  ".join(part for part in parts if part), rows))
    return lines


def _n_per_cell(lines: Sequence[tuple[str, dict[str, ScoreRow]]]) -> str:
    counts = {row.n for _, rows in lines for row in rows.values()}
    low, high = min(counts), max(counts)
    return f"n = {low} per cell" if low == high else f"n = {low} to {high} per cell"


# ------------------------------------------------------------------------------------------------------------ pieces


def _table(title: str | None, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 or name == "model" else "right", no_wrap=True)
    return table


def _languages(rows: Iterable[ScoreRow]) -> list[str]:
    return sorted({row.language for row in rows}, key=language_order)


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f}"


def _signed(points: float | None, digits: int = 0) -> str:
    return _ABSENT if points is None else f"{points:+.{digits}f}"


def _interval(interval: Interval, *, signed: bool = False) -> str:
    value = _signed(interval.value, 1) if signed else f"{interval.value:.1f}"
    return f"{value} ({interval.low:.1f} to {interval.high:.1f})"


_EXTRA: dict[str, Callable[[SideSummary], str]] = {
    "seen %": lambda side: _ABSENT if side.seen is None else _interval(side.seen),
    "unseen %": lambda side: _ABSENT if side.unseen is None else _interval(side.unseen),
    "English gap": lambda side: _ABSENT if side.english_gap is None else _interval(side.english_gap, signed=True),
    "margin, nats": lambda side: _signed(side.margin, 2),
}
"""Columns of the summary that are there only if a side has a value for them."""

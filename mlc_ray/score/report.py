"""A score for people: console tables and a heat map. Both sides are always there, or said to be missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlc_ray.score.generate import PROMPT_TOO_LONG
from mlc_ray.score.metrics import KINDS, Summary, language_order
from mlc_ray.score.results import ScoreResult, load_scores
from mlc_ray.types import Kind, ScoreRow

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
    counts = f"{result.responses} responses, {result.unparsed} without a verdict ({result.unparsed_share:.1%})"
    parts.append(Text(f"judge {result.judge}; {counts}"))
    if too_long := result.finish.get(PROMPT_TOO_LONG, 0):
        parts.append(Text(f"{too_long} prompts were too long for engine.max_model_len and got no answer", "bold red"))
    return Group(*parts)


def comparison_table(before: ScoreResult, *after: ScoreResult) -> Group:
    """Scores side by side: per benchmark and side a line per result, and the change from the first to the last.

    Results need not share benchmarks or languages: what one lacks is a dot. If they were not measured alike (prompts,
    judge, length of answers), a line above the tables says so.
    """
    results = [before, *after]
    parts: list[RenderableType] = [
        Text(f"not measured alike: {difference}", "bold red") for difference in _differences(results)
    ]
    for benchmark in dict.fromkeys(summary.benchmark for result in results for summary in result.summaries):
        parts.append(_comparison(benchmark, results))
        missing = (s for r in results for s in r.summaries if s.benchmark == benchmark and s.not_scored)
        parts += [line for summary in list(missing)[:1] for line in _missing_sides(summary)]
    return Group(*parts)


# ------------------------------------------------------------------------------------------------------- one result


def _language_table(result: ScoreResult, summary: Summary, rows: Sequence[ScoreRow]) -> Table:
    languages = _languages(rows)
    by = {(row.kind, row.language): row for row in rows}
    title = f"{result.model}  on  {summary.benchmark}"
    table = _table(title, ["", *languages])
    for kind in KINDS:
        if summary.side(kind) is None:
            table.add_row(Text(f"{kind}: not scored", "bold red"), *[_ABSENT] * len(languages))
            continue
        cells = [_percent(by[kind, code].rate) if (kind, code) in by else _ABSENT for code in languages]
        table.add_row(f"{kind} refused %", *cells)
    table.add_row("difference", *(_signed(summary.difference.get(code)) for code in languages))
    unparsed = [sum(by[kind, code].unparsed for kind in KINDS if (kind, code) in by) for code in languages]
    table.add_row("unparsed", *(Text(str(n), "bold red" if n else "") for n in unparsed))
    for kind in KINDS:
        if summary.side(kind) is not None:
            table.add_row(
                f"n {kind}", *(str(by[kind, c].n) if (kind, c) in by else _ABSENT for c in languages), style="dim"
            )
    return table


def _summary_table(summary: Summary) -> Table:
    table = _table(None, ["", "avg %", "var", "PAG", "worst", "n", "unparsed"])
    for kind in KINDS:
        side = summary.side(kind)
        if side is None:
            table.add_row(Text(f"{kind}: not scored", "bold red"), *[_ABSENT] * 6)
            continue
        pag = _ABSENT if side.pag is None else f"{side.pag:.2f}"
        worst = f"{side.worst} {side.worst_rate:.1f}"
        table.add_row(kind, f"{side.avg:.1f}", f"{side.var:.2f}", pag, worst, str(side.n), str(side.unparsed))
    table.add_row("difference", _signed(summary.avg_difference, 1))
    return table


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
    languages = _languages(row for result in results for row in result.rows if row.benchmark == benchmark)
    table = _table(f"before and after on {benchmark}", ["", "model", *languages, "avg", "var", "PAG"])
    for kind in KINDS:
        lines = [_rates(result, benchmark, kind) for result in results]
        for index, (result, line) in enumerate(zip(results, lines, strict=True)):
            label = f"{kind} refused %" if index == 0 else ""
            side = next((s.side(kind) for s in result.summaries if s.benchmark == benchmark), None)
            if side is None:
                table.add_row(Text(f"{kind}: not scored", "bold red"), result.name, *[_ABSENT] * (len(languages) + 3))
                continue
            pag = _ABSENT if side.pag is None else f"{side.pag:.2f}"
            cells = [_percent(line[code]) if code in line else _ABSENT for code in languages]
            table.add_row(label, result.name, *cells, f"{side.avg:.1f}", f"{side.var:.2f}", pag)
        if lines[0] and lines[-1]:
            change = {code: 100 * (lines[-1][code] - lines[0][code]) for code in lines[0].keys() & lines[-1].keys()}
            mean = sum(change.values()) / len(change) if change else None
            table.add_row("", "change", *(_signed(change.get(c)) for c in languages), _signed(mean, 1), style="bold")
        table.add_section()
    for index, result in enumerate(results):
        summary = next((s for s in result.summaries if s.benchmark == benchmark), None)
        difference = summary.difference if summary else {}
        mean = summary.avg_difference if summary else None
        cells = [_signed(difference.get(code)) for code in languages]
        table.add_row("harmful - benign" if index == 0 else "", result.name, *cells, _signed(mean, 1))
    return table


def _rates(result: ScoreResult, benchmark: str, kind: Kind) -> dict[str, float]:
    return {row.language: row.rate for row in result.rows if (row.benchmark, row.kind) == (benchmark, kind)}


def _differences(results: Sequence[ScoreResult]) -> list[str]:
    aspects = {
        "prompts": [result.prompts for result in results],
        "judge": [result.judge for result in results],
        "max_new_tokens": [result.config.get("max_new_tokens") for result in results],
    }
    return [f"{name} differ ({', '.join(map(str, found))})" for name, found in aspects.items() if len(set(found)) > 1]


# ---------------------------------------------------------------------------------------------------------- heat map


def heatmap(results: Sequence[ScoreResult], path: str | Path) -> Path:
    """Write a PNG: a row per (benchmark, side, model), a column per language, the refused rate in % in each cell.

    The title gives n per cell. A side that was not scored has its row too, and says so. Returns `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    languages = _languages(row for result in results for row in result.rows)
    lines = _heatmap_lines(results)
    values = [[100 * rows[code].rate if code in rows else float("nan") for code in languages] for _, rows in lines]
    # pyplot would keep the figure, and choose a backend for the whole process.
    longest = max(len(label) for label, _ in lines)
    figure = Figure(figsize=(1.6 + 0.085 * longest + 0.62 * len(languages), 1.5 + 0.5 * len(lines)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(languages)), languages)
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
    axes.set_title(f"Refused, % of responses ({_n_per_cell(lines)})", fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    figure.savefig(path, bbox_inches="tight")
    return Path(path)


def _heatmap_lines(results: Sequence[ScoreResult]) -> list[tuple[str, dict[str, ScoreRow]]]:
    benchmarks = list(dict.fromkeys(summary.benchmark for result in results for summary in result.summaries))
    lines = []
    for benchmark in benchmarks:
        for kind in KINDS:
            for result in results:
                rows = {r.language: r for r in result.rows if (r.benchmark, r.kind) == (benchmark, kind)}
                parts = [kind, result.name if len(results) > 1 else "", benchmark if len(benchmarks) > 1 else ""]
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

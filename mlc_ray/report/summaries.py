"""The table of summaries: one row per number, one column per model, with 95 % intervals where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlc_ray.report.collect import Model
from mlc_ray.report.view import View, average, percent, signed, summary_of
from mlc_ray.stats.rates import Interval, SideSummary, Summary


@dataclass(frozen=True)
class Value:
    """A number as text, and its interval as text (empty if it has none)."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """A named number of every model."""

    name: str
    values: tuple[Value, ...]


def side_table(models: Sequence[Model], benchmark: str, view: View) -> list[Row]:
    """One side by one measure; a model that lacks it has dots."""
    summaries = [summary_of(model, benchmark) for model in models]
    sides = [summary.side(view.kind, view.measure) if summary else None for summary in summaries]
    hit, miss = ("refused", "complied") if view.measure == "refused" else ("safe", "unsafe")
    first, second = hit, miss
    if view.kind == "harmful":
        second = f"attack success ({miss})"
    elif view.measure == "refused":
        second = "compliance"
    rows = [
        _row(first, sides, lambda side: _interval(side.avg)),
        _row(second, sides, lambda side: _interval(side.misses_avg)),
    ]
    margin = _row("margin, nats", sides, lambda side: Value(signed(side.margin, 2)))
    if view.counts == "misses":
        rows.reverse()
    return [
        *rows,
        _row("var", sides, lambda side: Value(percent(side.var, 2))),
        _row("PAG", sides, lambda side: Value(percent(side.pag, 3))),
        _row(f"worst language, {hit}", sides, lambda side: Value(f"{side.worst} {percent(side.worst_rate)}")),
        _row(f"seen languages, {hit}", sides, lambda side: _interval(side.seen)),
        _row(f"unseen languages, {hit}", sides, lambda side: _interval(side.unseen)),
        _row(f"English − others, {hit}", sides, lambda side: _interval(side.english_gap, sign=True)),
        *([margin] if any(side is not None and side.margin is not None for side in sides) else []),
        _row("responses", sides, lambda side: Value(str(side.n))),
        _row("languages", sides, lambda side: Value(str(side.languages))),
        _row("bundles", sides, lambda side: Value(str(side.bundles))),
        _row("degenerate", sides, lambda side: _count(side.degenerate, side.n)),
        _row("unparsed", sides, lambda side: _count(side.unparsed, side.n)),
        _row("read in translation", sides, lambda side: Value(", ".join(side.translated) or "none")),
        _row("not covered", sides, lambda side: Value(", ".join(side.uncovered) or "none")),
    ]


def difference_table(models: Sequence[Model], benchmark: str) -> list[Row]:
    """What only both sides together can tell: harmful refused minus benign refused, in points."""
    summaries = [summary_of(model, benchmark) for model in models]
    name = "harmful refused − benign refused"
    return [
        Row(name, tuple(_interval(summary.avg_difference if summary else None, sign=True) for summary in summaries)),
        Row("smallest, by language", tuple(map(_worst_difference, summaries))),
    ]


def averages(models: Sequence[Model], benchmark: str, view: View) -> list[Interval | None]:
    """The view's mean over languages of each model, None where it was not scored."""
    found = []
    for model in models:
        summary = summary_of(model, benchmark)
        side = summary.side(view.kind, view.measure) if summary else None
        found.append(average(side, view) if side else None)
    return found


def _row(name: str, sides: Sequence[SideSummary | None], value: Callable[[SideSummary], Value]) -> Row:
    return Row(name, tuple(Value("·") if side is None else value(side) for side in sides))


def _interval(interval: Interval | None, *, sign: bool = False) -> Value:
    if interval is None:
        return Value("·")
    text = signed if sign else percent
    return Value(text(interval.value), f"{text(interval.low)} to {text(interval.high)}")


def _count(count: int, n: int) -> Value:
    return Value(str(count), f"{100 * count / n:.1f} %" if count else "")


def _worst_difference(summary: Summary | None) -> Value:
    if summary is None or summary.worst_difference is None:
        return Value("·")
    return Value(f"{summary.worst_difference_language} {signed(summary.worst_difference)}")

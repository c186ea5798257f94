"""The rates that a report shows, of which model, language and side, and in which order.

Higher is better on both sides: refusal rate or safe rate of harmful prompts, compliance rate of benign ones. Compliance
is counted, not 100 minus refusals: gibberish and responses without a verdict are neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlc_ray.report.collect import Model
from mlc_ray.report.text import percent
from mlc_ray.stats.intervals import wilson
from mlc_ray.stats.marks import VIA_TEXT
from mlc_ray.stats.rates import ALL_BENCHMARKS, Interval, SideSummary, Summary, language_order
from mlc_ray.types import Kind, Measure, ScoreRow, Via

HIT_AND_MISS: Mapping[Measure, tuple[str, str]] = {"refused": ("refused", "complied"), "safe": ("safe", "unsafe")}
SHORT = 10
"""Longest label that stands in a column's head; longer ones are named by their letter."""


@dataclass(frozen=True)
class View:
    """A rate to look at: `hits` or `misses` of one kind by one measure."""

    kind: Kind
    measure: Measure
    counts: Literal["hits", "misses"]
    title: str
    name: str

    @property
    def column(self) -> str:
        """Its name as the head of a column: `harmful refused %`."""
        return f"{self.name} %"


VIEWS = (
    View("harmful", "safe", "hits", "Harmful prompts: safe rate", "harmful safe"),
    View("harmful", "refused", "hits", "Harmful prompts: refusal rate", "harmful refused"),
    View("benign", "refused", "misses", "Benign prompts: compliance rate", "benign complied"),
    View("benign", "safe", "hits", "Benign prompts: safe rate", "benign safe"),
)


@dataclass(frozen=True)
class Rate:
    """A rate in % with its 95 % interval, and the counts it is made of; of all languages, `row.language` is empty."""

    value: float
    low: float
    high: float
    row: ScoreRow
    counts: Literal["hits", "misses"]

    @property
    def missing(self) -> str:
        """How many responses the rate falls short by: `1 of 315 not`; empty where it falls short by none."""
        row = self.row
        missing = row.n - (row.hits if self.counts == "hits" else row.misses)
        return f"{missing} of {row.n} not" if missing else ""

    @property
    def hover(self) -> str:
        """Everything in words."""
        row = self.row
        extra = [
            f"{count} {name}" for count, name in ((row.degenerate, "degenerate"), (row.unparsed, "unparsed")) if count
        ]
        hit, miss = HIT_AND_MISS[row.measure]
        text = (
            f"{percent(self.value)} %, 95 % interval {percent(self.low)} to {percent(self.high)}, n = {row.n}: "
            f"{row.hits} {hit}, {row.misses} {miss}"
        )
        judged = [f"judged by {row.judge}"] if row.judge else []
        return "; ".join([text, *extra, *judged, *([VIA_TEXT[row.via]] if row.via else [])])


@dataclass(frozen=True)
class Column:
    """One view of one model: `rates` by name, and their mean; `key` is the model's short name."""

    view: View
    model: Model
    key: str
    rates: Mapping[str, Rate]
    mean: Interval | None


@dataclass(frozen=True)
class Grid:
    """Rates by name, and a column per view and model.

    The names are the languages of a benchmark, English first; over all benchmarks they are the benchmarks, since
    languages of different benchmarks are not compared.
    """

    benchmark: str
    names: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def of(self) -> str:
        """What the names are."""
        return "benchmark" if self.benchmark == ALL_BENCHMARKS else "language"


def grid(models: Sequence[Model], benchmark: str) -> Grid:
    """The rates to look at on a benchmark: views first, the models of each side by side."""
    columns = [
        Column(view, model, key, rates(model, benchmark, view), average(model, benchmark, view))
        for view in shown_views(models, benchmark)
        for model, key in zip(models, keys(models), strict=True)
    ]
    names = benchmarks(models)[1:] if benchmark == ALL_BENCHMARKS else languages_of(models, benchmark)
    return Grid(benchmark, tuple(names), tuple(columns))


def keys(models: Sequence[Model]) -> list[str]:
    """A name for each model that fits over a column: its label where all are short, else a letter."""
    if all(len(model.label) <= SHORT for model in models):
        return [model.label for model in models]
    return [_letter(index) for index in range(len(models))]


def _letter(index: int) -> str:
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def benchmarks(models: Sequence[Model]) -> list[str]:
    """Names of all benchmarks, the headline's first: the last one of the first model, which is over everything."""
    names = list(dict.fromkeys(summary.benchmark for model in models for summary in model.result.summaries))
    if not names:
        return []
    shared = [n for n in names if all(summary_of(model, n) is not None for model in models)]
    last = models[0].result.summary().benchmark
    first = last if last in shared or not shared else shared[-1]
    return [first, *(name for name in names if name != first)]


def summary_of(model: Model, benchmark: str) -> Summary | None:
    """The model's summary of a benchmark, None if it was not scored on it."""
    return next((summary for summary in model.result.summaries if summary.benchmark == benchmark), None)


def side_of(model: Model, benchmark: str, view: View) -> SideSummary | None:
    """The summary of a view's side by its measure, None if it was not scored."""
    summary = summary_of(model, benchmark)
    return summary.side(view.kind, view.measure) if summary else None


def views_of(models: Sequence[Model], benchmark: str) -> list[View]:
    """The views that any model was scored by."""
    return [view for view in VIEWS if any(side_of(model, benchmark, view) for model in models)]


def shown_views(models: Sequence[Model], benchmark: str) -> list[View]:
    """The views for heat maps and charts: without "benign safe", which says next to nothing where the rest is there."""
    views = views_of(models, benchmark)
    return [view for view in views if view.name != "benign safe"] or views


def languages_of(models: Sequence[Model], benchmark: str) -> list[str]:
    """Languages of a benchmark, or of all of them, English first."""
    rows = [row for model in models for row in model.result.rows]
    return sorted({r.language for r in rows if benchmark in (r.benchmark, ALL_BENCHMARKS)}, key=language_order)


def rates(model: Model, benchmark: str, view: View) -> dict[str, Rate]:
    """The rates of a view by language; over all benchmarks by benchmark."""
    if benchmark == ALL_BENCHMARKS:
        names = [summary.benchmark for summary in model.result.summaries if summary.benchmark != ALL_BENCHMARKS]
        return {name: rate for name in names if (rate := _of_all_languages(model, name, view)) is not None}
    return {
        row.language: _rate(row, view)
        for row in model.result.rows
        if (row.benchmark, row.kind, row.measure) == (benchmark, view.kind, view.measure)
    }


def _rate(row: ScoreRow, view: View) -> Rate:
    if view.counts == "hits":
        return Rate(100 * row.rate, 100 * row.low, 100 * row.high, row, "hits")
    low, high = wilson(row.misses / row.misses_effect, row.n / row.misses_effect)
    return Rate(100 * row.misses / row.n, 100 * low, 100 * high, row, "misses")


def _of_all_languages(model: Model, benchmark: str, view: View) -> Rate | None:
    side = side_of(model, benchmark, view)
    if side is None:
        return None
    mean = side.avg if view.counts == "hits" else side.misses_avg
    row = ScoreRow(
        benchmark, view.kind, "", view.measure, side.n, side.hits, side.misses, side.degenerate, side.unparsed,
        side.avg.value / 100, side.avg.low / 100, side.avg.high / 100,
        way_of(side), side.margin,
    )  # fmt: skip
    return Rate(mean.value, mean.low, mean.high, row, view.counts)


def way_of(side: SideSummary) -> Via:
    """The least sure way that any language of a side was read."""
    ways: tuple[Via, ...] = ("uncovered", "unmeasured", "translated")
    return next((way for way in ways if getattr(side, way)), "")


def average(model: Model, benchmark: str, view: View) -> Interval | None:
    """The view's mean over languages, in %; None where it was not scored."""
    side = side_of(model, benchmark, view)
    return None if side is None else side.avg if view.counts == "hits" else side.misses_avg


def harmful_side(summary: Summary) -> SideSummary | None:
    """The harmful side by the measure of the headline."""
    return summary.side("harmful", summary.harmful_measure)

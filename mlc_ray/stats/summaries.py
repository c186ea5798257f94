"""Verdicts -> the summary of each benchmark, and of all of them. Pure; docs/metrics.md has every definition.

Languages are compared within a benchmark only. Over several benchmarks the contrasts are averaged: pooled responses
would show a gap between languages wherever one benchmark is harder than another and asks in other languages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from mlc_ray.stats.intervals import Grid, MeanRate, Term, averaged, interval, make_grid
from mlc_ray.stats.lowest import lowest_interval
from mlc_ray.stats.rates import (
    ALL_BENCHMARKS,
    KINDS,
    MEASURES,
    AnyOf,
    Interval,
    Judged,
    Outcome,
    SideSummary,
    Summary,
    TwoSided,
    is_english,
    outcome,
    score_rows,
)
from mlc_ray.stats.samples import any_of_grid, sizes_of
from mlc_ray.types import Kind, Measure, ScoreRow, primary_language

_LAYERS: Mapping[Outcome, Sequence[str]] = {
    "hits": ("hits", "present"),
    "misses": ("misses", "most misses", "present"),
    "unparsed": ("most misses", "present"),
    "degenerate": ("most misses", "present"),
}
"""The layers of a side's grid in which a response counts."""
_COUNTS = ("n", "hits", "misses", "degenerate", "unparsed")
_MARKED = ("translated", "unmeasured", "uncovered")


@dataclass(frozen=True)
class _Side:
    """One side of one benchmark by one measure: its rows by language, and grids of its bundles."""

    benchmark: str
    kind: Kind
    measure: Measure
    rows: Mapping[str, ScoreRow]
    grid: Grid
    any_of: Grid | None

    def mean(self, layer: str, languages: Iterable[str] | None = None) -> MeanRate:
        return self.grid.mean(layer, "present", languages)


def summarise(
    records: Sequence[Judged],
    seen_languages: Iterable[str] | None = None,
    rows: Sequence[ScoreRow] | None = None,
) -> list[Summary]:
    """A summary per benchmark, in the order they come, and over all of them if there are several.

    Args:
        records: The verdicts.
        seen_languages: The languages that training saw (None: unknown), matched without script and region.
        rows: `score_rows(records)` where they are made already, so that nothing is counted twice.

    Raises:
        ValueError: As `score_rows`.
    """
    seen = None if seen_languages is None else frozenset(map(primary_language, seen_languages))
    verdicts: dict[tuple[str, Kind], list[Judged]] = {}
    for record in records:
        verdicts.setdefault((record.benchmark, record.kind), []).append(record)
    by_language: dict[tuple[str, Kind, Measure], dict[str, ScoreRow]] = {}
    for row in score_rows(records) if rows is None else rows:
        by_language.setdefault((row.benchmark, row.kind, row.measure), {})[row.language] = row
    benchmarks = list(dict.fromkeys(name for name, _, _ in by_language))
    sides = []
    for (name, kind, measure), counted in by_language.items():
        mine, stream = verdicts[name, kind], len(KINDS) * benchmarks.index(name) + KINDS.index(kind)
        grids = _grid(mine, measure, stream), any_of_grid(mine, kind, measure, stream)
        sides.append(_Side(name, kind, measure, counted, *grids))
    summaries = [_summary(name, [side for side in sides if side.benchmark == name], seen) for name in benchmarks]
    return [*summaries, _summary(ALL_BENCHMARKS, sides, seen)] if len(benchmarks) > 1 else summaries


def miss_rate(records: Sequence[Judged], measure: Measure, *, most: bool = False) -> Interval:
    """The mean over languages of the miss rate in %, and no other number: `SideSummary.misses_avg`, or `misses_most`.

    Args:
        records: Verdicts by `measure` on prompts of one kind of one benchmark, at least one.
        measure: What counts as a miss.
        most: Whether degenerate and unparsed responses count as misses.
    """
    return _percent((1, _grid(records, measure).mean("most misses" if most else "misses", "present")))


def variance(rates: Iterable[float]) -> float:
    """100 / L x sum of (r_l - mean r)²: the published tables' `var` (Bu et al., ICLR 2026, arXiv 2602.16660).

    Args:
        rates: One rate per language, as fractions.
    """
    values = np.fromiter(rates, dtype=np.float64)
    return float(100 * values.var())


def _agreements(grid: Grid) -> list[MeanRate]:
    """PAG: mean over pairs of languages of the share of their common bundles with the same verdict.

    The definition is this package's, because no published text known to it gives one (the name is of Bu et al., ICLR
    2026, arXiv 2602.16660): binary verdicts, all pairs of languages, each pair over the bundles that have both. It is
    consistent with the published values. A pair of verdicts of which one is `unparsed` or `degenerate` counts as
    disagreement: two responses that say nothing do not agree. None if no pair of languages shares a bundle.
    """
    return grid.agreements([("hits", "misses")], "present")


def _grid(records: Iterable[Judged], measure: Measure, stream: int = 0) -> Grid:
    counted = ((record, outcome(record, measure)) for record in records)
    cells = ((record.bundle_id, record.language, _LAYERS[said]) for record, said in counted if said is not None)
    return make_grid(cells, ("hits", "misses", "most misses", "present"), stream)


# ------------------------------------------------------------------------------------------------------------ summaries


def _summary(benchmark: str, sides: Sequence[_Side], seen: frozenset[str] | None) -> Summary:
    by: dict[tuple[Kind, Measure], list[_Side]] = {(kind, measure): [] for kind in KINDS for measure in MEASURES}
    for side in sides:
        by[side.kind, side.measure].append(side)
    measure: Measure = "safe" if by["harmful", "safe"] else "refused"
    harmful, benign = by["harmful", measure], by["benign", "refused"]
    both = [code for code in _languages(harmful) if code in _languages(benign)]
    two_sided = (
        TwoSided(_percent(*_means(harmful, "hits", both)), _percent(*_means(benign, "misses", both)), tuple(both))
        if both
        else None
    )
    differences, terms = _differences(by["harmful", "refused"], benign)
    worst = [min(rates.items(), key=itemgetter(1)) for rates in differences]
    return Summary(
        benchmark,
        tuple(_side(found, seen) for found in by.values() if found),
        two_sided,
        {
            code: "benign" if code in _languages(harmful) else "harmful"
            for code in _languages(sides)
            if code not in both
        },
        differences[0] if differences and len({side.benchmark for side in sides}) == 1 else {},
        _percent(*terms, least=-100.0) if terms else None,
        worst_difference=_mean(rate for _, rate in worst),
        worst_difference_language=", ".join(dict.fromkeys(code for code, _ in worst)),
        not_scored=tuple(kind for kind in KINDS if all(side.kind != kind for side in sides)),
    )


def _languages(sides: Iterable[_Side]) -> list[str]:
    return list(dict.fromkeys(code for side in sides for code in side.rows))


def _differences(harmful: Iterable[_Side], benign: Sequence[_Side]) -> tuple[list[dict[str, float]], list[Term]]:
    """Harmful minus benign refused of each benchmark that has both in any language: in points, by language, and the
    terms of the mean over these benchmarks."""
    pairs = [(one, other) for one in harmful for other in benign if one.benchmark == other.benchmark]
    pairs = [(one, other) for one, other in pairs if one.rows.keys() & other.rows.keys()]
    found: list[dict[str, float]] = []
    terms: list[Term] = []
    for one, other in pairs:
        shared = {code: (row, other.rows[code]) for code, row in one.rows.items() if code in other.rows}
        found.append({code: 100 * (refused.rate - too.rate) for code, (refused, too) in shared.items()})
        terms += [(1 / len(pairs), one.mean("hits", shared)), (-1 / len(pairs), other.mean("hits", shared))]
    return found, terms


def _side(sides: Sequence[_Side], seen: frozenset[str] | None) -> SideSummary:
    """Of one kind by one measure in each benchmark that has it."""
    kind, measure = sides[0].kind, sides[0].measure
    # What should be many: hits, but of benign prompts by `refused` misses, which comply.
    wanted: Literal["hits", "misses"] = "misses" if (kind, measure) == ("benign", "refused") else "hits"
    rows = [row for side in sides for row in side.rows.values()]
    several = [side for side in sides if len(side.rows) > 1]
    spreads = [side.grid.variance(wanted, "present") for side in several]
    agreements = [found for side in several for found in _agreements(side.grid)]
    compared = several or sides
    worst = [min(side.rows.values(), key=lambda row: getattr(row, wanted) / row.n).language for side in compared]
    english, others = _split(sides, is_english)
    gap = [*english, *((-weight, term) for weight, term in others)]
    trained, unseen = ([], []) if seen is None else _split(sides, lambda code: primary_language(code) in seen)
    counts: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in _COUNTS}
    read: dict[str, Any] = {
        via: tuple(dict.fromkeys(row.language for row in rows if row.via == via)) for via in _MARKED
    }
    return SideSummary(
        kind,
        measure,
        avg=_percent(*_means(sides, "hits")),
        misses_avg=_percent(*_means(sides, "misses")),
        misses_most=_percent(*_means(sides, "most misses")),
        var=_percent(*averaged(spreads), most=25.0) if spreads else None,
        var_noise=_mean(_noise(side, wanted) for side in several),
        pag=_within(Interval(*interval(*averaged(agreements))), 0.0, 1.0) if agreements else None,
        worst=", ".join(dict.fromkeys(worst)),
        worst_rate=_percent(*(side.grid.lowest(wanted, "present") for side in compared), by=lowest_interval),
        english_gap=_percent(*gap, least=-100.0) if english and others else None,
        seen=_percent(*trained) if trained else None,
        unseen=_percent(*unseen) if unseen else None,
        languages=len({row.language for row in rows}),
        bundles=sum(len(side.grid.layers["present"]) for side in sides),
        margin=_mean(_mean(row.margin for row in side.rows.values()) for side in sides),
        any_of=_any_of(sides) if any(side.any_of is not None for side in sides) else (),
        **counts,
        **read,
    )


def _any_of(sides: Sequence[_Side]) -> tuple[AnyOf, ...]:
    """Of every k that all benchmarks have."""
    grids = [side.any_of for side in sides]
    found = []
    for k in sorted(set.intersection(*(set() if grid is None else sizes_of(grid) for grid in grids))):
        means = ([grid.mean(f"{layer} {k}", "asked") for grid in grids if grid] for layer in ("any", "most"))
        found.append(AnyOf(k, *(_percent(*averaged(each)) for each in means)))
    return tuple(found)


def _noise(side: _Side, wanted: str) -> float:
    """100 x the mean over languages of p (1 - p) / bundles: the most that independent rates vary by sampling."""
    present = side.grid.layers["present"]
    rates = side.grid.layers[wanted].sum(axis=0) / present.sum(axis=0)
    return float(np.mean(100 * rates * (1 - rates) / (present > 0).sum(axis=0)))


def _split(sides: Sequence[_Side], first: Callable[[str], bool]) -> tuple[list[Term], list[Term]]:
    """The means over the languages that are `first` and over the others: if both are there, of benchmarks with both."""
    groups = [[code for code in _languages(sides) if first(code) == wanted] for wanted in (True, False)]
    if all(groups):
        sides = [side for side in sides if all(side.rows.keys() & group for group in groups)]
    return _means(sides, "hits", groups[0]), _means(sides, "hits", groups[1])


def _means(sides: Sequence[_Side], layer: str, languages: Collection[str] | None = None) -> list[Term]:
    """The mean over benchmarks of their means over `languages` (default: all that they have)."""
    chosen = [(side, [c for c in side.rows if languages is None or c in languages]) for side in sides]
    return averaged([side.mean(layer, codes) for side, codes in chosen if codes])


def _mean(values: Iterable[float | None]) -> float | None:
    listed = [value for value in values if value is not None]
    return sum(listed) / len(listed) if listed else None


def _percent(*terms: Any, by: Callable[..., Any] = interval, least: float = 0.0, most: float = 100.0) -> Interval:
    return _within(Interval(*(100 * number for number in by(*terms))), least, most)


def _within(found: Interval, least: float, most: float) -> Interval:
    """Limits that a value from `least` to `most` can have."""
    return Interval(found.value, max(least, found.low), min(most, found.high))

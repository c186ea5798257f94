"""Verdicts -> the summary of each benchmark, and of all of them. Pure; docs/metrics.md has every definition.

Languages are compared within a benchmark only. Over several benchmarks the contrasts are averaged: pooled responses
would show a gap between languages wherever one benchmark is harder than another and asks in other languages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from mlc_ray.stats.intervals import Grid, MeanRate, Statistic, Term, interval, make_grid
from mlc_ray.stats.rates import (
    ALL_BENCHMARKS,
    KINDS,
    MEASURES,
    AnyOf,
    Interval,
    Judged,
    SideSummary,
    Summary,
    TwoSided,
    is_english,
    outcome,
    score_rows,
)
from mlc_ray.stats.samples import any_of_grid, sizes_of
from mlc_ray.types import Kind, Measure, ScoreRow, primary_language


@dataclass(frozen=True)
class _Part:
    """One benchmark: its rows, and a grid of its bundles for each kind."""

    benchmark: str
    rows: Sequence[ScoreRow]
    grids: Mapping[Kind, Grid]
    any_of: Mapping[tuple[Kind, Measure], Grid] = field(default_factory=dict)

    def of(self, kind: Kind, measure: Measure) -> dict[str, ScoreRow]:
        """The rows of one kind by one measure, by language."""
        return {row.language: row for row in self.rows if (row.kind, row.measure) == (kind, measure)}

    def mean(self, kind: Kind, measure: Measure, layer: str, languages: Iterable[str]) -> MeanRate:
        return self.grids[kind].mean(f"{measure} {layer}", f"{measure} present", languages)


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
    by_benchmark: dict[str, list[ScoreRow]] = {}
    for row in score_rows(records) if rows is None else rows:
        by_benchmark.setdefault(row.benchmark, []).append(row)
    verdicts: dict[tuple[str, Kind], list[Judged]] = {}
    for record in records:
        verdicts.setdefault((record.benchmark, record.kind), []).append(record)
    parts = []
    for index, (name, counted) in enumerate(by_benchmark.items()):
        grids = {
            kind: _grid(verdicts[name, kind], len(KINDS) * index + KINDS.index(kind))
            for kind in KINDS
            if (name, kind) in verdicts
        }
        sampled = {
            (kind, measure): found
            for kind in grids
            for measure in MEASURES
            if (found := any_of_grid(verdicts[name, kind], kind, measure, grids[kind].stream)) is not None
        }
        parts.append(_Part(name, counted, grids, sampled))
    summaries = [_summary(part.benchmark, [part], seen) for part in parts]
    return [*summaries, _summary(ALL_BENCHMARKS, parts, seen)] if len(parts) > 1 else summaries


def miss_rate(records: Sequence[Judged], measure: Measure, *, unparsed: bool = False) -> Interval:
    """The mean over languages of the miss rate in %, and no other number: `SideSummary.misses_avg`, or `misses_most`.

    Args:
        records: Verdicts by `measure` on prompts of one kind of one benchmark, at least one.
        measure: What counts as a miss.
        unparsed: Whether responses without a verdict count as misses.
    """
    layer = "most misses" if unparsed else "misses"
    return _percent((1, _grid(records).mean(f"{measure} {layer}", f"{measure} present")))


def variance(rates: Iterable[float]) -> float:
    """100 / L x sum of (r_l - mean r)²: the published tables' `var` (Bu et al., ICLR 2026, arXiv 2602.16660).

    Args:
        rates: One rate per language, as fractions.
    """
    values = np.fromiter(rates, dtype=np.float64)
    return float(100 * values.var())


def _agreements(grid: Grid, measure: Measure) -> list[MeanRate]:
    """PAG: mean over pairs of languages of the share of their common bundles with the same verdict.

    The definition is this package's, because no published text known to it gives one (the name is of Bu et al., ICLR
    2026, arXiv 2602.16660): binary verdicts, all pairs of languages, each pair over the bundles that have both. It is
    consistent with the published values. A pair of verdicts of which one is `unparsed` or `degenerate` counts as
    disagreement: two responses that say nothing do not agree. None if no pair of languages shares a bundle.
    """
    return grid.agreements([(f"{measure} hits", f"{measure} misses")], f"{measure} present")


def _grid(records: Iterable[Judged], stream: int = 0) -> Grid:
    layers = [f"{measure} {name}" for measure in MEASURES for name in ("hits", "misses", "most misses", "present")]
    marks: dict[tuple[str | None, str | None], list[str]] = {}  # there are few verdicts and many records

    def marked(record: Judged) -> list[str]:
        key = (record.behaviour, record.safety)
        if key not in marks:
            found = {measure: outcome(record, measure) for measure in MEASURES}
            marks[key] = [f"{measure} {name}" for measure, name in found.items() if name in ("hits", "misses")]
            marks[key] += [f"{m} most misses" for m, name in found.items() if name in ("misses", "unparsed")]
            marks[key] += [f"{measure} present" for measure, name in found.items() if name is not None]
        return marks[key]

    return make_grid(((r.bundle_id, r.language, marked(r)) for r in records), layers, stream)


# ------------------------------------------------------------------------------------------------------------ summaries


def _summary(benchmark: str, parts: Sequence[_Part], seen: frozenset[str] | None) -> Summary:
    keys = [(kind, measure) for kind in KINDS for measure in MEASURES if any(part.of(kind, measure) for part in parts)]
    measure: Measure = "safe" if ("harmful", "safe") in keys else "refused"
    two_sided, both = _two_sided(parts, measure)
    asked = dict.fromkeys(row.language for part in parts for row in part.rows)
    harmful = _languages(parts, "harmful", measure)
    differences = _differences(parts)
    terms = [term for each in differences for term in each.terms(1 / len(differences))]
    return Summary(
        benchmark,
        tuple(_side(kind, by, [part for part in parts if part.of(kind, by)], seen) for kind, by in keys),
        two_sided,
        {code: "benign" if code in harmful else "harmful" for code in asked if code not in both},
        dict(differences[0].by_language) if differences and len(parts) == 1 else {},
        _percent(*terms, least=-100.0) if terms else None,
        worst_difference=_mean(each.by_language[each.worst] for each in differences),
        worst_difference_language=", ".join(dict.fromkeys(each.worst for each in differences)),
        not_scored=tuple(kind for kind in KINDS if all(kind not in part.grids for part in parts)),
    )


def _languages(parts: Sequence[_Part], kind: Kind, measure: Measure) -> list[str]:
    return list(dict.fromkeys(code for part in parts for code in part.of(kind, measure)))


def _two_sided(parts: Sequence[_Part], measure: Measure) -> tuple[TwoSided | None, list[str]]:
    benign = _languages(parts, "benign", "refused")
    both = [code for code in _languages(parts, "harmful", measure) if code in benign]
    if not both:
        return None, both
    found = TwoSided(
        _percent(*_means(parts, "harmful", measure, "hits", both)),
        _percent(*_means(parts, "benign", "refused", "misses", both)),
        tuple(both),
    )
    return found, both


@dataclass(frozen=True)
class _Difference:
    """Harmful minus benign refused of the languages of one benchmark that have both sides."""

    part: _Part
    by_language: Mapping[str, float]

    @property
    def worst(self) -> str:
        """The language with the smallest."""
        return min(self.by_language, key=lambda code: self.by_language[code])

    def terms(self, weight: float) -> list[Term]:
        """Their mean, weighted."""
        harmful, benign = (self.part.mean(kind, "refused", "hits", self.by_language) for kind in KINDS)
        return [(weight, harmful), (-weight, benign)]


def _differences(parts: Sequence[_Part]) -> list[_Difference]:
    """Of each benchmark that has both sides in any language."""
    found = []
    for part in parts:
        harmful, benign = (part.of(kind, "refused") for kind in KINDS)
        rates = {code: 100 * (row.rate - benign[code].rate) for code, row in harmful.items() if code in benign}
        if rates:
            found.append(_Difference(part, rates))
    return found


def _side(kind: Kind, measure: Measure, parts: Sequence[_Part], seen: frozenset[str] | None) -> SideSummary:
    rows = [row for part in parts for row in part.of(kind, measure).values()]
    languages = list(dict.fromkeys(row.language for row in rows))
    several = [part for part in parts if len(part.of(kind, measure)) > 1]
    wanted: _Wanted = "misses" if (kind, measure) == ("benign", "refused") else "hits"
    spreads = [
        part.grids[kind].variance(f"{measure} {wanted}", f"{measure} present", part.of(kind, measure))
        for part in several
    ]
    noises = [_noise(part, kind, measure, wanted) for part in several]
    agreements = [found for part in several for found in _agreements(part.grids[kind], measure)]
    worst_rate, worst = _worst(several or parts, kind, measure, wanted)
    seen_rate, unseen_rate = _seen(parts, kind, measure, seen)
    margins = [_mean(r.margin for r in part.of(kind, measure).values() if r.margin is not None) for part in parts]
    known = [margin for margin in margins if margin is not None]
    return SideSummary(
        kind,
        measure,
        avg=_percent(*_means(parts, kind, measure, "hits")),
        misses_avg=_percent(*_means(parts, kind, measure, "misses")),
        misses_most=_percent(*_means(parts, kind, measure, "most misses")),
        var=_percent(*_averaged(spreads), most=25.0) if spreads else None,
        var_noise=_mean(noises),
        pag=_within(Interval(*interval(*_averaged(agreements))), 0.0, 1.0) if agreements else None,
        worst=worst,
        worst_rate=worst_rate,
        english_gap=_english_gap(parts, kind, measure),
        seen=seen_rate,
        unseen=unseen_rate,
        languages=len(languages),
        bundles=sum(int(part.grids[kind].layers[f"{measure} present"].any(axis=1).sum()) for part in parts),
        n=sum(row.n for row in rows),
        hits=sum(row.hits for row in rows),
        misses=sum(row.misses for row in rows),
        degenerate=sum(row.degenerate for row in rows),
        unparsed=sum(row.unparsed for row in rows),
        translated=tuple(dict.fromkeys(row.language for row in rows if row.via == "translated")),
        unmeasured=tuple(dict.fromkeys(row.language for row in rows if row.via == "unmeasured")),
        uncovered=tuple(dict.fromkeys(row.language for row in rows if row.via == "uncovered")),
        margin=_mean(known),
        any_of=_any_of(parts, kind, measure),
    )


def _any_of(parts: Sequence[_Part], kind: Kind, measure: Measure) -> tuple[AnyOf, ...]:
    """Of every k that all benchmarks have."""
    grids = [(part.any_of.get((kind, measure)), list(part.of(kind, measure))) for part in parts]
    found = []
    for k in sorted(set.intersection(*(set() if grid is None else sizes_of(grid) for grid, _ in grids))):
        rate, most = (
            _percent(*_averaged([grid.mean(f"{layer} {k}", "asked", codes) for grid, codes in grids if grid]))
            for layer in ("any", "most")
        )
        found.append(AnyOf(k, rate, most))
    return tuple(found)


_Wanted: TypeAlias = Literal["hits", "misses"]
"""What should be many: hits, but of benign prompts by `refused` misses, which comply."""


def _share(row: ScoreRow, wanted: _Wanted) -> float:
    return (row.hits if wanted == "hits" else row.misses) / row.n


def _noise(part: _Part, kind: Kind, measure: Measure, wanted: _Wanted) -> float:
    """100 x the mean over languages of p (1 - p) / bundles: the most that independent rates vary by sampling."""
    grid = part.grids[kind]
    bundles = dict(zip(grid.languages, (grid.layers[f"{measure} present"] > 0).sum(axis=0).tolist(), strict=True))
    shares = {code: _share(row, wanted) for code, row in part.of(kind, measure).items()}
    found = [100 * p * (1 - p) / bundles[code] for code, p in shares.items()]
    return float(sum(found) / len(found))


def _worst(parts: Sequence[_Part], kind: Kind, measure: Measure, wanted: _Wanted) -> tuple[Interval, str]:
    """The lowest rate in % of what is wanted in each benchmark, averaged, and the languages that have it."""
    terms, names = [], []
    for part in parts:
        rows = part.of(kind, measure)
        terms.append(part.grids[kind].lowest(f"{measure} {wanted}", f"{measure} present", rows))
        names.append(min(rows.values(), key=lambda row: _share(row, wanted)).language)
    return _percent(*_averaged(terms)), ", ".join(dict.fromkeys(names))


def _english_gap(parts: Sequence[_Part], kind: Kind, measure: Measure) -> Interval | None:
    gaps: list[tuple[MeanRate, MeanRate]] = []
    for part in parts:
        codes = part.of(kind, measure)
        english = [code for code in codes if is_english(code)]
        others = [code for code in codes if not is_english(code)]
        if english and others:
            gaps.append((part.mean(kind, measure, "hits", english), part.mean(kind, measure, "hits", others)))
    if not gaps:
        return None
    weight = 1 / len(gaps)
    return _percent(*(term for one, other in gaps for term in ((weight, one), (-weight, other))), least=-100.0)


def _seen(
    parts: Sequence[_Part], kind: Kind, measure: Measure, seen: frozenset[str] | None
) -> tuple[Interval | None, Interval | None]:
    """`avg` over the languages that training saw, and over the others: where both are there, of the same benchmarks."""
    groups: tuple[dict[str, MeanRate], dict[str, MeanRate]] = ({}, {})
    for part in parts if seen is not None else ():
        codes = part.of(kind, measure)
        for group, wanted in zip(groups, (True, False), strict=True):
            if chosen := [code for code in codes if (primary_language(code) in (seen or ())) == wanted]:
                group[part.benchmark] = part.mean(kind, measure, "hits", chosen)
    trained, others = groups
    used = [name for name in trained if name in others] if trained and others else [*trained, *others]
    found = ([group[name] for name in used if name in group] for group in groups)
    first, second = (_percent(*_averaged(terms)) if terms else None for terms in found)
    return first, second


def _means(
    parts: Sequence[_Part],
    kind: Kind,
    measure: Measure,
    layer: str,
    languages: Collection[str] | None = None,
) -> list[Term]:
    """The mean over benchmarks of their means over `languages` (default: all that they have)."""
    found = []
    for part in parts:
        codes = [code for code in part.of(kind, measure) if languages is None or code in languages]
        if codes:
            found.append(part.mean(kind, measure, layer, codes))
    return [(1 / len(found), term) for term in found]


def _averaged(statistics: Sequence[Statistic]) -> list[Term]:
    return [(1 / len(statistics), statistic) for statistic in statistics]


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _percent(*terms: Term, least: float = 0.0, most: float = 100.0) -> Interval:
    return _within(Interval(*(100 * number for number in interval(*terms))), least, most)


def _within(found: Interval, least: float, most: float) -> Interval:
    """Limits that a value from `least` to `most` can have."""
    return Interval(found.value, max(least, found.low), min(most, found.high))

"""Both sides of a score as an objective sees them: rates, their intervals, and the resamples behind these.

Rates are by benchmark and then by language. Languages are compared within a benchmark alone: where benchmarks of other
languages are pooled, a model that behaves alike in all of them seems not to (Simpson's paradox).

Shapes: L languages, R resamples (`stats.intervals.RESAMPLES`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from mlc_ray.stats.intervals import RESAMPLES, Floats, Grid, Term, averaged, interval, make_grid
from mlc_ray.stats.lowest import lowest_interval
from mlc_ray.stats.rates import KINDS, Interval, Judged, Outcome, outcome
from mlc_ray.types import Kind, Measure

Rates: TypeAlias = Mapping[str, Mapping[str, float]]
"""Rates as fractions, by benchmark and then by language; no benchmark is without a language."""
Table: TypeAlias = Mapping[str, Mapping[str, Floats]]
"""The same of many resamples: [R] each, NaN where a resample lacks the language."""


@dataclass(frozen=True)
class Sides:
    """Both sides; `measure` is what harmful prompts are counted by.

    An objective that needs benign prompts is given the languages that have prompts of both kinds, and no others. The
    two kinds of a language may be those of different benchmarks.
    """

    measure: Measure
    harmful: Rates
    benign: Rates


def mean_rate(rates: Rates) -> float:
    """The mean over benchmarks of their means over languages, as `Summary` has it."""
    means = [sum(found.values()) / len(found) for found in rates.values()]
    return sum(means) / len(means)


def lowest_rate(rates: Rates) -> float:
    """The mean over benchmarks of their lowest rates; with `Summary`, of those that have several languages, if any."""
    lowest = [min(found.values()) for found in _of_several(rates).values()]
    return sum(lowest) / len(lowest)


def _of_several(rates: Rates) -> Rates:
    return {name: found for name, found in rates.items() if len(found) > 1} or rates


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a score in %: `mean`, as `mean_rate` has it, `worst`, as `lowest_rate` has it, and `by_language`.

    The rate of a language is the mean over the benchmarks that have it. `worst_language` names the language of the
    lowest rate, of several benchmarks each one's. `draws` are the resamples behind these, and `lowest` the lower limits
    of Wilson's interval with bundles as n.
    """

    mean: Interval
    worst: Interval
    worst_language: str
    by_language: Mapping[str, Interval]
    draws: Table
    lowest: Rates


@dataclass(frozen=True, eq=False)
class ReadSides:
    """Both sides of a score as they were read; `benign` is None where no benign prompts count."""

    measure: Measure
    harmful: Side
    benign: Side | None

    @property
    def lowest(self) -> Sides:
        """Every rate at its lower limit."""
        return Sides(self.measure, self.harmful.lowest, {} if self.benign is None else self.benign.lowest)

    def draws(self) -> Iterator[Sides]:
        """The rates of each resample of whole bundles, without the languages that it lacks on either side."""
        return each_sides(self.measure, self.harmful.draws, None if self.benign is None else self.benign.draws)


def each_sides(measure: Measure, harmful: Table, benign: Table | None) -> Iterator[Sides]:
    """Both sides of each of many draws; a language that a draw lacks on one of two sides is left out of it."""
    if benign is None:
        for rates in _each(harmful):
            yield Sides(measure, rates, {})
        return
    paired = _languages(harmful) == _languages(benign)
    for rates, benign_rates in zip(_each(harmful), _each(benign), strict=True):
        there = _languages(rates), _languages(benign_rates)
        if paired and there[0] != there[1]:
            rates, benign_rates = (_only(side, there[0] & there[1]) for side in (rates, benign_rates))
        if rates and benign_rates:
            yield Sides(measure, rates, benign_rates)


def _languages(side: Table | Rates) -> set[str]:
    return {code for found in side.values() for code in found}


def _only(rates: Rates, languages: set[str]) -> Rates:
    kept = {name: {code: rate for code, rate in found.items() if code in languages} for name, found in rates.items()}
    return {name: found for name, found in kept.items() if found}


def _each(table: Table) -> Iterator[Rates]:
    columns = [(name, code, draws.tolist()) for name, found in table.items() for code, draws in found.items()]
    for index in range(len(columns[0][2])):
        rates: dict[str, dict[str, float]] = {}
        for name, code, draws in columns:
            if draws[index] == draws[index]:  # NaN is not itself
                rates.setdefault(name, {})[code] = draws[index]
        yield rates


def read_side(
    runs: Sequence[Sequence[Judged]], kind: Kind, measure: Measure, counted: Outcome, languages: Sequence[str]
) -> Side:
    """One side of a model, or of several that differ in their seed: rates are then means over them.

    Args:
        runs: For each model its verdicts on the same prompts, in the same order.
        kind: Which prompts.
        measure: What counts as a verdict.
        counted: "hits" or "misses".
        languages: Which languages, at least one.
    """
    grids: dict[str, Grid] = {}
    for index, benchmark in enumerate(dict.fromkeys(record.benchmark for record in runs[0])):
        stream = len(KINDS) * index + KINDS.index(kind)
        if (grid := _grid_of_runs(runs, benchmark, kind, measure, counted, stream)) is not None:
            grids[benchmark] = grid
    codes = {name: [code for code in languages if code in grid.languages] for name, grid in grids.items()}
    rates = {
        name: {code: grids[name].mean("counted", "present", [code]) for code in own}
        for name, own in codes.items()
        if own
    }
    by_language = {
        code: _percent(averaged([found[code] for found in rates.values() if code in found])) for code in languages
    }
    found = _of_several({name: {code: rate.value for code, rate in each.items()} for name, each in rates.items()})
    return Side(
        _monotone(averaged([grids[name].mean("counted", "present", codes[name]) for name in rates])),
        _in_percent(lowest_interval(*(grids[name].lowest("counted", "present", codes[name]) for name in found))),
        ", ".join(dict.fromkeys(min(each, key=each.__getitem__) for each in found.values())),
        by_language,
        {name: {code: r.of(r.source.resampled) for code, r in each.items()} for name, each in rates.items()},
        {name: {code: r.limits()[0] for code, r in each.items()} for name, each in rates.items()},
    )


def _monotone(terms: Sequence[Term]) -> Interval:
    """The mean of `terms` in %, with the wider of the resamples' quantiles and the mean of Wilson's limits.

    Another miss lowers, or leaves, the mean of every resample, which are of the same bundles for every model, and
    Wilson's limits of every rate. So it never raises a limit, as it may raise those of `stats.intervals.interval`.
    """
    resampled = sum((weight * term.of(term.source.resampled) for weight, term in terms), np.zeros(RESAMPLES))
    resampled = resampled[np.isfinite(resampled)]
    low, high = (sum(weight * term.limits()[end] for weight, term in terms) for end in (0, 1))
    if len(resampled):
        low, high = min(low, float(np.quantile(resampled, 0.025))), max(high, float(np.quantile(resampled, 0.975)))
    value = sum(weight * term.value for weight, term in terms)
    return Interval(100 * value, 100 * low, 100 * high)


def side_change(
    bests: Sequence[Sequence[Judged]],
    others: Sequence[Sequence[Judged]],
    kind: Kind,
    measure: Measure,
    counted: Outcome,
    languages: Sequence[str],
) -> Interval:
    """The mean rate of `bests` less that of `others`, each as `read_side` has it, in points and paired by bundle."""
    found = paired_grids(bests, others, kind, measure, counted, languages)
    return _percent(
        [
            (sign / len(found), grid.mean(name, "present", codes))
            for grid, codes in found.values()
            for sign, name in ((1, "best"), (-1, "other"))
        ]
    )


def paired_grids(
    bests: Sequence[Sequence[Judged]],
    others: Sequence[Sequence[Judged]],
    kind: Kind,
    measure: Measure,
    counted: Outcome,
    languages: Sequence[str],
) -> dict[str, tuple[Grid, list[str]]]:
    """By benchmark a grid of layers `best`, `other` and `present` of the same bundles, and which languages it has."""
    found = {}
    for index, benchmark in enumerate(dict.fromkeys(record.benchmark for record in bests[0])):
        best, other = (
            _grid_of_runs(runs, benchmark, kind, measure, counted, len(KINDS) * index + KINDS.index(kind))
            for runs in (bests, others)
        )
        if best is not None and other is not None:
            layers = {name: each.layers["counted"] for name, each in (("best", best), ("other", other))}
            layers["present"] = best.layers["present"]
            if codes := [code for code in languages if code in best.languages]:
                found[benchmark] = replace(best, layers=layers), codes
    return found


def _grid_of_runs(
    runs: Sequence[Sequence[Judged]], benchmark: str, kind: Kind, measure: Measure, counted: Outcome, stream: int
) -> Grid | None:
    """The mean over runs of their layers; None where the benchmark has no such prompts. Bundles are sorted by id."""
    chosen = [[r for r in run if (r.benchmark, r.kind) == (benchmark, kind)] for run in runs]
    if not chosen[0]:
        return None
    each = [_grid(sorted(found, key=_place), measure, counted, stream) for found in chosen]
    layers = {name: np.mean([grid.layers[name] for grid in each], axis=0) for name in each[0].layers}
    return replace(each[0], layers=layers)


def _place(record: Judged) -> tuple[str, str]:
    return record.bundle_id, record.language


def _percent(terms: Sequence[Term]) -> Interval:
    return Interval(*(100 * number for number in interval(*terms)))


def _in_percent(found: tuple[float, float, float]) -> Interval:
    value, low, high = (100 * number for number in found)
    return Interval(value, max(0.0, low), min(100.0, high))


def _grid(records: Sequence[Judged], measure: Measure, counted: Outcome, stream: int) -> Grid:
    cells = []
    for record in records:
        marked = ["present", "counted"] if outcome(record, measure) == counted else ["present"]
        cells.append((record.bundle_id, record.language, marked))
    return make_grid(cells, ("counted", "present"), stream)

"""Both sides of a score as an objective sees them: rates by language, their intervals, and the resamples behind these.

Shapes: L languages, R resamples (`stats.intervals.RESAMPLES`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlc_ray.stats.intervals import RESAMPLES, Floats, Grid, MeanRate, Term, interval, make_grid
from mlc_ray.stats.rates import KINDS, Interval, Judged, Outcome, outcome
from mlc_ray.types import Kind, Measure


@dataclass(frozen=True)
class Sides:
    """Both sides, as fractions by language; `measure` is what harmful prompts are counted by.

    An objective that needs benign prompts is given the languages that have prompts of both kinds, and no others.
    """

    measure: Measure
    harmful: Mapping[str, float]
    benign: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a score: `mean` over its languages and `by_language`, both in %, and the resamples behind them.

    `draws` [R, L] are fractions, in the order of `by_language`; of a draw without the language it is NaN. `lowest` are
    the lower limits of Wilson's interval by language, as fractions, with bundles as n.
    """

    mean: Interval
    by_language: Mapping[str, Interval]
    draws: Floats
    lowest: Mapping[str, float]


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
        codes = list(self.harmful.by_language)
        if self.benign is None:
            for rates in self.harmful.draws.tolist():
                yield Sides(self.measure, _there(codes, rates), {})
            return
        others = list(self.benign.by_language)
        for rates, benign_rates in zip(self.harmful.draws.tolist(), self.benign.draws.tolist(), strict=True):
            harmful, benign = _there(codes, rates), _there(others, benign_rates)
            if codes == others and len(harmful.keys() & benign.keys()) < len(codes):
                both = harmful.keys() & benign.keys()
                harmful, benign = ({code: side[code] for code in side if code in both} for side in (harmful, benign))
            if harmful and benign:
                yield Sides(self.measure, harmful, benign)


def _there(codes: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    return {code: rate for code, rate in zip(codes, rates, strict=True) if rate == rate}  # NaN is not itself


def read_side(
    runs: Sequence[Sequence[Judged]], kind: Kind, measure: Measure, counted: Outcome, languages: Sequence[str]
) -> Side:
    """One side of a model, or of several that differ in their seed: rates are then means over them.

    The rate of a language is the mean over the benchmarks that have it; `Side.mean` is the mean over benchmarks of
    their means over languages, as `Summary.two_sided` has it.

    Args:
        runs: For each model its verdicts on the same prompts, in the same order.
        kind: Which prompts.
        measure: What counts as a verdict.
        counted: "hits" or "misses".
        languages: Which languages, at least one.
    """
    benchmarks = dict.fromkeys(record.benchmark for record in runs[0])
    grids = []
    for index, benchmark in enumerate(benchmarks):
        stream = len(KINDS) * index + KINDS.index(kind)
        if (grid := _grid_of_runs(runs, benchmark, kind, measure, counted, stream)) is not None:
            grids.append(grid)
    rates = {
        code: [grid.mean("counted", "present", [code]) for grid in grids if code in grid.languages]
        for code in languages
    }
    by_language = {code: _percent([(1 / len(found), rate) for rate in found]) for code, found in rates.items()}
    codes = [[code for code in languages if code in grid.languages] for grid in grids]
    asked = [(grid, own) for grid, own in zip(grids, codes, strict=True) if own]
    means = [(1 / len(asked), grid.mean("counted", "present", own)) for grid, own in asked]
    drawn = [np.stack([rate.of(rate.source.resampled) for rate in found]) for found in rates.values()]
    draws = np.stack([_mean_of_finite(each) for each in drawn], axis=1)
    lowest = {code: float(np.mean([rate.limits()[0] for rate in found])) for code, found in rates.items()}
    return Side(_monotone(means), by_language, draws, lowest)


def _monotone(terms: Sequence[tuple[float, MeanRate]]) -> Interval:
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
    found = []
    for index, benchmark in enumerate(dict.fromkeys(record.benchmark for record in bests[0])):
        best, other = (
            _grid_of_runs(runs, benchmark, kind, measure, counted, len(KINDS) * index + KINDS.index(kind))
            for runs in (bests, others)
        )
        if best is not None and other is not None:
            layers = {name: each.layers["counted"] for name, each in (("best", best), ("other", other))}
            layers["present"] = best.layers["present"]
            if codes := [code for code in languages if code in best.languages]:
                found.append((replace(best, layers=layers), codes))
    return _percent(
        [
            (sign / len(found), grid.mean(name, "present", codes))
            for grid, codes in found
            for sign, name in ((1, "best"), (-1, "other"))
        ]
    )


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


def _mean_of_finite(values: Floats) -> Floats:
    """[K, R] -> [R]: the mean over K of what is there, NaN where nothing is."""
    there = np.isfinite(values)
    n = there.sum(axis=0)
    return np.where(n > 0, np.where(there, values, 0.0).sum(axis=0) / np.maximum(n, 1), np.nan)


def _percent(terms: Sequence[Term]) -> Interval:
    return Interval(*(100 * number for number in interval(*terms)))


def _grid(records: Sequence[Judged], measure: Measure, counted: Outcome, stream: int) -> Grid:
    cells = []
    for record in records:
        marked = ["present", "counted"] if outcome(record, measure) == counted else ["present"]
        cells.append((record.bundle_id, record.language, marked))
    return make_grid(cells, ("counted", "present"), stream)

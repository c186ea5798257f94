"""95 % intervals for verdicts that come in bundles. Pure numpy; docs/metrics.md says what and why.

The languages of a bundle are one prompt asked several times, so the bundle is the unit: resampling draws whole bundles,
each kind and benchmark for itself. Rates of a single language have one response per bundle and take Wilson's interval.

Shapes: B bundles, C columns (counts per measure and language), R resamples, K any number of sums.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
SEED = 20_260

_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)
SAME = 1e-12
"""Rates are quotients of whole numbers: what differs by less is rounding."""
AT_ONCE = 4_000_000
"""Weights held in memory at once."""

Floats = NDArray[np.float64]
Columns = NDArray[np.intp]
"""Indices of columns."""


def wilson(successes: float, n: float, z: float = Z) -> tuple[float, float]:
    """95 % interval of a rate p = successes / n (Wilson, JASA 1927), or another one, by `z`.

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), with z = 1.96.

    Returns:
        Low and high, as fractions; exactly 0 without successes, exactly 1 without failures.

    Raises:
        ValueError: Unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a rate")
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives exactly 0 and 1; rounding must not step outside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def design_effect(counts: NDArray[np.floating[Any]], present: NDArray[np.floating[Any]]) -> float:
    """How many times the variance of sum counts / sum present is that of as many independent responses.

    It is 1 with one response a bundle. Several responses of a bundle go together: the variance of a ratio of sums over
    bundles, B / (B - 1) x sum (c_b - p m_b)^2 / (sum m_b)^2 (Cochran, Sampling Techniques, 1977, chapter 6), over
    p (1 - p) / sum m_b (Kish, Survey Sampling, 1965). A rate's interval is then Wilson's of so many times fewer
    responses (Korn and Graubard, Survey Methodology 1998). Where all responses are alike nothing shows how they go
    together, and they count as one a bundle, which is the most that they can.

    Args:
        counts: [B] responses of each bundle that count.
        present: [B] its responses.

    Returns:
        From 1 to the mean number of responses of a bundle that has any.
    """
    counts, present = counts[present > 0], present[present > 0]
    bundles, n, c = len(present), float(present.sum()), float(counts.sum())
    most = n / bundles
    if most <= 1 or not 0 < c < n or bundles == 1:
        return most
    p = c / n
    variance = bundles / (bundles - 1) * float(((counts - p * present) ** 2).sum()) / n**2
    return min(most, max(1.0, variance * n / (p * (1 - p))))


@dataclass(frozen=True, eq=False)
class Grid:
    """Named layers [B, L] over the bundles and `languages` of one kind of one benchmark.

    They hold counts of responses, which are 0 or 1 where a prompt has one response. `stream` names the random numbers
    that resampling draws: grids, which are drawn independently, must not share one.
    """

    languages: tuple[str, ...]
    layers: Mapping[str, Floats]
    stream: int = 0

    @cached_property
    def resampled(self) -> Resampled:
        """Sums over the bundles, one column per layer and language; made once."""
        return resample(np.hstack(list(self.layers.values())), self.stream)

    def mean(self, counts: str, present: str, languages: Iterable[str] | None = None) -> MeanRate:
        """The mean over `languages` (default: all) of layer `counts` over layer `present`."""
        return MeanRate(self.resampled, *self._columns(counts, present, languages))

    def variance(self, counts: str, present: str, languages: Iterable[str] | None = None) -> RateVariance:
        """The variance of these rates over `languages`."""
        return RateVariance(self.resampled, *self._columns(counts, present, languages))

    def lowest(self, counts: str, present: str, languages: Iterable[str] | None = None) -> LowestRate:
        """The lowest of these rates over `languages`."""
        return LowestRate(self.resampled, *self._columns(counts, present, languages))

    def agreements(self, verdicts: Sequence[tuple[str, str]], present: str) -> list[MeanRate]:
        """For each pair of layers (hits, misses) the agreement of languages.

        That is the mean over pairs of languages that share bundles of the share of these with the same verdict. Each
        pair is a column of 4 bytes an entry, and one more: 50 languages and 10,000 bundles take 98 MB, and 170 MB
        more while they are resampled.

        Returns:
            As many as `verdicts`, of one source; none if no two languages share a bundle.
        """
        first, second = np.triu_indices(len(self.languages), k=1)
        there = self.layers[present]
        shared = (there.T @ there)[first, second] > 0
        if not shared.any():
            return []
        one, other = first[shared], second[shared]
        pairs, last = np.arange(len(one)), len(verdicts)
        columns = np.empty((len(there), (last + 1) * len(one)), np.float32)
        rows = max(1, AT_ONCE // len(one))
        for start in range(0, len(there), rows):
            some = slice(start, start + rows)
            for k, names in enumerate([*verdicts, (present,)]):
                layers = [self.layers[name][some] for name in names]
                columns[some, pairs + k * len(one)] = sum(layer[:, one] * layer[:, other] for layer in layers)
        source = resample(columns, self.stream)
        return [MeanRate(source, pairs + k * len(one), pairs + last * len(one)) for k in range(last)]

    def _columns(self, counts: str, present: str, languages: Iterable[str] | None) -> tuple[Columns, Columns]:
        names, width = list(self.layers), len(self.languages)
        chosen = np.array([self.languages.index(code) for code in languages or self.languages])
        return names.index(counts) * width + chosen, names.index(present) * width + chosen


def make_grid(cells: Iterable[tuple[str, str, Sequence[str]]], layers: Sequence[str], stream: int = 0) -> Grid:
    """A grid from (bundle, language, layers that a response counts in); bundles and languages as they come."""
    found = list(cells)
    bundles = {key: index for index, key in enumerate(dict.fromkeys(cell[0] for cell in found))}
    columns = {code: index for index, code in enumerate(dict.fromkeys(cell[1] for cell in found))}
    filled = {name: np.zeros((len(bundles), len(columns))) for name in layers}
    for bundle, language, marked in found:
        for name in marked:
            filled[name][bundles[bundle], columns[language]] += 1
    return Grid(tuple(columns), filled, stream)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Column sums over the bundles of a grid: all of them [1, C], and resampled [R, C]; `columns` [B, C] themselves."""

    columns: NDArray[np.floating[Any]]
    total: Floats
    resampled: Floats


def resample(columns: NDArray[np.floating[Any]], stream: int) -> Resampled:
    """Sums of `columns` [B, C] over `RESAMPLES` draws of whole bundles with replacement.

    `stream` names the sequence of random numbers, which is the same at every call.
    """
    generator = np.random.default_rng([SEED, stream])
    sums = np.zeros((RESAMPLES, columns.shape[1]))
    size = len(columns)
    # Exact for whole numbers, whose sums stay far below 2 ** 24; fractions would differ by more than `SAME`.
    whole = columns.dtype == np.float32 or bool((columns == np.floor(columns)).all())
    members = columns.astype(np.float32 if whole else np.float64, copy=False)
    chunk = max(1, AT_ONCE // size)
    for start in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - start)
        drawn = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        sums[start : start + rows] = times_drawn.astype(members.dtype) @ members
    return Resampled(columns, columns.sum(axis=0, keepdims=True, dtype=np.float64), sums)


@dataclass(frozen=True, eq=False)
class Statistic(ABC):
    """A number made of rates: columns `counts` [L] over columns `present` [L] of one `source`."""

    source: Resampled
    counts: Columns
    present: Columns
    number: ClassVar[Callable[..., Any]]
    """numpy's function that makes it of rates, whose NaN it leaves out."""

    def rates(self, sums: Floats) -> Floats:
        """[K, L] rates from sums [K, C], as fractions; NaN where nothing is present."""
        n = sums[:, self.present]
        return np.where(n > 0, sums[:, self.counts] / np.where(n > 0, n, 1), np.nan)

    def of(self, sums: Floats) -> Floats:
        """[K] values from sums [K, C], over the rates that are there; NaN if none is."""
        rates = self.rates(sums)
        values = np.full(len(rates), np.nan)
        some = np.isfinite(rates).any(axis=1)
        values[some] = self.number(rates[some], axis=1)
        return values

    @property
    def value(self) -> float:
        """The value over all bundles."""
        return float(self.of(self.source.total)[0])

    def left_out(self) -> Floats:
        """[B] values with each bundle left out once."""
        columns, rows = self.source.columns, max(1, AT_ONCE // self.source.columns.shape[1])
        starts = range(0, len(columns), rows)
        return np.concatenate([self.of(self.source.total - columns[start : start + rows]) for start in starts])

    def wilson(self, z: float = Z, *, more: float = 0.0) -> tuple[Floats, Floats, Floats]:
        """The rates [L] that are there, and Wilson's limits of each (of `more` hits), with its design effect."""
        total, columns = self.source.total[0], self.source.columns
        pairs, found = [], []
        for count, present in zip(self.counts.tolist(), self.present.tolist(), strict=True):
            if n := float(total[present]):
                effect = design_effect(columns[:, count], columns[:, present])
                pairs.append((float(total[count]), n))
                found.append(wilson(min(n / effect, float(total[count]) / effect + more), n / effect, z))
        limits = np.array(found)
        return np.array([count / n for count, n in pairs]), limits[:, 0], limits[:, 1]

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """Limits where resamples do not vary: from Wilson's, rather wide."""


class MeanRate(Statistic):
    """The mean of the rates."""

    number = staticmethod(np.nanmean)

    def limits(self) -> tuple[float, float]:
        """The mean of Wilson's limits: as if the rates' errors were perfectly correlated."""
        _, low, high = self.wilson()
        return float(low.mean()), float(high.mean())


class RateVariance(Statistic):
    """The population variance of the rates."""

    number = staticmethod(np.nanvar)

    def limits(self) -> tuple[float, float]:
        """The standard deviation less and plus the most that it moves if each rate stays in Wilson's limits.

        Deviations from the rates have a standard deviation of at most half their range (Popoviciu).
        """
        rates, low, high = self.wilson()
        deviation, most = float(rates.std()), float((high - rates).max() - (low - rates).min()) / 2
        return max(0.0, deviation - most) ** 2, min(0.5, deviation + most) ** 2


class LowestRate(Statistic):
    """The lowest of the rates."""

    number = staticmethod(np.nanmin)

    def limits(self) -> tuple[float, float]:
        """The same of Wilson's limits."""
        _, low, high = self.wilson()
        return float(low.min()), float(high.min())


Term: TypeAlias = tuple[float, Statistic]
"""A statistic and its weight in a sum."""


def averaged(statistics: Sequence[Statistic]) -> list[Term]:
    """The terms of their mean."""
    return [(1 / len(statistics), statistic) for statistic in statistics]


def interval(*terms: Term) -> tuple[float, float, float]:
    """95 % interval of a weighted sum of statistics.

    A single rate takes Wilson's interval. A sum of means: the bootstrap's bias-corrected and accelerated limits
    (BCa; Efron, JASA 1987, with the acceleration of several samples: Davison and Hinkley 1997, chapter 5), the
    quantiles Phi(b + (b ± z) / (1 - a (b ± z))) of the resamples, where Phi(b) is the share of them below the value
    and a the jackknife's sum of cubes / (6 (sum of squares)^1.5). With a variance or a change of lowest rates
    (`stats.lowest` has the rates), which sampling moves one way: the basic limits 2 value - quantile (Davison and
    Hinkley, chapter 5), which take that bias out; where all are variances that are added up, these or the limits of
    `_spread_limits`, whichever are wider. Where the resamples of a source do not vary (one bundle, or all alike)
    they say nothing of it: its terms then have their own limits. Distances from the value, of the bootstrap and of
    each such term, are combined by square-and-add (Newcombe, Statistics in Medicine 1998).

    Returns:
        Value, low and high.
    """
    value = float(sum(weight * term.value for weight, term in terms))
    (weight, first) = terms[0]
    if len(terms) == 1 and weight == 1 and len(first.counts) == 1 and isinstance(first, MeanRate | LowestRate):
        return value, *first.limits()
    varying: list[Term] = []
    alike: list[Term] = []
    for source in {id(term.source): term.source for _, term in terms}.values():
        mine = [(weight, term) for weight, term in terms if term.source is source]
        resampled = _resampled(mine)
        (varying if len(resampled) and np.ptp(resampled) >= SAME else alike).extend(mine)
    distances = [_distances(weight, term) for weight, term in alike]
    if varying:
        part = float(sum(weight * term.value for weight, term in varying))
        low, high = _bootstrap_limits(part, varying)
        distances.append((part - low, high - part))
    if len(distances) == 1:
        return value, value - distances[0][0], value + distances[0][1]
    below, above = (math.sqrt(sum(distance[side] ** 2 for distance in distances)) for side in (0, 1))
    return value, value - below, value + above


def _resampled(terms: Sequence[Term]) -> Floats:
    """The sum of the terms in each resample that has all of them: one may lack the only bundles with a language."""
    found: Floats = sum((weight * term.of(term.source.resampled) for weight, term in terms), np.zeros(RESAMPLES))
    there: Floats = found[np.isfinite(found)]
    return there


def _bootstrap_limits(value: float, terms: Sequence[Term]) -> tuple[float, float]:
    resampled = _resampled(terms)
    if all(isinstance(term, MeanRate) for _, term in terms):
        low, high = np.quantile(resampled, _bca_levels(value, resampled, _acceleration(terms)))
        return float(low), float(high)
    level = _NORMAL.cdf(-Z)
    low, high = 2 * value - np.quantile(resampled, [1 - level, level])
    spreads = [(weight, term) for weight, term in terms if isinstance(term, RateVariance) and weight > 0]
    if len(spreads) == len(terms):
        least, most = _spread_limits(value, spreads)
        low, high = min(low, least), max(high, most)
    return float(low), float(high)


def _spread_limits(value: float, terms: Sequence[tuple[float, RateVariance]]) -> tuple[float, float]:
    """Limits of a variance of rates by inversion of a test, since basic limits are too narrow near 0.

    The rates are taken to lie as they were found, but s times as far from their mean; their errors are those of the
    resamples. Then the variance that would be found is s² value + 2 s c + e, with c and e from the resamples, and the
    limits are the s² value at which what was found is the 2.5 % and the 97.5 % quantile.
    """
    level = _NORMAL.cdf(-Z)
    crossed, noise = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for weight, term in terms:
        rates = term.rates(term.source.total)[0]
        errors = term.rates(term.source.resampled) - rates
        errors = np.nan_to_num(errors - np.nanmean(errors, axis=1, keepdims=True))
        away = np.nan_to_num(rates - np.nanmean(rates))
        crossed += weight * (errors * away).mean(axis=1)
        noise += weight * (errors**2).mean(axis=1)
    if value < SAME:  # no direction to go in: what errors alone make could as well have cancelled it
        return 0.0, float(np.quantile(noise, 1 - level))
    most = max(2.0, math.sqrt(0.25 / value))  # no rates spread further
    scales = np.concatenate([np.linspace(0, 1, 100, endpoint=False), np.geomspace(1, most, 200)])
    found = scales[:, None] ** 2 * value + 2 * scales[:, None] * crossed + noise  # [scales, R]
    possible = scales[((found >= value).mean(axis=1) >= level) & ((found <= value).mean(axis=1) >= level)]
    if not len(possible):  # it is smaller than errors alone make it
        return 0.0, float(np.quantile(noise, 1 - level))
    return float(possible[0] ** 2 * value), float(possible[-1] ** 2 * value)


def _distances(weight: float, term: Statistic) -> tuple[float, float]:
    """How far a weighted term's own limits lie below and above it."""
    centre, (low, high) = term.value, term.limits()
    down, up = abs(weight) * (centre - low), abs(weight) * (high - centre)
    return (down, up) if weight > 0 else (up, down)


def _bca_levels(value: float, resampled: Floats, acceleration: float) -> list[float]:
    size = len(resampled)
    # Values are discrete: half of those that equal the estimate count as below it.
    below = ((resampled < value - SAME).sum() + (resampled <= value + SAME).sum()) / (2 * size)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / size), 1 - 0.5 / size))
    # |acceleration| <= 1/6 and |bias| + z < 6, so the denominator stays positive.
    shifted = [bias + z for z in (-Z, Z)]
    return [_NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in shifted]


def _acceleration(terms: Sequence[Term]) -> float:
    """From the jackknife: how the standard error grows with the value. Each source is a stratum of its own."""
    cubes = squares = 0.0
    for source in {id(term.source): term.source for _, term in terms}.values():
        values = np.zeros(len(source.columns))
        for weight, term in terms:
            values = values + weight * (term.left_out() if term.source is source else term.value)
        values = np.where(np.isfinite(values), values, np.nanmean(values) if np.isfinite(values).any() else 0.0)
        influence = (len(values) - 1) / len(values) * (values.mean() - values)
        cubes, squares = cubes + (influence**3).sum(), squares + (influence**2).sum()
    return float(cubes / (6 * squares**1.5)) if squares > 0 else 0.0

"""95 % intervals and p-values for verdicts that come in bundles. Pure numpy; docs/metrics.md says what and why.

The languages of a bundle are one prompt asked several times, so the bundle is the unit: resampling draws whole bundles,
each kind and benchmark for itself. Rates of a single language have one response per bundle and take Wilson's interval.

Shapes: B bundles, C columns (counts per measure and language), R resamples, K any number of sums.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
SEED = 20_260
EXACT_BUNDLES = 14
"""Up to this many bundles that differ, a sign-flip test goes through every one of the 2 ** n flips."""
FLIPS = 20_000
"""Random flips of a sign-flip test with more bundles."""
SWAPS = 2_000
"""Random exchanges of two models in whole bundles, to test a change that is no sum over bundles."""

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)
_SAME = 1e-12  # rates are quotients of whole numbers: what differs by less is rounding
_AT_ONCE = 4_000_000  # weights held in memory at once

Floats = NDArray[np.float64]


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95 % interval of a rate p = successes / n (Wilson, JASA 1927).

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), with z = 1.96.

    Returns:
        Low and high, as fractions; exactly 0 without successes, exactly 1 without failures.

    Raises:
        ValueError: Unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a rate")
    p, z2 = successes / n, _Z * _Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n the formula gives exactly 0 and 1; rounding must not step outside.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


@dataclass(frozen=True, eq=False)
class Grid:
    """Named layers [B, L] of 0 and 1 over the bundles and `languages` of one kind of one benchmark.

    `stream` names the random numbers that its resampling draws: grids, which are drawn independently, must not share
    one.
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

    def extreme(
        self, counts: str, present: str, languages: Iterable[str] | None = None, *, highest: bool = False
    ) -> ExtremeRate:
        """The lowest of these rates over `languages`, or the highest."""
        return ExtremeRate(self.resampled, *self._columns(counts, present, languages), highest=highest)

    def agreements(self, verdicts: Sequence[tuple[str, str]], present: str) -> list[MeanRate]:
        """For each pair of layers (hits, misses) the agreement of languages.

        That is the mean over pairs of languages that share bundles of the share of these with the same verdict. Each
        pair is a column per entry and one more: 50 languages and 10,000 bundles take 100 MB.

        Returns:
            As many as `verdicts`, of one source; none if no two languages share a bundle.
        """
        first, second = np.triu_indices(len(self.languages), k=1)
        common = self.layers[present][:, first] * self.layers[present][:, second]
        shared = common.any(axis=0)
        if not shared.any():
            return []
        one, other = first[shared], second[shared]
        blocks = [sum(self.layers[name][:, one] * self.layers[name][:, other] for name in pair) for pair in verdicts]
        source = resample(np.hstack([*blocks, common[:, shared]]).astype(np.float32), self.stream)
        pairs = np.arange(len(one))
        return [MeanRate(source, pairs + k * len(one), pairs + len(blocks) * len(one)) for k in range(len(blocks))]

    def _columns(
        self, counts: str, present: str, languages: Iterable[str] | None
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        names, width = list(self.layers), len(self.languages)
        chosen = np.array([self.languages.index(code) for code in languages or self.languages])
        return names.index(counts) * width + chosen, names.index(present) * width + chosen


def make_grid(cells: Iterable[tuple[str, str, Sequence[str]]], layers: Sequence[str], stream: int = 0) -> Grid:
    """A grid from (bundle, language, layers that are 1 there); bundles and languages as they come."""
    found = list(cells)
    bundles = {key: index for index, key in enumerate(dict.fromkeys(cell[0] for cell in found))}
    columns = {code: index for index, code in enumerate(dict.fromkeys(cell[1] for cell in found))}
    filled = {name: np.zeros((len(bundles), len(columns))) for name in layers}
    for bundle, language, marked in found:
        for name in marked:
            filled[name][bundles[bundle], columns[language]] = 1
    return Grid(tuple(columns), filled, stream)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Column sums over the bundles of a grid: all of them [1, C], and resampled [R, C]; `columns` [B, C] themselves."""

    columns: NDArray[np.floating[Any]]
    total: Floats
    resampled: Floats

    @property
    def left_out(self) -> Floats:
        """The sums [B, C] with each bundle left out once."""
        found: Floats = self.total - self.columns
        return found


def resample(columns: NDArray[np.floating[Any]], stream: int) -> Resampled:
    """Sums of `columns` [B, C], which are 0 or 1, over `RESAMPLES` draws of whole bundles with replacement.

    `stream` names the sequence of random numbers, which is the same at every call.
    """
    generator = np.random.default_rng([SEED, stream])
    sums = np.zeros((RESAMPLES, columns.shape[1]))
    size = len(columns)
    members = columns.astype(np.float32)  # exact: counts stay far below 2 ** 24
    chunk = max(1, _AT_ONCE // size)
    for start in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - start)
        drawn = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        sums[start : start + rows] = times_drawn.astype(np.float32) @ members
    return Resampled(columns, columns.sum(axis=0, keepdims=True, dtype=np.float64), sums)


@dataclass(frozen=True, eq=False)
class Statistic(ABC):
    """A number made of rates: columns `counts` [L] over columns `present` [L] of one `source`."""

    source: Resampled
    counts: NDArray[np.intp]
    present: NDArray[np.intp]

    def rates(self, sums: Floats) -> Floats:
        """[K, L] rates from sums [K, C], as fractions; NaN where nothing is present."""
        n = sums[:, self.present]
        return np.where(n > 0, sums[:, self.counts] / np.where(n > 0, n, 1), np.nan)

    def of(self, sums: Floats) -> Floats:
        """[K] values from sums [K, C], over the rates that are there; NaN if none is."""
        rates = self.rates(sums)
        values = np.full(len(rates), np.nan)
        some = np.isfinite(rates).any(axis=1)
        values[some] = self._of_rates(rates[some])
        return values

    @property
    def value(self) -> float:
        """The value over all bundles."""
        return float(self.of(self.source.total)[0])

    def wilson(self) -> tuple[Floats, Floats, Floats]:
        """The rates [L] that are there, and Wilson's limits of each."""
        total = self.source.total[0]
        pairs = [(c, n) for c, n in zip(total[self.counts].tolist(), total[self.present].tolist(), strict=True) if n]
        limits = np.array([wilson(count, n) for count, n in pairs])
        return np.array([count / n for count, n in pairs]), limits[:, 0], limits[:, 1]

    @abstractmethod
    def _of_rates(self, rates: Floats) -> Floats:
        """[K] values from rates [K, L], of which no row is all NaN."""

    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """Limits where resamples do not vary: from Wilson's, rather wide."""


class MeanRate(Statistic):
    """The mean of the rates."""

    def _of_rates(self, rates: Floats) -> Floats:
        found: Floats = np.nanmean(rates, axis=1)
        return found

    def limits(self) -> tuple[float, float]:
        """The mean of Wilson's limits: as if the rates' errors were perfectly correlated."""
        _, low, high = self.wilson()
        return float(low.mean()), float(high.mean())


class RateVariance(Statistic):
    """The population variance of the rates."""

    def _of_rates(self, rates: Floats) -> Floats:
        found: Floats = np.nanvar(rates, axis=1)
        return found

    def limits(self) -> tuple[float, float]:
        """The standard deviation less and plus the most that it moves if each rate stays in Wilson's limits.

        Deviations from the rates have a standard deviation of at most half their range (Popoviciu).
        """
        rates, low, high = self.wilson()
        deviation, most = float(rates.std()), float((high - rates).max() - (low - rates).min()) / 2
        return max(0.0, deviation - most) ** 2, min(0.5, deviation + most) ** 2


@dataclass(frozen=True, eq=False)
class ExtremeRate(Statistic):
    """The lowest of the rates, or the highest."""

    highest: bool = False

    def _of_rates(self, rates: Floats) -> Floats:
        found: Floats = np.nanmax(rates, axis=1) if self.highest else np.nanmin(rates, axis=1)
        return found

    def limits(self) -> tuple[float, float]:
        """The same of Wilson's limits."""
        _, low, high = self.wilson()
        return (float(low.max()), float(high.max())) if self.highest else (float(low.min()), float(high.min()))


Term: TypeAlias = tuple[float, Statistic]
"""A statistic and its weight in a sum."""


def interval(*terms: Term) -> tuple[float, float, float]:
    """95 % interval of a weighted sum of statistics.

    A single rate takes Wilson's interval. A sum of means: the bootstrap's bias-corrected and accelerated limits (BCa;
    Efron, JASA 1987, with the acceleration of several samples: Davison and Hinkley 1997, chapter 5), the quantiles
    Phi(b + (b ± z) / (1 - a (b ± z))) of the resamples, where Phi(b) is the share of them below the value and a the
    jackknife's sum of cubes / (6 (sum of squares)^1.5). With a variance or an extreme, which sampling moves one way:
    the basic limits 2 value - quantile (Davison and Hinkley, chapter 5), which take that bias out. Where the resamples
    do not vary (one bundle, or all alike) they say nothing: there the limits are those of the statistics, combined by
    square-and-add (Newcombe, Statistics in Medicine 1998).

    Returns:
        Value, low and high.
    """
    value = float(sum(weight * term.value for weight, term in terms))
    (weight, first) = terms[0]
    if len(terms) == 1 and weight == 1 and len(first.counts) == 1 and isinstance(first, MeanRate | ExtremeRate):
        return value, *first.limits()
    resampled = sum((weight * term.of(term.source.resampled) for weight, term in terms), np.zeros(RESAMPLES))
    resampled = resampled[np.isfinite(resampled)]  # a resample may lack the only bundles with a language
    if not len(resampled) or np.ptp(resampled) < _SAME:
        return value, *_square_and_add(value, terms)
    if all(isinstance(term, MeanRate) for _, term in terms):
        at = _bca_levels(value, resampled, _acceleration(terms))
        low, high = np.quantile(resampled, at)
        return value, float(low), float(high)
    level = _NORMAL.cdf(-_Z)
    low, high = 2 * value - np.quantile(resampled, [1 - level, level])
    return value, float(low), float(high)


def _square_and_add(value: float, terms: Sequence[Term]) -> tuple[float, float]:
    below = above = 0.0
    for weight, term in terms:
        centre, (low, high) = term.value, term.limits()
        down, up = weight * (centre - low), weight * (high - centre)
        if weight < 0:
            down, up = -up, -down
        below, above = below + down**2, above + up**2
    return value - math.sqrt(below), value + math.sqrt(above)


def _bca_levels(value: float, resampled: Floats, acceleration: float) -> list[float]:
    size = len(resampled)
    # Values are discrete: half of those that equal the estimate count as below it.
    below = ((resampled < value - _SAME).sum() + (resampled <= value + _SAME).sum()) / (2 * size)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / size), 1 - 0.5 / size))
    # |acceleration| <= 1/6 and |bias| + z < 6, so the denominator stays positive.
    shifted = [bias + z for z in (-_Z, _Z)]
    return [_NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in shifted]


def _acceleration(terms: Sequence[Term]) -> float:
    """From the jackknife: how the standard error grows with the value. Each source is a stratum of its own."""
    cubes = squares = 0.0
    for source in {id(term.source): term.source for _, term in terms}.values():
        left_out = source.left_out
        values = np.zeros(len(left_out))
        for weight, term in terms:
            values = values + weight * (term.of(left_out) if term.source is source else term.value)
        values = np.where(np.isfinite(values), values, np.nanmean(values) if np.isfinite(values).any() else 0.0)
        influence = (len(values) - 1) / len(values) * (values.mean() - values)
        cubes, squares = cubes + (influence**3).sum(), squares + (influence**2).sum()
    return float(cubes / (6 * squares**1.5)) if squares > 0 else 0.0


def sign_flip_p(contributions: Floats, stream: int = 0) -> float:
    """Sign-flip (permutation) test of a sum, two-sided: the share of sign patterns s with |sum s_b c_b| >= |sum c_b|.

    Exact, over all patterns, with at most `EXACT_BUNDLES` contributions that are not 0; else over `FLIPS` random ones,
    the observed one counted among them, so that p is never 0 (Davison and Hinkley 1997, chapter 4).

    Args:
        contributions: [B], whose signs are exchangeable if nothing changed.
        stream: Names the sequence of random numbers.

    Returns:
        The p-value; 1 if nothing differs.
    """
    sizes = np.abs(contributions)
    if not len(contributions) or sizes.max() < _SAME:
        return 1.0
    units = np.round(contributions / sizes.max(), 12)
    units = units[units != 0]
    bound = abs(units.sum()) - _SAME * len(units)
    if len(units) <= EXACT_BUNDLES:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(units))))
        return float((np.abs(signs @ units) >= bound).mean())
    # Bundles that differ by the same amount are flipped together: how many of them are positive is binomial.
    amounts, members = np.unique(np.abs(units), return_counts=True)
    generator = np.random.default_rng([SEED, stream])
    reached, chunk = 0, max(1, _AT_ONCE // len(amounts))
    for start in range(0, FLIPS, chunk):
        positive = generator.binomial(members, 0.5, (min(chunk, FLIPS - start), len(amounts)))
        reached += int((np.abs((2 * positive - members) @ amounts) >= bound).sum())
    return (reached + 1) / (FLIPS + 1)


def swapped_changes(before: Statistic, after: Statistic, stream: int = 0) -> Floats:
    """[SWAPS] changes after - before with the two models exchanged in random bundles, as if they were alike.

    Args:
        before: One model's statistic; its counts are columns of the source of `after`, over the same `present`.
        after: The other's.
        stream: Names the sequence of random numbers.
    """
    columns = after.source.columns
    moved = columns[:, after.counts] - columns[:, before.counts]
    moved = moved[moved.any(axis=1)].astype(np.float32)
    generator = np.random.default_rng([SEED, stream])
    swapped = generator.integers(0, 2, (SWAPS, len(moved))).astype(np.float32) @ moved
    sums = np.repeat(after.source.total, SWAPS, axis=0)
    sums[:, before.counts] += swapped
    sums[:, after.counts] -= swapped
    return after.of(sums) - before.of(sums)


def swap_p(change: float, swapped: Floats) -> float:
    """Two-sided p-value of a change: the share of `swapped` changes as large, the observed one counted among them."""
    return float(((np.abs(swapped) >= abs(change) - _SAME).sum() + 1) / (len(swapped) + 1))


def mcnemar_p(gained: int, lost: int) -> float:
    """McNemar's test (Psychometrika 1947), exact and two-sided: are the changes a fair coin's?

    min(1, 2 P(X <= min(gained, lost))) with X binomial(gained + lost, 1/2); 1 without changes.
    """
    n = gained + lost
    tail = term = 1
    for k in range(min(gained, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    return float(min(1.0, 2 * tail / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (Scandinavian Journal of Statistics 1979) of m tests: max over i <= k of (m - i + 1) p_(i).

    The p-values, in the order given, may then be compared with one level though there are several tests.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected

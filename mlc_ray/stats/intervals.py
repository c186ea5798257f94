"""95 % intervals and p-values for verdicts that come in bundles. Pure numpy; docs/metrics.md says what and why.

The languages of a bundle are one prompt asked several times, so the bundle is the unit: resampling draws whole bundles,
each kind and benchmark for itself. Rates of a single language have one response per bundle and take Wilson's interval.

Shapes: B bundles, C columns (counts per measure and language), R resamples, K any number of sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
SEED = 20_260
EXACT_BUNDLES = 14
"""Up to this many bundles that differ, a sign-flip test goes through every one of the 2 ** n flips."""
FLIPS = 20_000
"""Random flips of a sign-flip test with more bundles."""

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
    """Named layers [B, L] of 0 and 1 over the bundles and `languages` of one kind.

    `strata` [B] numbers the benchmark of each bundle; `stream` names the random numbers that its resampling draws:
    kinds, which are drawn independently, must not share one.
    """

    languages: tuple[str, ...]
    layers: Mapping[str, Floats]
    strata: NDArray[np.intp]
    stream: int = 0

    @cached_property
    def resampled(self) -> Resampled:
        """Sums over the bundles, one column per layer and language; made once."""
        return resample(np.hstack(list(self.layers.values())), self.strata, self.stream)

    def mean(self, counts: str, present: str, languages: Iterable[str] | None = None) -> LanguageMean:
        """The mean over `languages` (default: all) of layer `counts` over layer `present`."""
        names, width = list(self.layers), len(self.languages)
        chosen = np.array([self.languages.index(code) for code in languages or self.languages])
        return LanguageMean(self.resampled, names.index(counts) * width + chosen, names.index(present) * width + chosen)


def make_grid(cells: Iterable[tuple[str, str, str, Sequence[str]]], layers: Sequence[str], stream: int = 0) -> Grid:
    """A grid from (benchmark, bundle, language, layers that are 1 there); bundles and languages as they come."""
    found = list(cells)
    bundles = {key: index for index, key in enumerate(dict.fromkeys((cell[0], cell[1]) for cell in found))}
    columns = {code: index for index, code in enumerate(dict.fromkeys(cell[2] for cell in found))}
    benchmarks = {name: index for index, name in enumerate(dict.fromkeys(name for name, _ in bundles))}
    filled = {name: np.zeros((len(bundles), len(columns))) for name in layers}
    for benchmark, bundle, language, marked in found:
        for name in marked:
            filled[name][bundles[benchmark, bundle], columns[language]] = 1
    strata = np.array([benchmarks[name] for name, _ in bundles], dtype=np.intp)
    return Grid(tuple(columns), filled, strata, stream)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Column sums over the bundles of one kind: all of them [1, C], resampled [R, C], and each left out once [B, C].

    `strata` [B] numbers the benchmark of each bundle.
    """

    total: Floats
    resampled: Floats
    left_out: Floats
    strata: NDArray[np.intp]


def resample(columns: Floats, strata: NDArray[np.intp], stream: int) -> Resampled:
    """Sums of `columns` [B, C] over `RESAMPLES` draws of whole bundles, within each stratum, with replacement.

    `stream` names the sequence of random numbers, which is the same at every call.
    """
    generator = np.random.default_rng([SEED, stream])
    sums = np.zeros((RESAMPLES, columns.shape[1]))
    for stratum in np.unique(strata):
        members = columns[strata == stratum]
        size = len(members)
        chunk = max(1, _AT_ONCE // size)
        for start in range(0, RESAMPLES, chunk):
            rows = min(chunk, RESAMPLES - start)
            drawn = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
            times_drawn = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
            sums[start : start + rows] += times_drawn.astype(np.float64) @ members
    total = columns.sum(axis=0, keepdims=True)
    return Resampled(total, sums, total - columns, strata)


@dataclass(frozen=True, eq=False)
class LanguageMean:
    """(1 / L) sum over languages of counts / present: columns `counts` [L] and `present` [L] of one `source`."""

    source: Resampled
    counts: NDArray[np.intp]
    present: NDArray[np.intp]

    def of(self, sums: Floats) -> Floats:
        """[K] values, as fractions, from sums [K, C]; over the languages that are there, NaN if none is."""
        n = sums[:, self.present]
        there = n > 0
        rates = np.where(there, sums[:, self.counts] / np.where(there, n, 1), 0.0)
        languages = there.sum(axis=1)
        return np.where(languages > 0, rates.sum(axis=1) / np.maximum(languages, 1), np.nan)

    def wilson_limits(self) -> tuple[float, float]:
        """The mean over languages of Wilson's limits: as if their errors were perfectly correlated, so rather wide."""
        total = self.source.total[0]
        counts, present = total[self.counts].tolist(), total[self.present].tolist()
        limits = [wilson(count, n) for count, n in zip(counts, present, strict=True) if n > 0]
        return sum(low for low, _ in limits) / len(limits), sum(high for _, high in limits) / len(limits)


def interval(*terms: tuple[int, LanguageMean]) -> tuple[float, float, float]:
    """95 % interval of a sum of means over languages.

    One mean over one language takes Wilson's interval. Anything else: the bootstrap's bias-corrected and accelerated
    limits (BCa; Efron, JASA 1987, with the acceleration of several samples: Davison and Hinkley 1997, chapter 5), the
    quantiles Phi(b + (b ± z) / (1 - a (b ± z))) of the resamples, where Phi(b) is the share of them below the value and
    a the jackknife's sum of cubes / (6 (sum of squares)^1.5). Where the resamples do not vary (one bundle, or all
    alike) they say nothing: there the limits are `wilson_limits` of the means, combined by square-and-add (Newcombe,
    Statistics in Medicine 1998).

    Args:
        terms: The means, each with its sign (1 or -1).

    Returns:
        Value, low and high, as fractions.
    """
    value = float(sum(sign * mean.of(mean.source.total)[0] for sign, mean in terms))
    (_, first) = terms[0]
    if len(terms) == 1 and len(first.counts) == 1:
        return value, *first.wilson_limits()
    resampled = sum((sign * mean.of(mean.source.resampled) for sign, mean in terms), np.zeros(RESAMPLES))
    resampled = resampled[np.isfinite(resampled)]  # a resample may lack the only bundles with a language
    if not len(resampled) or np.ptp(resampled) < _SAME:
        return value, *_square_and_add(value, terms)
    at = _bca_levels(value, resampled, _acceleration(terms))
    low, high = np.quantile(resampled, at)
    return value, float(low), float(high)


def _square_and_add(value: float, terms: Sequence[tuple[int, LanguageMean]]) -> tuple[float, float]:
    below = above = 0.0
    for sign, mean in terms:
        centre, (low, high) = mean.of(mean.source.total)[0], mean.wilson_limits()
        down, up = (centre - low, high - centre) if sign > 0 else (high - centre, centre - low)
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


def _acceleration(terms: Sequence[tuple[int, LanguageMean]]) -> float:
    """From the jackknife: how the standard error grows with the value."""
    cubes = squares = 0.0
    for source in {id(mean.source): mean.source for _, mean in terms}.values():
        size = len(source.left_out)
        values = np.zeros(size)
        for sign, mean in terms:
            sums = source.left_out if mean.source is source else mean.source.total
            values = values + sign * mean.of(sums)
        values = np.where(np.isfinite(values), values, np.nanmean(values) if np.isfinite(values).any() else 0.0)
        for stratum in np.unique(source.strata):
            mine = values[source.strata == stratum]
            influence = (len(mine) - 1) / len(mine) * (mine.mean() - mine)
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

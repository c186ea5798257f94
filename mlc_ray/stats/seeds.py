"""The mean over several seeds, with an interval: bundles' part and seeds'. Pure; `stats.study` says what and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mlc_ray.stats.intervals import SAME, Resampled, Term, interval
from mlc_ray.stats.rates import Interval


def student_quantile(freedom: int, level: float = 0.975) -> float:
    """The quantile of Student's t with `freedom` degrees, by bisection of its distribution function.

    For whole degrees that is a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while student_share(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, freedom) < level else (low, middle)
    return high


def student_share(t: float, freedom: int) -> float:
    """The share of Student's t with `freedom` degrees that is below `t`, which is at least 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):  # the terms up to cos^(freedom - 2)
        total += term
        term *= (k - 1) / k * cosine**2
    inside = (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2


def over_seeds(values: Sequence[float], bundles: tuple[float, float, float]) -> tuple[float, float, float]:
    """A mean over seeds with both parts of its interval.

    Args:
        values: Of each seed.
        bundles: Their mean, and the limits of the part of bundles.

    Returns:
        Value, low and high.
    """
    value, low, high = bundles
    half = 0.0
    if len(values) > 1:
        spread = float(np.std(values, ddof=1))
        half = student_quantile(len(values) - 1) * spread / math.sqrt(len(values)) if spread > 1e-12 else 0.0
    return value, value - math.hypot(value - low, half), value + math.hypot(high - value, half)


def interval_over_seeds(by_seed: Sequence[Sequence[Term]], unit: float, least: float, most: float) -> Interval:
    """The mean over seeds of sums of statistics, in another unit, within what it can be."""
    values = [sum(weight * term.value for weight, term in terms) for terms in by_seed]
    joint = [(weight / len(by_seed), term) for terms in by_seed for weight, term in terms]
    bundles = interval(*joint)
    if any(_alike([each for each in joint if each[1].source is source]) for _, source in _sources(joint)):
        # Resamples say nothing, and limits take over: of the same bundles, so that those of the seeds are averaged.
        own = np.mean([interval(*terms) for terms in by_seed], axis=0)
        bundles = (bundles[0], min(bundles[1], float(own[1])), max(bundles[2], float(own[2])))
    found = (unit * number for number in over_seeds(values, bundles))
    value, low, high = found
    return Interval(value, max(least, low), min(most, high))


def _sources(terms: Sequence[Term]) -> list[tuple[int, Resampled]]:
    return list({id(term.source): term.source for _, term in terms}.items())


def _alike(terms: Sequence[Term]) -> bool:
    """Whether the terms' sum does not vary over the resamples of their one source."""
    drawn = sum((weight * term.of(term.source.resampled) for weight, term in terms), np.zeros(1))
    finite = drawn[np.isfinite(drawn)]
    return not len(finite) or float(np.ptp(finite)) < SAME

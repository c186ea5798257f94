"""The interval of a lowest rate, which sampling makes lower than it truly is: the more so, the more rates are alike.

Resampling repeats that bias, and a correction by it falls short, since rates that were found are further apart than
true ones. So the limits are those of tests of the rates themselves (shapes as in `stats.intervals`).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mlc_ray.stats.intervals import SAME, LowestRate, Z

_NORMAL = NormalDist()
_TAIL = 0.025


def lowest_interval(*found: LowestRate) -> tuple[float, float, float]:
    """95 % interval of the mean of lowest rates of different benchmarks.

    All rates lie above a number if each does by a test of its own (an intersection-union test: Berger, Technometrics
    1982): so the lower limit is the lowest of Wilson's lower limits. Some rate lies below it if one does by a test that
    counts them all: so the upper limit is the lowest of Wilson's upper limits, of half a response more (a continuity
    correction), at a z that holds for all rates at once, the quantile of the largest of their deviations over resamples
    of whole bundles (max-t: Romano and Wolf, JASA 2005). Rates whose own lower limit is above that cannot be the lowest
    and are left out of a second such count.

    Distances of several benchmarks are combined by square-and-add (Newcombe, Statistics in Medicine 1998), but not
    upper ones of benchmarks in which several rates may be the lowest: what was found is too low in every one of them,
    which does not cancel. Of these the upper limit is the mean of their upper limits (`benchmarks/coverage.py` has how
    often that holds).

    Args:
        found: One of each benchmark, at least one.

    Returns:
        Value, low and high, as fractions.
    """
    value = sum(each.value for each in found) / len(found)
    ends = [(each.value, *_limits(each)) for each in found]
    below = math.hypot(*(rate - low for rate, low, _, _ in ends))
    above = math.hypot(*(high - rate for rate, _, high, sure in ends if sure))
    above += sum(high - rate for rate, _, high, sure in ends if not sure)
    return value, value - below / len(found), value + above / len(found)


def _limits(statistic: LowestRate) -> tuple[float, float, bool]:
    """Low, high, and whether it is sure which of the rates is the lowest."""
    rates, low, high = statistic.wilson()
    if len(rates) == 1:
        return float(low[0]), float(high[0]), True
    there = np.isfinite(statistic.rates(statistic.source.total)[0])
    away = rates - statistic.rates(statistic.source.resampled)[:, there]
    highest = _at_once(statistic, away, np.full(len(rates), True))
    near = low <= highest
    return float(low.min()), _at_once(statistic, away, near), bool(near.sum() == 1)


def _at_once(statistic: LowestRate, away: NDArray[np.float64], chosen: NDArray[np.bool_]) -> float:
    """The lowest of the upper limits that hold for all `chosen` rates at once.

    `away` [R, L] is by how much resampled rates are lower than what was found. Where one of them does not vary, they
    say nothing of it, and z is Bonferroni's.
    """
    z = _NORMAL.inv_cdf(1 - _TAIL / chosen.sum())
    spread = np.nanstd(away[:, chosen], axis=0)
    if (spread > SAME).all():
        largest = np.fmax.reduce(away[:, chosen] / spread, axis=1)
        z = min(z, max(Z, float(np.nanquantile(largest, 1 - _TAIL))))
    return float(statistic.wilson(z, more=0.5)[2][chosen].min())

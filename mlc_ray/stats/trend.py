"""Whether a number moves with the size of models: a line over log10 of parameters, and how sure its slope is.

Ordinary least squares of one number a size, with a level for each family. The variance of the slope is the larger of
two: that of the residuals, s² / Sxx with n - 1 - families degrees of freedom, and what the numbers' own intervals make
of it, the sum of (weight x standard error)². The second keeps three points that happen to lie on a line from being
taken for a law. The interval is slope ± t x standard error with Student's t of these degrees. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlc_ray.stats.intervals import Z
from mlc_ray.stats.rates import Interval
from mlc_ray.stats.seeds import student_quantile, student_share

LEVEL = 0.05
Direction = Literal["rises", "falls", "cannot tell"]


@dataclass(frozen=True)
class Trend:
    """Of one number: its change for ten times the parameters; None where there are too few sizes for an interval, or
    neither the numbers' own intervals nor their distance from the line have any width.

    `freedom` are the degrees of freedom; `p` is two-sided, `p_holm` after Holm's correction over all trends of a study.
    """

    name: str
    slope: Interval | None
    p: float
    sizes: int
    freedom: int
    p_holm: float = 1.0

    @property
    def direction(self) -> Direction:
        """What the corrected test says."""
        if self.slope is None or self.p_holm > LEVEL:
            return "cannot tell"
        return "rises" if self.slope.value > 0 else "falls"


def trend(
    name: str, parameters: Sequence[float], values: Sequence[Interval], families: Sequence[str] | None = None
) -> Trend:
    """The line through one number of each size.

    Args:
        name: What the number is.
        parameters: Of each size.
        values: The number with its 95 % interval, of each size.
        families: Of each size; None: all are one.
    """
    groups = ["" for _ in parameters] if families is None else list(families)
    levels = np.array([[float(group == each) for each in dict.fromkeys(groups)] for group in groups])
    x = np.log10(np.array(parameters, dtype=float))
    freedom = len(x) - 1 - (levels.shape[1] if len(x) else 0)
    if freedom < 1:
        return Trend(name, None, 1.0, len(x), max(0, freedom))
    centred = x - levels @ (levels.T @ x / levels.sum(axis=0))
    spread = float(centred @ centred)
    if spread < 1e-12:  # no family has two sizes
        return Trend(name, None, 1.0, len(x), freedom)
    weights = centred / spread
    y = np.array([each.value for each in values])
    slope = float(weights @ y)
    slope = 0.0 if abs(slope) < 1e-12 else slope  # what rounding leaves of equal numbers
    away = y - levels @ (levels.T @ y / levels.sum(axis=0)) - slope * centred
    errors = np.array([(each.high - each.low) / (2 * Z) for each in values])
    variance = max(float(away @ away) / freedom / spread, float(((weights * errors) ** 2).sum()))
    error = math.sqrt(variance)
    if error < 1e-12:  # nothing says how sure any of it is: a line by luck is no law
        return Trend(name, None if slope else Interval(0.0, 0.0, 0.0), 1.0, len(x), freedom)
    half = student_quantile(freedom) * error
    p = 2 * (1 - student_share(abs(slope) / error, freedom))
    return Trend(name, Interval(slope, slope - half, slope + half), min(1.0, max(0.0, p)), len(x), freedom)

"""A line over sizes: by hand, against numpy's least squares, and how often its interval holds the true slope."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlc_ray.stats.rates import Interval
from mlc_ray.stats.trend import trend

Z = 1.959964


def value(number: float, error: float = 0.0) -> Interval:
    return Interval(number, number - Z * error, number + Z * error)


def test_a_slope_is_that_of_least_squares_with_students_interval() -> None:
    sizes, numbers = [1e8, 1e9, 1e10, 1e11], [0.5, 0.62, 0.69, 0.85]
    found = trend("x", sizes, [value(number) for number in numbers])
    x, y = np.log10(sizes), np.array(numbers)
    design = np.stack([np.ones(4), x], axis=1)
    wanted, residuals, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(residuals[0] / 2 * np.linalg.inv(design.T @ design)[1, 1])
    assert found.slope is not None
    assert found.slope.value == pytest.approx(wanted[1])
    assert found.slope.high - found.slope.value == pytest.approx(4.302653 * error)  # t with two degrees
    # for two degrees, the share above t is (1 - t / sqrt(2 + t²)) / 2
    t = wanted[1] / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (found.sizes, found.freedom) == (4, 2)


def test_points_on_a_line_by_luck_are_as_sure_as_their_own_intervals_allow() -> None:
    sizes = [1e8, 1e9, 1e10]
    exact = trend("x", sizes, [value(number, 0.1) for number in (0.1, 0.2, 0.3)])
    assert exact.slope is not None and exact.slope.value == pytest.approx(0.1)
    error = 0.1 * math.sqrt(2) / 2  # weights -1/2, 0, 1/2
    assert exact.slope.high - 0.1 == pytest.approx(12.7062 * error, rel=1e-4)
    assert exact.direction == "cannot tell"


def test_points_on_a_line_whose_intervals_have_no_width_cannot_tell() -> None:
    """As best layers on a grid may be: 0.4, 0.55 and 0.7 in every resample."""
    found = trend("x", [1e8, 1e9, 1e10], [Interval(y, y, y) for y in (0.4, 0.55, 0.7)])
    assert found.slope is None and found.p == 1 and found.direction == "cannot tell"


def test_two_sizes_or_a_family_for_each_cannot_tell() -> None:
    two = trend("x", [1e8, 1e9], [value(0.1), value(0.9)])
    assert two.slope is None and two.p == 1 and two.direction == "cannot tell"
    alone = trend("x", [1e8, 1e9, 1e10, 1e11], [value(n) for n in (1, 2, 3, 4)], ["a", "b", "c", "d"])
    assert alone.slope is None and alone.freedom == 0


def test_a_trend_is_within_families() -> None:
    """Either family rises by 0.1; the larger models' family is lower, so that all together would fall."""
    sizes = [1e8, 1e9, 1e10, 1e10, 1e11, 1e12]
    numbers = [0.5, 0.6, 0.7, 0.1, 0.2, 0.3]
    within = trend("x", sizes, [value(n, 0.001) for n in numbers], ["a"] * 3 + ["b"] * 3)
    together = trend("x", sizes, [value(n, 0.001) for n in numbers])
    assert within.slope is not None and within.slope.value == pytest.approx(0.1) and within.direction == "cannot tell"
    assert within.p < 1e-6  # before Holm's correction, which the caller makes
    assert together.slope is not None and together.slope.value < 0


def test_the_interval_holds_the_true_slope() -> None:
    """Of 2,000 draws with noise as large as the stated errors, in 95 % or more, by the larger variance."""
    chance = np.random.default_rng(0)
    sizes = [10**k for k in (8, 8.5, 9, 9.7, 10, 10.8)]
    held = 0
    for _ in range(2000):
        numbers = [0.3 + 0.05 * math.log10(size) + 0.1 * chance.standard_normal() for size in sizes]
        slope = trend("x", sizes, [value(number, 0.1) for number in numbers]).slope
        assert slope is not None
        held += slope.low <= 0.05 <= slope.high
    assert held >= 0.94 * 2000


def test_equal_numbers_do_not_move() -> None:
    found = trend("x", [1e8, 1e9, 1e10], [value(1.0)] * 3)
    assert found.slope == Interval(0, 0, 0) and found.p == 1 and found.direction == "cannot tell"

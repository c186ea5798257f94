"""The interval of the lowest of several rates."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from mlc_ray.stats.intervals import LowestRate, wilson
from mlc_ray.stats.lowest import lowest_interval
from tests.stats.test_intervals import UNEVEN, as_text, grid_of


def lowest(bundles: list[str], stream: int = 0) -> LowestRate:
    return grid_of(bundles, stream).lowest("hit", "present")


@pytest.mark.parametrize(
    ("rates", "most_over"),
    [([0.7] * 10, 0), ([0.5, 0.6, 0.7, 0.8, 0.9] * 2, 3), ([0.3, *[0.9] * 9], 5)],
    ids=["alike", "spread", "one is worst"],
)
def test_it_holds_the_truth_whether_rates_are_alike_or_not(rates: list[float], most_over: int) -> None:
    """Where all are alike the lowest found is far below them, and basic limits held the truth in 87 %."""
    generator, values, under, over = np.random.default_rng(8), [], 0, 0
    for _ in range(60):
        hits = generator.random((40, len(rates))) < rates
        value, low, high = lowest_interval(lowest(as_text(hits)))
        values.append(value)
        under += high < min(rates)
        over += low > min(rates)
    assert sum(values) / 60 < min(rates) + 0.005
    assert under <= 4 and over <= most_over


def test_limits_against_tests_of_each_rate_written_out() -> None:
    bundles = ["0111", "0101", "0111", "0011", "1011", "0111", "0101", "0010", "0011", "0101", "0111", "0011"]
    found = lowest(bundles)
    hits = [sum(row[column] == "1" for row in bundles) for column in range(4)]
    rates = [count / 12 for count in hits]
    resampled = found.rates(found.source.resampled)

    def upper(columns: list[int]) -> float:
        away = [(rates[column] - resampled[:, column]) / resampled[:, column].std() for column in columns]
        z = min(float(np.quantile(np.max(away, axis=0), 0.975)), NormalDist().inv_cdf(1 - 0.025 / len(columns)))
        return min(wilson(hits[column] + 0.5, 12, max(1.959964, z))[1] for column in columns)

    own = [wilson(count, 12)[0] for count in hits]
    near = [column for column in range(4) if own[column] <= upper([0, 1, 2, 3])]
    assert near == [0, 1, 2, 3][: len(near)] and 0 < len(near) < 4  # so one is left out
    assert lowest_interval(found) == pytest.approx((min(rates), min(own), upper(near)))


def test_one_rate_takes_wilsons_interval_and_none_is_a_point() -> None:
    assert lowest_interval(grid_of(UNEVEN).lowest("hit", "present", ["l1"])) == (6 / 8, *wilson(6, 8))
    for bundles in (["111"] * 20, ["110"] * 20, ["10"], ["1.", "0.", "11"]):
        value, low, high = lowest_interval(lowest(bundles))
        assert 0 <= low <= value <= high <= 1 and high - low > 0.05


def clear(shift: int) -> LowestRate:
    """A benchmark of 40 bundles in which one of three languages is far below the others."""
    return lowest([f"1{int(bundle % 4 == 0)}{int(bundle % 10 != shift)}" for bundle in range(40)], stream=shift)


def test_distances_of_benchmarks_are_squared_and_added_where_one_rate_is_surely_the_lowest() -> None:
    one, other = clear(1), grid_of(UNEVEN).lowest("hit", "present", ["l1"])
    (first, low, high), (second, below, above) = lowest_interval(one), lowest_interval(other)
    value, least, most = lowest_interval(one, other)
    assert value == pytest.approx((first + second) / 2)
    assert value - least == pytest.approx(math.hypot(first - low, second - below) / 2)
    assert most - value == pytest.approx(math.hypot(high - first, above - second) / 2)


def test_upper_limits_of_benchmarks_are_averaged_where_several_rates_may_be_the_lowest() -> None:
    one, other, sure = lowest(UNEVEN), lowest(["110", "011", "111", "010"] * 5, stream=1), clear(2)
    ends = [lowest_interval(each) for each in (one, other, sure)]
    value, least, most = lowest_interval(one, other, sure)
    assert value - least == pytest.approx(math.hypot(*(rate - low for rate, low, _ in ends)) / 3)
    assert most == pytest.approx(sum(high for *_, high in ends) / 3)


def test_several_benchmarks_of_rates_that_are_alike_hold_the_truth() -> None:
    """The lowest rate found is too low in each of them alike: squared and added, the upper limits held it in 1 %."""
    generator, held = np.random.default_rng(8), 0
    for _ in range(30):
        hits = generator.random((4, 40, 10)) < 0.95
        _, low, high = lowest_interval(*(lowest(as_text(each), stream) for stream, each in enumerate(hits)))
        held += low <= 0.95 <= high
    assert held >= 28

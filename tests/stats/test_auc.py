"""The interval of an AUC: it solves its equation, is never one point, and holds the truth as often as it says."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from mlc_ray.stats.auc import auc_interval


def standard_error(auc: float, above: int, below: int) -> float:
    """Hanley and McNeil's, with both samples as large as their mean where sizes are multiplied by Q1 and Q2."""
    of_two, of_pairs = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    each = (above + below) / 2 - 1
    spread = auc * (1 - auc) + each * (of_two - auc**2) + each * (of_pairs - auc**2)
    return math.sqrt(spread / (above * below))


@pytest.mark.parametrize(("auc", "above", "below"), [(0.5, 8, 8), (0.8, 12, 30), (0.97, 30, 30), (0.1, 40, 9)])
def test_the_limits_are_as_many_standard_errors_away_as_a_normal_quantile(auc: float, above: int, below: int) -> None:
    found = auc_interval(auc, above, below)
    assert found.low < found.value == auc < found.high
    for limit in (found.low, found.high):
        distance = abs(limit - auc) / standard_error(limit, above, below)
        assert distance == pytest.approx(NormalDist().inv_cdf(0.975), rel=1e-6)


def test_kinds_that_are_wholly_told_apart_leave_doubt() -> None:
    few, many = auc_interval(1.0, 8, 8), auc_interval(1.0, 80, 80)
    assert few.high == many.high == 1.0 and few.low < many.low < 1.0
    none = auc_interval(0.0, 8, 8)
    assert (none.low, none.high) == (0.0, pytest.approx(1 - few.low))


@pytest.mark.parametrize(("number", "auc"), [(8, 0.9), (8, 0.97), (30, 0.5), (30, 0.97)])
def test_it_holds_the_truth_in_95_of_100_samples(number: int, auc: float) -> None:
    draw, samples = np.random.default_rng(1), 400
    shift = NormalDist().inv_cdf(auc) * math.sqrt(2)
    held = 0
    for _ in range(samples):
        won = draw.normal(shift, 1, (number, 1)) > draw.normal(0, 1, number)
        found = auc_interval(float(won.mean()), number, number)
        held += found.low <= auc <= found.high
    assert 0.925 <= held / samples <= 0.99

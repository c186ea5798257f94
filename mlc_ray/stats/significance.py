"""p-values of changes between two models on the same bundles, and their correction for number. Pure numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mlc_ray.stats.intervals import AT_ONCE, SAME, SEED, Floats, Statistic

EXACT_BUNDLES = 14
"""Up to this many bundles that differ, a sign-flip test goes through every one of the 2 ** n flips."""
FEW_FLIPS, FLIPS = 20_000, 200_000
"""Random flips of a sign-flip test with more bundles; and in all, where these leave p below `SMALL`: only a small p has
to stand a correction for thousands of tests."""
SMALL = 0.01
SWAPS = 2_000
"""Random exchanges of two models in whole bundles, to test a change that is no sum over bundles."""


def largest_p(contributions: Sequence[Floats]) -> float:
    """The largest of the sign-flip tests of several sums; drawn finely only where all of them are small."""
    few = max(sign_flip_p(each, most=FEW_FLIPS) for each in contributions)
    return few if few >= SMALL else max(map(sign_flip_p, contributions))


def sign_flip_p(contributions: Floats, stream: int = 0, *, most: int = FLIPS) -> float:
    """Sign-flip (permutation) test of a sum, two-sided: the share of sign patterns s with |sum s_b c_b| >= |sum c_b|.

    Exact, over all patterns, with at most `EXACT_BUNDLES` contributions that are not 0; else over `FEW_FLIPS` random
    ones, and over `FLIPS` where p is below `SMALL` by these, the observed one counted among them, so that p is never 0
    (Davison and Hinkley 1997, chapter 4).

    Args:
        contributions: [B], whose signs are exchangeable if nothing changed.
        stream: Names the sequence of random numbers.
        most: Random flips, where `FEW_FLIPS` leave p below `SMALL`.

    Returns:
        The p-value; 1 if nothing differs.
    """
    sizes = np.abs(contributions)
    if not len(contributions) or sizes.max() < SAME:
        return 1.0
    units = np.round(contributions / sizes.max(), 12)
    units = units[units != 0]
    bound = abs(units.sum()) - SAME * len(units)
    if len(units) <= EXACT_BUNDLES:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(units))))
        return float((np.abs(signs @ units) >= bound).mean())
    # Bundles that differ by the same amount are flipped together: how many of them are positive is binomial.
    amounts, members = np.unique(np.abs(units), return_counts=True)
    generator = np.random.default_rng([SEED, stream])
    reached, done, chunk = 0, 0, max(1, AT_ONCE // len(amounts))
    for goal in (FEW_FLIPS, most):
        while done < goal:
            number = min(chunk, goal - done)
            positive = generator.binomial(members, 0.5, (number, len(amounts)))
            reached += int((np.abs((2 * positive - members) @ amounts) >= bound).sum())
            done += number
        if (reached + 1) / (done + 1) >= SMALL:
            break
    return (reached + 1) / (done + 1)


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
    return float(((np.abs(swapped) >= abs(change) - SAME).sum() + 1) / (len(swapped) + 1))


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

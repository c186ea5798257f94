"""Are two models told apart by what a search maximises? Paired tests, of whole bundles of the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlc_ray.search.objectives.base import Objective, TrialScore
from mlc_ray.search.sides import Table, each_sides, paired_grids
from mlc_ray.stats.intervals import SEED, Floats, Grid
from mlc_ray.stats.paired import compare
from mlc_ray.stats.rates import KINDS, Judged, Outcome
from mlc_ray.stats.significance import SWAPS, swap_p
from mlc_ray.types import Kind, Measure

BySeed = Mapping[int, Sequence[Judged]]
"""The verdicts of a point's models, by the seed of their training."""


def choice_p(objective: Objective, best: TrialScore, others: BySeed, bests: BySeed) -> float:
    """The p-value that tells the best from another by what ranks them: the largest over the seeds that both have.

    That is the objective's `rank` of its numbers: of `pareto` the sum of both sides, so that a trade of one for the
    other alone tells nobody apart. Where even the best is not sure to be above the floor, they rank by the benign side.
    Where no seed is common, the first of each are compared.

    Args:
        objective: What the trials were chosen by.
        best: The score of `bests`, for the languages that count.
        others: The verdicts of each of the other's models, by seed.
        bests: The same of the best's.
    """
    test = _rank_p if best.feasible else _benign_p
    return max(test(objective, best, *pair) for pair in _pairs(others, bests))


def apart_p(objective: Objective, best: TrialScore, others: BySeed, bests: BySeed) -> float:
    """As `choice_p`, but under a floor the benign side may tell them apart too: twice the lesser of both p-values."""
    if objective.floor is None or best.benign is None:
        return choice_p(objective, best, others, bests)
    found = []
    for pair in _pairs(others, bests):
        found.append(min(1.0, 2 * min(_rank_p(objective, best, *pair), _benign_p(objective, best, *pair))))
    return max(found)


def _pairs(others: BySeed, bests: BySeed) -> list[tuple[Sequence[Judged], Sequence[Judged]]]:
    """Another's verdicts and the best's."""
    pairs = [(others[seed], bests[seed]) for seed in bests if seed in others]
    return pairs or [(next(iter(others.values())), next(iter(bests.values())))]


def _benign_p(objective: Objective, best: TrialScore, other: Sequence[Judged], own: Sequence[Judged]) -> float:
    compared = compare(*([r for r in records if r.language in best.benign_by_language] for records in (other, own)))
    benign = compared.benchmark().side("benign")
    assert benign is not None  # the floor is under it
    return benign.p


def _rank_p(objective: Objective, best: TrialScore, other: Sequence[Judged], own: Sequence[Judged]) -> float:
    """The two models are exchanged in random bundles, as if they were alike: how often do ranks differ as much?"""
    harmful = _exchanged(own, other, "harmful", best.measure, "hits", list(best.harmful_by_language))
    benign = None
    if best.benign is not None:
        benign = _exchanged(own, other, "benign", "refused", "misses", list(best.benign_by_language))
    ranks = []
    for which in (0, 1):
        sides = each_sides(best.measure, harmful[which], None if benign is None else benign[which])
        ranks.append(np.array([objective.rank(objective.values(each)) for each in sides]))
    change = ranks[0] - ranks[1]
    return swap_p(change[0], change[1:])


def _exchanged(
    own: Sequence[Judged],
    other: Sequence[Judged],
    kind: Kind,
    measure: Measure,
    counted: Outcome,
    languages: Sequence[str],
) -> tuple[Table, Table]:
    """The rates of both models, [1 + SWAPS] each: as they are, and with the models exchanged in random bundles."""
    tables: tuple[dict[str, dict[str, Floats]], dict[str, dict[str, Floats]]] = {}, {}
    found = paired_grids([own], [other], kind, measure, counted, languages)
    for index, (name, (grid, codes)) in enumerate(found.items()):
        rates = _rates(grid, codes, stream=len(KINDS) * index + KINDS.index(kind))
        for table, each in zip(tables, rates, strict=True):
            table[name] = dict(zip(codes, each.T, strict=True))
    return tables


def _rates(grid: Grid, codes: Sequence[str], *, stream: int) -> list[Floats]:
    """Both models' rates, [1 + SWAPS, L]; the first row is as they are."""
    chosen = [grid.languages.index(code) for code in codes]
    best, other, present = (grid.layers[name][:, chosen] for name in ("best", "other", "present"))
    moved = other - best
    differs = moved[moved.any(axis=1)].astype(np.float32)
    exchanged = np.random.default_rng([SEED, stream]).integers(0, 2, (SWAPS, len(differs))).astype(np.float32)
    change = np.vstack([np.zeros((1, len(codes))), exchanged @ differs])
    n = present.sum(axis=0)
    return [(best.sum(axis=0) + change) / n, (other.sum(axis=0) - change) / n]

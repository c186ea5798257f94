"""Two judges of the same responses: how often they agree, and how much more than by chance. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlc_ray.stats.intervals import Floats, design_effect, make_grid, resample, wilson
from mlc_ray.stats.rates import KINDS, MEASURES, Interval, Judged, language_order, outcome
from mlc_ray.types import Kind, Measure

_OUTCOMES = ("hits", "misses", "unparsed")


@dataclass(frozen=True)
class JudgeAgreement:
    """Two judges on one side by one measure, in one language or (language "") in all.

    Of `n` responses `same` got the same verdict; `first_only` counts those that only the first judge calls a hit
    (refused, or safe), `second_only` those that only the second does. `kappa` is Cohen's (Educational and Psychological
    Measurement 1960): 1 where they always agree, 0 where no more than by chance; None where both gave one and the same
    verdict throughout. Its 95 % interval is of the percentiles of whole bundles drawn again; where these do not vary,
    Wilson's of the agreement, with the bundles as its n. Responses that both call degenerate are left out: a rule
    decides that, not a judge.
    """

    benchmark: str
    kind: Kind
    measure: Measure
    language: str
    n: int
    same: int
    first_only: int
    second_only: int
    kappa: Interval | None


def judge_agreement(first: Sequence[Judged], second: Sequence[Judged]) -> list[JudgeAgreement]:
    """The agreement per benchmark, side and measure that both give, each in all languages and then in each.

    Args:
        first: One judge's verdicts.
        second: The other's, on the same responses; those that only one has are left out.
    """

    def response(r: Judged) -> tuple[str, str, Kind, str, int]:
        return r.benchmark, r.bundle_id, r.kind, r.language, r.sample

    other = {response(record): record for record in second}
    pairs = [(record, other[key]) for record in first if (key := response(record)) in other]
    found = []
    for benchmark in dict.fromkeys(old.benchmark for old, _ in pairs):
        for kind in KINDS:
            for measure in MEASURES:
                mine = [
                    (old, f"{a} {b}")
                    for old, new in pairs
                    if (old.benchmark, old.kind) == (benchmark, kind)
                    and (a := outcome(old, measure)) is not None
                    and (b := outcome(new, measure)) is not None
                    and (a, b) != ("degenerate", "degenerate")
                ]
                languages = sorted({old.language for old, _ in mine}, key=language_order)
                for language in ["", *languages] if mine else []:
                    chosen = [(old, cell) for old, cell in mine if language in ("", old.language)]
                    found.append(_agreement(benchmark, kind, measure, language, chosen))
    return found


def _agreement(
    benchmark: str, kind: Kind, measure: Measure, language: str, cells: Sequence[tuple[Judged, str]]
) -> JudgeAgreement:
    names = (*_OUTCOMES, "degenerate")
    layers = [f"{a} {b}" for a in names for b in names]
    grid = make_grid(((r.bundle_id, r.language, [cell]) for r, cell in cells), layers)
    columns = np.stack([grid.layers[layer].sum(axis=1) for layer in layers], axis=1)  # [B, 16]
    source = resample(columns, 0)
    total = dict(zip(layers, source.total[0].astype(int).tolist(), strict=True))
    n, same = len(cells), sum(total[f"{name} {name}"] for name in names)
    return JudgeAgreement(
        benchmark,
        kind,
        measure,
        language,
        n,
        same,
        first_only=sum(total[f"hits {name}"] for name in names if name != "hits"),
        second_only=sum(total[f"{name} hits"] for name in names if name != "hits"),
        kappa=_kappa_interval(source.total, source.resampled, columns),
    )


def _kappa_interval(total: Floats, resampled: Floats, columns: Floats) -> Interval | None:
    value = float(_kappa(total)[0])
    if not np.isfinite(value):
        return None
    values = _kappa(resampled)
    values = values[np.isfinite(values)]
    if np.ptp(values) > 0:
        low, high = np.quantile(values, [0.025, 0.975])
        return Interval(value, float(low), float(high))
    chance = float(_chance(total)[0])
    same, present = np.trace(columns.reshape(-1, 4, 4), axis1=1, axis2=2), columns.sum(axis=1)
    effect = design_effect(same, present)
    limits = wilson(float(same.sum()) / effect, float(present.sum()) / effect)
    low, high = ((limit - chance) / (1 - chance) for limit in limits)
    return Interval(value, low, high)


def _kappa(sums: Floats) -> Floats:
    """[K] from counts [K, 16]; NaN where chance alone agrees always."""
    chance = _chance(sums)
    tables = sums.reshape(len(sums), 4, 4)
    agreed = np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2))
    possible = chance < 1
    return np.where(possible, (agreed - chance) / np.where(possible, 1 - chance, 1), np.nan)


def _chance(sums: Floats) -> Floats:
    """The share [K] that two judges with these shares of verdicts agree on by chance."""
    tables = sums.reshape(len(sums), 4, 4)
    n = tables.sum(axis=(1, 2))
    found: Floats = (tables.sum(axis=2) * tables.sum(axis=1)).sum(axis=1) / n**2
    return found

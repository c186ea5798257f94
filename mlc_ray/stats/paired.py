"""Two models on the same prompts: what changed, how sure that is, and in which languages. Pure; see docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mlc_ray.errors import MlcRayError
from mlc_ray.stats.intervals import Floats, Grid, LanguageMean, holm, interval, make_grid, mcnemar_p, sign_flip_p
from mlc_ray.stats.rates import ALL_BENCHMARKS, KINDS, MEASURES, Interval, Judged, language_order, outcome
from mlc_ray.types import Kind, Measure


class NotComparableError(MlcRayError):
    """Two scores share no prompt, or no measure; the message says how many prompts each has."""


Pair: TypeAlias = tuple[Judged, Judged]
"""The verdicts on both models' responses to one prompt."""


@dataclass(frozen=True)
class LanguageChange:
    """One language: hit rates in % on the `n` common prompts, and `change` = after - before in points.

    `gained` counts prompts that became hits, `lost` those that ceased to be. `p` is McNemar's exact two-sided p-value,
    `p_holm` the same after Holm's correction over the languages of this side and measure.
    """

    language: str
    n: int
    before: float
    after: float
    change: float
    gained: int
    lost: int
    p: float
    p_holm: float


@dataclass(frozen=True)
class SideChange:
    """One side by one measure: `before` and `after` are `avg` in % on the common prompts, `change` in points.

    `p` is two-sided, from the sign-flip test over bundles. `n` counts common prompts, `bundles` their bundles.
    """

    kind: Kind
    measure: Measure
    bundles: int
    n: int
    before: float
    after: float
    change: Interval
    p: float
    languages: tuple[LanguageChange, ...]


@dataclass(frozen=True)
class BenchmarkChange:
    """A benchmark's changes. `common`, `only_before` and `only_after` count prompts; only the common are compared.

    `difference` is the change of `Summary.avg_difference` in points, over the languages that have both sides, with
    the p-value `difference_p`, which is conservative where both sides moved alike; both None without such a language.
    """

    benchmark: str
    common: int
    only_before: int
    only_after: int
    sides: tuple[SideChange, ...]
    difference: Interval | None
    difference_p: float | None

    def side(self, kind: Kind, measure: Measure = "refused") -> SideChange | None:
        """The change of one kind by one measure, None if it was not compared."""
        return next((side for side in self.sides if (side.kind, side.measure) == (kind, measure)), None)


@dataclass(frozen=True)
class Comparison:
    """Per benchmark with common prompts (and over all, named `all`, if there are several) what changed.

    `not_compared` names what only one of the two has: benchmarks, or `benchmark kind measure` of a common benchmark.
    """

    benchmarks: tuple[BenchmarkChange, ...]
    not_compared: tuple[str, ...] = ()

    def benchmark(self, name: str | None = None) -> BenchmarkChange:
        """The changes on one benchmark; without a name the last, which is over everything.

        Raises:
            KeyError: No benchmark has that name.
        """
        if name is None:
            return self.benchmarks[-1]
        for change in self.benchmarks:
            if change.benchmark == name:
                return change
        raise KeyError(f"{name!r} was not compared; there are {[change.benchmark for change in self.benchmarks]}")


def compare(before: Sequence[Judged], after: Sequence[Judged]) -> Comparison:
    """`after` against `before` on the prompts that both were asked: same benchmark, bundle, kind and language.

    Only hits count, as in every rate: degenerate and unparsed responses are not hits.

    Raises:
        NotComparableError: They share no prompt, or no measure.
        ValueError: A response was judged twice.
    """
    old, new = _by_prompt(before), _by_prompt(after)
    pairs = [(record, new[key]) for key, record in old.items() if key in new]
    if not pairs:
        raise NotComparableError(
            f"the two scores share 0 prompts, of {len(old)} and {len(new)}; score both on the same benchmarks and "
            f"languages (benchmarks before: {_names(before)}; after: {_names(after)})"
        )
    if not any(_shared_measures([pair]) for pair in pairs):
        raise NotComparableError(
            f"the two scores share {len(pairs)} prompts but no measure (before: {_measures(before)}; after: "
            f"{_measures(after)}); judge both with the same judge"
        )
    benchmarks = list(dict.fromkeys(record.benchmark for record, _ in pairs))
    changes = [_benchmark(name, [pair for pair in pairs if pair[0].benchmark == name], old, new) for name in benchmarks]
    if len(benchmarks) > 1:
        changes.append(_benchmark(ALL_BENCHMARKS, pairs, old, new))
    return Comparison(tuple(changes), _not_compared(before, after, changes))


_Prompt: TypeAlias = tuple[str, str, Kind, str]


def _by_prompt(records: Sequence[Judged]) -> dict[_Prompt, Judged]:
    found: dict[_Prompt, Judged] = {}
    for record in records:
        key = (record.benchmark, record.bundle_id, record.kind, record.language)
        if key in found:
            raise ValueError(f"response of benchmark, bundle, kind, language {key} was judged twice")
        found[key] = record
    return found


def _names(records: Sequence[Judged]) -> str:
    return ", ".join(dict.fromkeys(repr(record.benchmark) for record in records)) or "none"


def _measures(records: Sequence[Judged]) -> str:
    found = {measure for record in records for measure in MEASURES if outcome(record, measure) is not None}
    return ", ".join(sorted(found)) or "none"


def _shared_measures(pairs: Sequence[Pair]) -> list[Measure]:
    return [m for m in MEASURES if any(outcome(a, m) is not None and outcome(b, m) is not None for a, b in pairs)]


def _not_compared(
    before: Sequence[Judged], after: Sequence[Judged], changes: Sequence[BenchmarkChange]
) -> tuple[str, ...]:
    compared = {(change.benchmark, side.kind, side.measure) for change in changes for side in change.sides}
    shared = {change.benchmark for change in changes}
    lacking: dict[str, None] = {}
    for record in (*before, *after):
        if record.benchmark not in shared:
            lacking[record.benchmark] = None
            continue
        for measure in MEASURES:
            if outcome(record, measure) is not None and (record.benchmark, record.kind, measure) not in compared:
                lacking[f"{record.benchmark} {record.kind} {measure}"] = None
    return tuple(lacking)


# ------------------------------------------------------------------------------------------------------- one benchmark


def _benchmark(
    name: str, pairs: Sequence[Pair], old: Mapping[_Prompt, Judged], new: Mapping[_Prompt, Judged]
) -> BenchmarkChange:
    grids = {
        (kind, measure): _grid([pair for pair in pairs if pair[0].kind == kind], measure)
        for kind in KINDS
        for measure in _shared_measures([pair for pair in pairs if pair[0].kind == kind])
    }
    asked = [sum(name in (key[0], ALL_BENCHMARKS) for key in prompts) for prompts in (old, new)]
    difference, difference_p = _difference_change(grids)
    return BenchmarkChange(
        name,
        common=len(pairs),
        only_before=asked[0] - len(pairs),
        only_after=asked[1] - len(pairs),
        sides=tuple(_side(kind, measure, grid) for (kind, measure), grid in grids.items()),
        difference=difference,
        difference_p=difference_p,
    )


def _grid(pairs: Sequence[Pair], measure: Measure) -> Grid:
    cells = []
    for old, new in pairs:
        verdicts = [outcome(record, measure) for record in (old, new)]
        if None in verdicts:
            continue  # a measure that one of them lacks: `not_compared` names it
        hit = [verdict == "hits" for verdict in verdicts]
        flags = {"before": hit[0], "after": hit[1], "gained": hit[1] > hit[0], "lost": hit[0] > hit[1]}
        marked = ["present", *(name for name, flag in flags.items() if flag)]
        cells.append((old.benchmark, old.bundle_id, old.language, marked))
    cells.sort(key=lambda cell: language_order(cell[2]))
    return make_grid(cells, ("present", "before", "after", "gained", "lost"), KINDS.index(pairs[0][0].kind))


def _side(kind: Kind, measure: Measure, grid: Grid) -> SideChange:
    counts = {name: layer.sum(axis=0) for name, layer in grid.layers.items()}
    p_values = [mcnemar_p(int(g), int(lo)) for g, lo in zip(counts["gained"], counts["lost"], strict=True)]
    languages = []
    for index, (code, p, p_holm) in enumerate(zip(grid.languages, p_values, holm(p_values), strict=True)):
        n = int(counts["present"][index])
        rates = [100 * counts[name][index] / n for name in ("before", "after")]
        gained, lost = int(counts["gained"][index]), int(counts["lost"][index])
        languages.append(
            LanguageChange(
                code, n, float(rates[0]), float(rates[1]), 100 * (gained - lost) / n, gained, lost, p, p_holm
            )
        )
    return SideChange(
        kind,
        measure,
        bundles=len(grid.strata),
        n=int(counts["present"].sum()),
        before=sum(change.before for change in languages) / len(languages),
        after=sum(change.after for change in languages) / len(languages),
        change=_points(_change(grid, 1, grid.languages)),
        p=sign_flip_p(_contributions(grid, grid.languages)),
        languages=tuple(languages),
    )


def _difference_change(grids: Mapping[tuple[Kind, Measure], Grid]) -> tuple[Interval | None, float | None]:
    harmful, benign = (grids.get((kind, "refused")) for kind in KINDS)
    if harmful is None or benign is None:
        return None, None
    both = [code for code in harmful.languages if code in benign.languages]
    if not both:
        return None, None
    terms = [*_change(harmful, 1, both), *_change(benign, -1, both)]
    return _points(terms), sign_flip_p(np.concatenate([_contributions(harmful, both), -_contributions(benign, both)]))


def _change(grid: Grid, sign: int, languages: Sequence[str]) -> list[tuple[int, LanguageMean]]:
    """The change of `avg` as gains less losses: where nothing moved, its limits then speak of what could have."""
    gained, lost = (grid.mean(name, "present", languages) for name in ("gained", "lost"))
    return [(sign, gained), (-sign, lost)]


def _contributions(grid: Grid, languages: Sequence[str]) -> Floats:
    """What each bundle [B] adds to the change of `avg`, as a fraction: flipping its sign swaps its two models."""
    chosen = [grid.languages.index(code) for code in languages]
    moved = (grid.layers["gained"] - grid.layers["lost"])[:, chosen]
    shares: Floats = (moved / grid.layers["present"].sum(axis=0)[chosen]).sum(axis=1) / len(chosen)
    return shares


def _points(terms: Sequence[tuple[int, LanguageMean]]) -> Interval:
    return Interval(*(100 * number for number in interval(*terms)))

"""Two models on the same prompts: what changed, how sure that is, and in which languages. Pure; see docs/metrics.md."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from mlc_ray.errors import MlcRayError
from mlc_ray.stats.intervals import Floats, Grid, Statistic, Term, interval, make_grid
from mlc_ray.stats.rates import ALL_BENCHMARKS, KINDS, MEASURES, Interval, Judged, language_order, outcome
from mlc_ray.stats.response_languages import InLanguageChange, in_language_changes
from mlc_ray.stats.significance import holm, mcnemar_p, sign_flip_p, swap_p, swapped_changes
from mlc_ray.types import Kind, Measure


class NotComparableError(MlcRayError):
    """Two scores share no prompt, or no measure; the message says how many prompts each has."""

    exit_status = 3


Pair: TypeAlias = tuple[Judged, Judged]
"""The verdicts on both models' responses to one prompt."""
Consistency = Literal["var", "pag", "worst"]
"""How alike languages are: the variance of their rates, their pairwise agreement, the lowest of their rates."""


@dataclass(frozen=True)
class LanguageChange:
    """One language: rates in % on the `n` common prompts, and `change` = after - before in points.

    `gained` counts prompts that began to count, `lost` those that ceased to; where prompts have several responses, all
    of these are counted. `p` is McNemar's exact two-sided p-value, or with several responses that of the sign-flip test
    over bundles; `p_holm` is the same after Holm's correction (`corrected`).
    """

    language: str
    n: int
    before: float
    after: float
    change: float
    gained: int
    lost: int
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True)
class ConsistencyChange:
    """A number of consistency before and after, on the common prompts, in the units of `SideSummary`.

    `p` is two-sided, from exchanging the two models in random bundles; `p_holm` is after Holm's correction.
    """

    name: Consistency
    before: float
    after: float
    change: Interval
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True)
class SideChange:
    """One side by one measure: `before` and `after` are means over languages in % on the common prompts.

    What counts is what should be many: refused or safe responses, but on benign prompts by `refused` those that comply.
    `change` is in points; `p` is two-sided, from the sign-flip test over bundles, `p_holm` the same after Holm's
    correction. `n` counts responses to common prompts, `bundles` their bundles. `consistency` is empty with a single
    language. `languages` is empty over all benchmarks, where the languages of different benchmarks are not compared.
    """

    kind: Kind
    measure: Measure
    bundles: int
    n: int
    before: float
    after: float
    change: Interval
    p: float
    consistency: tuple[ConsistencyChange, ...]
    languages: tuple[LanguageChange, ...]
    p_holm: float = 1.0

    @property
    def rate(self) -> str:
        """The name of what counts: `refused`, `safe` or `complied`."""
        return "complied" if (self.kind, self.measure) == ("benign", "refused") else self.measure


@dataclass(frozen=True)
class BenchmarkChange:
    """A benchmark's changes. `common`, `only_before` and `only_after` count prompts; only the common are compared.

    `difference` is the change of `Summary.avg_difference` in points, over the languages that have both sides (over all
    benchmarks the mean over those with such a language), with the p-value `difference_p`, which is conservative where
    both sides moved alike; both None without such a language.
    `difference_p_holm` is after Holm's correction. `in_language` has the kinds with prompts of which both responses are
    in languages that could be told.
    """

    benchmark: str
    common: int
    only_before: int
    only_after: int
    sides: tuple[SideChange, ...]
    difference: Interval | None
    difference_p: float | None
    difference_p_holm: float | None = None
    in_language: tuple[InLanguageChange, ...] = ()

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

    Of several responses to a prompt those of the same number are paired; whole bundles are resampled and exchanged.

    Degenerate and unparsed responses count as nothing, as in every rate.

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
    names = list(dict.fromkeys(record.benchmark for record, _ in pairs))
    grids = {
        name: _grids([pair for pair in pairs if pair[0].benchmark == name], len(KINDS) * index)
        for index, name in enumerate(names)
    }
    changes = [_benchmark(name, [name], grids, old, new) for name in names]
    if len(names) > 1:
        changes.append(_benchmark(ALL_BENCHMARKS, names, grids, old, new))
    (comparison,) = corrected([Comparison(tuple(changes), _not_compared(before, after, changes))])
    return comparison


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with Holm's correction, as one family: every p-value of all of them, in two groups.

    One group are the tests of sides, consistency and differences, on every benchmark and over all of them; the other
    those of single languages, which are many and would drown the first.
    """
    changes = [change for comparison in comparisons for change in comparison.benchmarks]
    whole: list[float] = []
    single: list[float] = []
    for change in changes:
        for side in change.sides:
            whole += [side.p, *(number.p for number in side.consistency)]
            single += [language.p for language in side.languages]
        whole += [] if change.difference_p is None else [change.difference_p]
    overall, by_language = iter(holm(whole)), iter(holm(single))

    def side_of(side: SideChange) -> SideChange:
        p_holm = next(overall)
        consistency = tuple(replace(number, p_holm=next(overall)) for number in side.consistency)
        languages = tuple(replace(language, p_holm=next(by_language)) for language in side.languages)
        return replace(side, p_holm=p_holm, consistency=consistency, languages=languages)

    def change_of(change: BenchmarkChange) -> BenchmarkChange:
        sides = tuple(map(side_of, change.sides))
        p_holm = None if change.difference_p is None else next(overall)
        return replace(change, sides=sides, difference_p_holm=p_holm)

    return [replace(each, benchmarks=tuple(map(change_of, each.benchmarks))) for each in comparisons]


_Prompt: TypeAlias = tuple[str, str, Kind, str, int]
"""Benchmark, bundle, kind, language, sample."""


def _by_prompt(records: Sequence[Judged]) -> dict[_Prompt, Judged]:
    found: dict[_Prompt, Judged] = {}
    for record in records:
        key = (record.benchmark, record.bundle_id, record.kind, record.language, record.sample)
        if key in found:
            raise ValueError(f"response of benchmark, bundle, kind, language, sample {key} was judged twice")
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

_Grids: TypeAlias = Mapping[tuple[Kind, Measure], Grid]
_BOTH = ("before", "after")
_WHEN = (*_BOTH, "gained", "lost")
_LAYERS = ("present", *(f"{when} {what}" for when in _WHEN for what in ("hits", "misses")))


def _grids(pairs: Sequence[Pair], stream: int) -> _Grids:
    """Of one benchmark: a grid for each kind and measure that both have."""
    found = {}
    for index, kind in enumerate(KINDS):
        mine = [pair for pair in pairs if pair[0].kind == kind]
        for measure in _shared_measures(mine):
            found[kind, measure] = _grid(mine, measure, stream + index)
    return found


def _grid(pairs: Sequence[Pair], measure: Measure, stream: int) -> Grid:
    cells = []
    for old, new in pairs:
        verdicts = [outcome(record, measure) for record in (old, new)]
        if None in verdicts:
            continue  # a measure that one of them lacks: `not_compared` names it
        marked = ["present"]
        for what in ("hits", "misses"):
            was, is_now = (verdict == what for verdict in verdicts)
            flags = {"before": was, "after": is_now, "gained": is_now > was, "lost": was > is_now}
            marked += [f"{when} {what}" for when, flag in flags.items() if flag]
        cells.append((old.bundle_id, old.language, marked))
    cells.sort(key=lambda cell: language_order(cell[1]))
    return make_grid(cells, _LAYERS, stream)


def _benchmark(
    name: str,
    parts: Sequence[str],
    grids: Mapping[str, _Grids],
    old: Mapping[_Prompt, Judged],
    new: Mapping[_Prompt, Judged],
) -> BenchmarkChange:
    chosen = [grids[part] for part in parts]
    keys = [(kind, by) for kind in KINDS for by in MEASURES if any((kind, by) in found for found in chosen)]
    asked = [{key[:4] for key in prompts if name in (key[0], ALL_BENCHMARKS)} for prompts in (old, new)]
    common = len(asked[0] & asked[1])
    difference, difference_p = _difference_change(chosen)
    return BenchmarkChange(
        name,
        common=common,
        only_before=len(asked[0]) - common,
        only_after=len(asked[1]) - common,
        sides=tuple(
            _side(kind, by, [found[kind, by] for found in chosen if (kind, by) in found], by_language=len(parts) == 1)
            for kind, by in keys
        ),
        difference=difference,
        difference_p=difference_p,
        in_language=in_language_changes([(old[key], new[key]) for key in old if key in new and key[0] in parts]),
    )


def _side(kind: Kind, measure: Measure, grids: Sequence[Grid], *, by_language: bool) -> SideChange:
    what = "misses" if (kind, measure) == ("benign", "refused") else "hits"
    means = [100 * sum(weight * term.value for weight, term in _means(grids, f"{when} {what}")) for when in _BOTH]
    return SideChange(
        kind,
        measure,
        bundles=sum(len(grid.layers["present"]) for grid in grids),
        n=int(sum(grid.layers["present"].sum() for grid in grids)),
        before=means[0],
        after=means[1],
        change=_scaled(100, _changes(grids, what), most=100),
        p=sign_flip_p(_contributions(grids, what)),
        consistency=tuple(_consistency(grids, what)),
        languages=_languages(grids[0], what) if by_language else (),
    )


def _languages(grid: Grid, what: str) -> tuple[LanguageChange, ...]:
    counts = {name: layer.sum(axis=0).astype(int).tolist() for name, layer in grid.layers.items()}
    several = bool((grid.layers["present"] > 1).any())
    changes = []
    for index, code in enumerate(grid.languages):
        n, before, after, gained, lost = (
            counts[name][index]
            for name in ("present", f"before {what}", f"after {what}", f"gained {what}", f"lost {what}")
        )
        rates = 100 * before / n, 100 * after / n
        p = sign_flip_p(_contributions([grid], what, [code])) if several else mcnemar_p(gained, lost)
        changes.append(LanguageChange(code, n, *rates, 100 * (gained - lost) / n, gained, lost, p))
    return tuple(changes)


MOST: Mapping[Consistency, float] = {"var": 25, "pag": 1, "worst": 100}
"""The highest that each can be; the lowest is 0."""
"""The most that each can change by."""


def _consistency(grids: Sequence[Grid], what: str) -> Iterable[ConsistencyChange]:
    """The changes of what compares languages, each the mean over the benchmarks with several."""
    several = [grid for grid in grids if len(grid.languages) > 1]
    verdicts = [(f"{when} hits", f"{when} misses") for when in _BOTH]
    found: dict[Consistency, list[Sequence[Statistic]]] = {
        "var": [[grid.variance(f"{when} {what}", "present") for when in _BOTH] for grid in several],
        "pag": [pair for grid in several if (pair := grid.agreements(verdicts, "present"))],
        "worst": [[grid.lowest(f"{when} {what}", "present") for when in _BOTH] for grid in several],
    }
    for name, statistics in found.items():
        if not statistics:
            continue
        unit, weight = 1 if name == "pag" else 100, 1 / len(statistics)
        before, after = (unit * sum(weight * pair[index].value for pair in statistics) for index in (0, 1))
        terms = [term for old, new in statistics for term in ((weight, new), (-weight, old))]
        swapped = sum(weight * swapped_changes(old, new, stream) for stream, (old, new) in enumerate(statistics))
        yield ConsistencyChange(
            name, before, after, _scaled(unit, terms, MOST[name]), swap_p((after - before) / unit, np.asarray(swapped))
        )


def _difference_change(parts: Sequence[_Grids]) -> tuple[Interval | None, float | None]:
    """The mean over the benchmarks that have both sides in any language, each over these languages."""
    terms: list[Term] = []
    moved: list[Floats] = []
    sided = [pair for found in parts if (pair := _both_sides(found)) is not None]
    for harmful, benign, both in sided:
        for sign, grid in ((1, harmful), (-1, benign)):
            weight = sign / len(sided)
            terms += [(weight * share, term) for share, term in _changes([grid], "hits", both)]
            moved.append(weight * _contributions([grid], "hits", both))
    if not sided:
        return None, None
    return _scaled(100, terms, most=200), sign_flip_p(np.concatenate(moved))


def _both_sides(found: _Grids) -> tuple[Grid, Grid, list[str]] | None:
    harmful, benign = (found.get((kind, "refused")) for kind in KINDS)
    if harmful is None or benign is None:
        return None
    both = [code for code in harmful.languages if code in benign.languages]
    return (harmful, benign, both) if both else None


def _with(grids: Sequence[Grid], languages: Collection[str] | None) -> list[tuple[Grid, list[str]]]:
    """The grids that have any of `languages` (default: all), and which."""
    chosen = [(g, [code for code in g.languages if languages is None or code in languages]) for g in grids]
    return [(grid, codes) for grid, codes in chosen if codes]


def _means(grids: Sequence[Grid], layer: str, languages: Collection[str] | None = None) -> list[Term]:
    found = _with(grids, languages)
    return [(1 / len(found), grid.mean(layer, "present", codes)) for grid, codes in found]


def _changes(grids: Sequence[Grid], what: str, languages: Collection[str] | None = None) -> list[Term]:
    """The change of a mean as gains less losses: where nothing moved, its limits then speak of what could have."""
    gained, lost = (_means(grids, f"{which} {what}", languages) for which in ("gained", "lost"))
    return [*gained, *((-weight, term) for weight, term in lost)]


def _contributions(grids: Sequence[Grid], what: str, languages: Collection[str] | None = None) -> Floats:
    """What each bundle [B] adds to the change, as a fraction: flipping its sign swaps its two models."""
    found = _with(grids, languages)
    shares = []
    for grid, codes in found:
        chosen = [grid.languages.index(code) for code in codes]
        moved = (grid.layers[f"gained {what}"] - grid.layers[f"lost {what}"])[:, chosen]
        present = grid.layers["present"].sum(axis=0)[chosen]
        shares.append((moved / present).sum(axis=1) / (len(chosen) * len(found)))
    return np.concatenate(shares)


def _scaled(unit: float, terms: Sequence[Term], most: float) -> Interval:
    """The sum of the terms in another unit; limits of a change that is at most `most` either way."""
    value, low, high = (unit * number for number in interval(*terms))
    return Interval(value, max(-most, low), min(most, high))

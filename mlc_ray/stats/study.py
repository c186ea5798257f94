"""Methods that were each trained with several seeds and scored on the same prompts: rates, and which are told apart.

Bundles and seeds are crossed: every seed's model answers every bundle. A number is the mean over seeds of what it is of
each, and its 95 % interval has two parts, combined by square-and-add (Newcombe, Statistics in Medicine 1998):

- bundles: that of `stats.intervals` of the mean over these seeds, which draws whole bundles;
- seeds: t s / sqrt(S), where s is the standard deviation of the S seeds' numbers and t Student's quantile with S - 1
  degrees of freedom (12.7 with two seeds, 4.3 with three). With one seed there is none: the interval then says nothing
  of what another seed would give.

What varies with both at once is in either part, so that the interval is rather wide (as of Owen's pigeonhole bootstrap,
Annals of Applied Statistics 2007). Pure; shapes as in `stats.intervals`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from mlc_ray.errors import MlcRayError
from mlc_ray.stats.intervals import SAME, Floats, Grid, Term, averaged, make_grid
from mlc_ray.stats.rates import KINDS, Interval, Judged, Outcome, language_order, outcome
from mlc_ray.stats.seeds import interval_over_seeds
from mlc_ray.stats.significance import holm, largest_p
from mlc_ray.stats.study_languages import split_by_training, with_both
from mlc_ray.types import Kind, Measure

LEVEL = 0.05
"""Two methods are told apart where p after Holm's correction is at most this, and the interval leaves 0 out."""

Runs: TypeAlias = Mapping[int | None, Sequence[Judged]]
"""The verdicts of each model by its seed; of a model before training by None."""
Compared: TypeAlias = Literal["harmful", "benign", "difference"]


class StudyVerdictsError(MlcRayError):
    """The verdicts of a study are not on the same prompts, or lack a side; the message says which."""


@dataclass(frozen=True)
class MethodSide:
    """One side of a method, over its seeds: rates in % of what should be many (refused or safe; complied if benign).

    `avg` is the mean over languages, `var` 100 times the variance of the languages' rates as fractions, `pag` their
    agreement as a fraction (`stats.summaries`), both None with one language. `trained` and `never` are `avg` over the
    languages that training had and over the others, None where there are none; if there are both, of the benchmarks
    that have both (None if none has). Over several benchmarks every number is the mean of the benchmarks'.
    """

    kind: Kind
    measure: Measure
    languages: Mapping[str, Interval]
    avg: Interval
    var: Interval | None
    pag: Interval | None
    trained: Interval | None
    never: Interval | None


@dataclass(frozen=True)
class MethodRates:
    """Both sides of a method on a model.

    `difference` is harmful refused less benign refused, in points: of each language that has both, over the benchmarks
    that ask it each, and then the mean over these languages.
    """

    harmful: MethodSide
    benign: MethodSide
    difference: Interval
    seeds: int


@dataclass(frozen=True)
class MethodTest:
    """Two methods on one model, paired by bundle and seed: `change` is `second` less `first`, in points.

    `p` is the largest over the seeds of the two-sided sign-flip test over bundles, and 1 where seeds change in opposite
    directions; `p_holm` is after Holm's correction over all tests of the study. It is of these seeds' models. Whether
    methods differ is also a matter of how much seeds differ, which is in `change`: of two equal methods whose models
    differ much by seed, all three changes have one sign in a quarter of the cases, each as sure as bundles are many.
    """

    model: str
    first: str
    second: str
    compared: Compared
    change: Interval
    p: float
    seeds: int
    p_holm: float = 1.0

    @property
    def told_apart(self) -> bool:
        """Whether every seed tells them apart in the same direction, and the interval leaves 0 out.

        The interval is of this test by itself, and with one seed over bundles alone.
        """
        return self.p_holm <= LEVEL and not self.change.low <= 0 <= self.change.high


# --------------------------------------------------------------------------------------------------------------- rates


@dataclass(frozen=True)
class Verdicts:
    """The verdicts of one method on one model, as grids with layers for each seed; made by `read_verdicts`."""

    runs: Runs
    measure: Measure
    _made: dict[tuple[Kind, Measure], list[Grid]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def seeds(self) -> list[int | None]:
        """Its seeds; `[None]` of a model before training."""
        return list(self.runs)

    @cached_property
    def benchmarks(self) -> list[str]:
        """Their names, as they come."""
        return list(dict.fromkeys(record.benchmark for record in next(iter(self.runs.values()))))

    def grids(self, kind: Kind, measure: Measure) -> list[Grid]:
        """A grid for each benchmark with such prompts: `present`, and `hits SEED` and `misses SEED`."""
        if (kind, measure) not in self._made:
            self._made[kind, measure] = self._make(kind, measure)
        return self._made[kind, measure]

    def _make(self, kind: Kind, measure: Measure) -> list[Grid]:
        found = []
        for index, benchmark in enumerate(self.benchmarks):
            by_seed = [
                {
                    (r.bundle_id, r.language, r.sample): outcome(r, measure)
                    for r in run
                    if (r.benchmark, r.kind) == (benchmark, kind)
                }
                for run in self.runs.values()
            ]
            if by_seed[0]:
                found.append(_grid(by_seed, self.seeds, len(KINDS) * index + KINDS.index(kind)))
        return found


def _grid(
    by_seed: Sequence[Mapping[tuple[str, str, int], Outcome | None]], seeds: Sequence[int | None], n: int
) -> Grid:
    cells = []
    for key in sorted(by_seed[0], key=lambda key: (language_order(key[1]), key)):
        marks = ["present"]
        for seed, verdicts in zip(seeds, by_seed, strict=True):
            if verdicts[key] in ("hits", "misses"):
                marks.append(f"{verdicts[key]} {seed}")
        cells.append((key[0], key[1], marks))
    return make_grid(cells, ("present", *(f"{what} {seed}" for seed in seeds for what in ("hits", "misses"))), n)


def read_verdicts(runs: Runs) -> Verdicts:
    """The verdicts of a method's models, which must all be on the same prompts, of both kinds by `refused`.

    Raises:
        StudyVerdictsError: They are not.
    """
    asked = [{(r.benchmark, r.bundle_id, r.kind, r.language, r.sample) for r in run} for run in runs.values()]
    if any(each != asked[0] for each in asked):
        raise StudyVerdictsError(
            f"the models of seeds {', '.join(map(str, runs))} were not all asked the same prompts "
            f"({', '.join(str(len(each)) for each in asked)}); score them again on the same benchmarks"
        )
    first = next(iter(runs.values()))
    for kind in KINDS:
        if not any(record.kind == kind and outcome(record, "refused") is not None for record in first):
            raise StudyVerdictsError(
                f"no {kind} prompt has a verdict by `refused`: without it one side is missing; ask prompts of both "
                "kinds, and a judge that says what is refused of either"
            )
    found = Verdicts(runs, "refused")
    if not _both(found):
        raise StudyVerdictsError(
            "no language has prompts of both kinds, so that no difference can be taken: ask both kinds in one language"
        )
    safe = any(record.kind == "harmful" and outcome(record, "safe") is not None for record in first)
    return replace(found, measure="safe") if safe else found


def method_rates(verdicts: Verdicts, trained: Collection[str] | None) -> MethodRates:
    """Both sides of a method.

    Args:
        verdicts: Those of its models.
        trained: The languages that training had, matched without script and region; None: not known.
    """
    both = _both(verdicts)
    harmful, benign = (_by_language(verdicts.grids(kind, "refused"), both) for kind in KINDS)
    by_seed = [
        [*_terms(harmful, f"hits {seed}"), *((-weight, term) for weight, term in _terms(benign, f"hits {seed}"))]
        for seed in verdicts.seeds
    ]
    return MethodRates(
        _side(verdicts, "harmful", verdicts.measure, "hits", trained),
        _side(verdicts, "benign", "refused", "misses", trained),
        interval_over_seeds(by_seed, 100, -100, 100),
        len(verdicts.seeds),
    )


def sides_by_benchmark(verdicts: Verdicts, trained: Collection[str] | None) -> dict[str, tuple[MethodSide, ...]]:
    """The sides that each benchmark has by itself, where there are several of a kind; see `method_rates`.

    Languages are to be compared within a benchmark: in a mean over benchmarks those that only an easy one asks look
    better.
    """
    first = next(iter(verdicts.runs.values()))
    kinds = {name: {r.kind for r in first if r.benchmark == name} for name in verdicts.benchmarks}
    if all(sum(kind in own for own in kinds.values()) < 2 for kind in KINDS):
        return {}
    found = {}
    for name, own in kinds.items():
        runs = {seed: [r for r in run if r.benchmark == name] for seed, run in verdicts.runs.items()}
        part = replace(verdicts, runs=runs, _made={})
        harmful = [_side(part, "harmful", verdicts.measure, "hits", trained)] if "harmful" in own else []
        benign = [_side(part, "benign", "refused", "misses", trained)] if "benign" in own else []
        found[name] = (*harmful, *benign)
    return found


def _side(
    verdicts: Verdicts, kind: Kind, measure: Measure, wanted: Outcome, trained: Collection[str] | None
) -> MethodSide:
    grids, seeds = verdicts.grids(kind, measure), verdicts.seeds
    codes, seen, never = split_by_training(grids, trained)

    def mean(languages: Collection[str], of: Sequence[Grid] = grids) -> Interval | None:
        by_seed = [_means(of, f"{wanted} {seed}", languages) for seed in seeds]
        return interval_over_seeds(by_seed, 100, 0, 100) if by_seed[0] else None

    split = with_both(grids, seen, never)
    several = [grid for grid in grids if len(grid.languages) > 1]
    variances = [averaged([g.variance(f"{wanted} {seed}", "present") for g in several]) for seed in seeds]
    agreed = [grid.agreements([(f"hits {seed}", f"misses {seed}") for seed in seeds], "present") for grid in several]
    agreements = [averaged([found[index] for found in agreed if found]) for index in range(len(seeds))]
    avg = mean(codes)
    assert avg is not None, "`read_verdicts` has seen to it"
    languages = {code: rate for code in codes if (rate := mean([code])) is not None}
    return MethodSide(
        kind,
        measure,
        languages,
        avg,
        interval_over_seeds(variances, 100, 0, 25) if variances[0] else None,
        interval_over_seeds(agreements, 1, 0, 1) if agreements[0] else None,
        mean(seen, split),
        mean(never, split),
    )


_Part: TypeAlias = tuple[Grid, Sequence[tuple[float, Sequence[str]]]]
"""What a benchmark adds to a number: the sum of weight * mean over languages, of groups of its languages."""


def _both(verdicts: Verdicts) -> list[str]:
    """The languages that have prompts of both kinds, in any benchmark."""
    of = {kind: {code for grid in verdicts.grids(kind, "refused") for code in grid.languages} for kind in KINDS}
    return sorted(of["harmful"] & of["benign"], key=language_order)


def _means(grids: Sequence[Grid], layer: str, languages: Collection[str]) -> list[Term]:
    """The mean over the benchmarks that have any of `languages` of their mean over these."""
    found = [(grid, [code for code in grid.languages if code in languages]) for grid in grids]
    some = [(grid, codes) for grid, codes in found if codes]
    return [(1 / len(some), grid.mean(layer, "present", codes)) for grid, codes in some]


def _by_benchmark(grids: Sequence[Grid]) -> list[_Part]:
    """The mean over benchmarks of their means over languages."""
    return [(grid, [(1 / len(grids), grid.languages)]) for grid in grids]


def _by_language(grids: Sequence[Grid], languages: Sequence[str]) -> list[_Part]:
    """The mean over `languages` of their means over the benchmarks that have them."""
    found: list[_Part] = []
    for grid in grids:
        groups: dict[int, list[str]] = {}  # by the number of benchmarks that share a language
        for code in grid.languages:
            if code in languages:
                groups.setdefault(sum(code in each.languages for each in grids), []).append(code)
        found.append((grid, [(len(group) / len(languages) / n, group) for n, group in groups.items()]))
    return found


def _terms(parts: Iterable[_Part], layer: str) -> list[Term]:
    return [(weight, grid.mean(layer, "present", codes)) for grid, groups in parts for weight, codes in groups]


# --------------------------------------------------------------------------------------------------------------- tests


def method_tests(model: str, methods: Mapping[str, Verdicts]) -> list[MethodTest]:
    """Every pair of methods of a model with a seed in common, on the harmful and benign side and in the difference.

    The model before training stands beside every seed of the others. The p-values are not corrected yet.
    """
    found = []
    for (first, one), (second, other) in itertools.combinations(methods.items(), 2):
        if pairs := _common(one.seeds, other.seeds):
            found += [
                _test(model, (first, one), (second, other), pairs, compared)
                for compared in ("harmful", "benign", "difference")
            ]
    return found


def corrected(tests: Iterable[MethodTest]) -> list[MethodTest]:
    """All tests of a study as one family, by Holm's correction."""
    listed = list(tests)
    return [replace(each, p_holm=p) for each, p in zip(listed, holm([each.p for each in listed]), strict=True)]


def _common(one: Sequence[int | None], other: Sequence[int | None]) -> list[tuple[int | None, int | None]]:
    if None in one or None in other:
        return [(a, b) for a in one for b in other]
    return [(seed, seed) for seed in one if seed in other]


def change_in(
    first: Verdicts, second: Verdicts, kind: Kind, what: Outcome, languages: Collection[str]
) -> Interval | None:
    """How many points more of `what` the second method has than the first, on the same bundles and seeds.

    That is the mean over the benchmarks that have any of `languages`, of their mean over these; None where none has.
    """
    pairs = _common(first.seeds, second.seeds)
    measure: Measure = first.measure if kind == "harmful" else "refused"
    grids = _changes(first.grids(kind, measure), second.grids(kind, measure), pairs, what)
    by_pair = [
        [(sign * weight, term)
         for name, sign in (("gained", 1), ("lost", -1))
         for weight, term in _means(grids, f"{name} {index}", languages)]
        for index in range(len(pairs))
    ]  # fmt: skip
    return interval_over_seeds(by_pair, 100, -100, 100) if by_pair and by_pair[0] else None


_SIGNS: Mapping[Compared, tuple[tuple[Kind, float], ...]] = {
    "harmful": (("harmful", 1),),
    "benign": (("benign", 1),),
    "difference": (("harmful", 1), ("benign", -1)),
}


def _test(
    model: str,
    first: tuple[str, Verdicts],
    second: tuple[str, Verdicts],
    pairs: Sequence[tuple[int | None, int | None]],
    compared: Compared,
) -> MethodTest:
    by_pair: list[list[Term]] = [[] for _ in pairs]
    moved: list[list[Floats]] = [[] for _ in pairs]
    both = _both(first[1])
    for kind, sign in _SIGNS[compared]:
        measure: Measure = first[1].measure if compared == "harmful" else "refused"
        what = "misses" if compared == "benign" else "hits"
        grids = _changes(first[1].grids(kind, measure), second[1].grids(kind, measure), pairs, what)
        parts = _by_language(grids, both) if compared == "difference" else _by_benchmark(grids)
        for index in range(len(pairs)):
            for name, direction in (("gained", sign), ("lost", -sign)):
                by_pair[index] += [(direction * w, term) for w, term in _terms(parts, f"{name} {index}")]
            moved[index] += [sign * _contributions(part, index) for part in parts]
    by_bundle = [np.concatenate(each) for each in moved]
    directions = {np.sign(each.sum()) for each in by_bundle if abs(each.sum()) > SAME}
    return MethodTest(
        model,
        first[0],
        second[0],
        compared,
        interval_over_seeds(by_pair, 100, *((-200, 200) if compared == "difference" else (-100, 100))),
        1.0 if len(directions) > 1 else largest_p(by_bundle),
        len(pairs),
    )


def _changes(
    before: Sequence[Grid], after: Sequence[Grid], pairs: Sequence[tuple[int | None, int | None]], what: str
) -> list[Grid]:
    """Grids of the same bundles and languages: `present`, and of each pair what was `gained` and `lost`."""
    found = []
    for old, new in zip(before, after, strict=True):
        layers: dict[str, Floats] = {"present": old.layers["present"]}
        for index, (one, other) in enumerate(pairs):
            change = new.layers[f"{what} {other}"] - old.layers[f"{what} {one}"]
            layers[f"gained {index}"], layers[f"lost {index}"] = np.maximum(change, 0), np.maximum(-change, 0)
        found.append(Grid(old.languages, layers, old.stream))
    return found


def _contributions(part: _Part, index: int) -> Floats:
    """What each bundle [B] adds to the change of a pair."""
    grid, groups = part
    moved = (grid.layers[f"gained {index}"] - grid.layers[f"lost {index}"]) / grid.layers["present"].sum(axis=0)
    found: Floats = np.zeros(len(moved))
    for weight, codes in groups:
        found += weight * moved[:, [grid.languages.index(code) for code in codes]].mean(axis=1)
    return found

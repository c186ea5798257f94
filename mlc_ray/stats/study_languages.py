"""The languages of a study: which were trained, and how often responses are in that of their prompt. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mlc_ray.stats.intervals import Grid, make_grid
from mlc_ray.stats.rates import KINDS, Interval, Judged, language_order
from mlc_ray.stats.response_languages import means_of_told
from mlc_ray.stats.seeds import interval_over_seeds
from mlc_ray.types import Kind, primary_language


@dataclass(frozen=True)
class MethodLanguages:
    """How often a method's responses to prompts of a kind are in the language of the prompt, in %, over its seeds.

    Of the responses whose language could be told; `avg`, `trained` and `never` are means over languages as those of
    `study.MethodSide`.
    """

    kind: Kind
    avg: Interval
    trained: Interval | None
    never: Interval | None


def method_languages(
    runs: Mapping[int | None, Sequence[Judged]], trained: Collection[str] | None
) -> tuple[MethodLanguages, ...]:
    """A method's responses in their prompts' languages, of each kind of which any could be told.

    Args:
        runs: The verdicts of its models by seed, their responses' languages told in the same way.
        trained: The languages that training had, matched without script and region; None: not known.
    """
    found = []
    for kind in KINDS:
        grids = _grids(runs, kind)
        codes, seen, never = split_by_training(grids, trained)
        split = with_both(grids, seen, never)
        means_of = [_mean(runs, of, languages) for of, languages in ((grids, codes), (split, seen), (split, never))]
        if means_of[0] is not None:
            found.append(MethodLanguages(kind, means_of[0], *means_of[1:]))
    return tuple(found)


def _grids(runs: Mapping[int | None, Sequence[Judged]], kind: Kind) -> list[Grid]:
    """A grid for each benchmark with such prompts: `told SEED` and `same SEED`."""
    cells: dict[str, list[tuple[str, str, list[str]]]] = {}
    for seed, records in runs.items():
        for record in records:
            if record.kind == kind:
                said = record.response_language
                is_so = {"told": said is not None, "same": said == primary_language(record.language)}
                counted = [f"{what} {seed}" for what, holds in is_so.items() if holds]
                cells.setdefault(record.benchmark, []).append((record.bundle_id, record.language, counted))
    layers = [f"{what} {seed}" for seed in runs for what in ("told", "same")]
    return [make_grid(mine, layers, stream) for stream, mine in enumerate(cells.values())]


def _mean(
    runs: Mapping[int | None, Sequence[Judged]], grids: Sequence[Grid], languages: Collection[str]
) -> Interval | None:
    """None where nothing could be told of some seed."""
    by_seed = [means_of_told(grids, f"same {seed}", f"told {seed}", languages) for seed in runs]
    return interval_over_seeds(by_seed, 100, 0, 100) if all(by_seed) else None


def split_by_training(grids: Sequence[Grid], trained: Collection[str] | None) -> tuple[list[str], list[str], list[str]]:
    """All languages of the grids, those that training had, and the others; none of either where that is not known."""
    codes = sorted({code for grid in grids for code in grid.languages}, key=language_order)
    primary = None if trained is None else set(map(primary_language, trained))
    seen = [code for code in codes if primary is not None and primary_language(code) in primary]
    return codes, seen, [code for code in codes if primary is not None and code not in seen]


def with_both(grids: Sequence[Grid], seen: Collection[str], never: Collection[str]) -> Sequence[Grid]:
    """The grids to compare trained and other languages in: another benchmark may be harder, so those that have both."""
    if not seen or not never:
        return grids
    return [grid for grid in grids if {*seen} & {*grid.languages} and {*never} & {*grid.languages}]

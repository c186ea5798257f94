"""Whether responses are in the language of their prompt. Pure; docs/metrics.md has every definition."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mlc_ray.stats.intervals import Grid, Term, interval, make_grid
from mlc_ray.stats.rates import ALL_BENCHMARKS, KINDS, Interval, Judged, language_order
from mlc_ray.types import Kind, primary_language

Part = Literal["all", "refused", "others"]
"""Of which responses: all, those that refuse, or those that do not."""
PARTS: tuple[Part, ...] = get_args(Part)
_LAYERS = ("asked", *(f"{part} {what}" for part in PARTS for what in ("told", "same")))


@dataclass(frozen=True)
class LanguageRow:
    """The `n` responses to the prompts of one kind in one language.

    `told` counts those whose language could be told, `same` those of them in the prompt's language; `refused_told` and
    `refused_same` are these of the responses that refuse. `rate` is same / told in %, None where no language could be
    told. `instead` counts the other languages, the most frequent one first.
    """

    benchmark: str
    kind: Kind
    language: str
    n: int
    told: int
    same: int
    refused_told: int
    refused_same: int
    rate: Interval | None
    instead: Mapping[str, int]


@dataclass(frozen=True)
class LanguageMean:
    """The mean over languages of the share in % of the prompt's language, among the responses of a part.

    Over all benchmarks it is the mean of theirs.
    """

    benchmark: str
    kind: Kind
    part: Part
    rate: Interval


@dataclass(frozen=True)
class InLanguage:
    """How often responses are in the language of their prompt; empty where that was not measured."""

    rows: tuple[LanguageRow, ...] = ()
    means: tuple[LanguageMean, ...] = ()

    def mean(self, benchmark: str, kind: Kind, part: Part = "all") -> Interval | None:
        """A mean over languages in %; None where there is nothing to take it of."""
        return next((m.rate for m in self.means if (m.benchmark, m.kind, m.part) == (benchmark, kind, part)), None)


def in_language(records: Sequence[Judged]) -> InLanguage:
    """How often responses are in the language of their prompt, by benchmark, kind and language."""
    cells: dict[tuple[str, Kind], list[tuple[str, str, list[str]]]] = defaultdict(list)
    instead: dict[tuple[str, Kind, str], Counter[str]] = defaultdict(Counter)
    for record in sorted(records, key=lambda record: (KINDS.index(record.kind), *language_order(record.language))):
        cells[record.benchmark, record.kind].append((record.bundle_id, record.language, marks(record)))
        if record.response_language not in (None, primary_language(record.language)):
            instead[record.benchmark, record.kind, record.language][str(record.response_language)] += 1
    grids = {key: make_grid(found, _LAYERS, stream) for stream, (key, found) in enumerate(cells.items())}
    rows = [_row(*key, grid, code, instead[*key, code]) for key, grid in grids.items() for code in grid.languages]
    names = list(dict.fromkeys(record.benchmark for record in records))
    found = []
    for name in [*names, *([ALL_BENCHMARKS] if len(names) > 1 else [])]:
        for kind in KINDS:
            mine = [grid for key, grid in grids.items() if key[1] == kind and name in (key[0], ALL_BENCHMARKS)]
            for part in PARTS:
                if terms := means_of_told(mine, f"{part} same", f"{part} told"):
                    found.append(LanguageMean(name, kind, part, percent(*terms)))
    return InLanguage(tuple(rows), tuple(found))


@dataclass(frozen=True)
class InLanguageChange:
    """Responses in the language of their prompt, before and after: means over languages in %, and `change` in points.

    Of the `n` pairs of responses to prompts of one kind of which both are in languages that could be told.
    """

    kind: Kind
    n: int
    before: float
    after: float
    change: Interval


def in_language_changes(pairs: Iterable[tuple[Judged, Judged]]) -> tuple[InLanguageChange, ...]:
    """What changed in each kind, over benchmarks the mean of theirs.

    Args:
        pairs: The verdicts on two models' responses to each prompt, their languages told in the same way.
    """
    cells: dict[tuple[Kind, str], list[tuple[str, str, list[str]]]] = defaultdict(list)
    for old, new in pairs:
        if old.response_language is None or new.response_language is None:
            continue
        was, is_now = (each.response_language == primary_language(each.language) for each in (old, new))
        flags = {"told": True, "before": was, "after": is_now, "gained": is_now > was, "lost": was > is_now}
        counted = [name for name, flag in flags.items() if flag]
        cells[old.kind, old.benchmark].append((old.bundle_id, old.language, counted))
    grids = {key: make_grid(mine, _CHANGE_LAYERS, stream) for stream, (key, mine) in enumerate(cells.items())}
    by_kind = {kind: [grid for (of, _), grid in grids.items() if of == kind] for kind in KINDS}
    return tuple(_change(kind, mine) for kind, mine in by_kind.items() if mine)


_CHANGE_LAYERS = ("told", "before", "after", "gained", "lost")


def _change(kind: Kind, grids: Sequence[Grid]) -> InLanguageChange:
    """As gains less losses: where nothing moved, the limits then speak of what could have."""

    def terms(layer: str, sign: float = 1.0) -> list[Term]:
        return [(sign / len(grids), grid.mean(layer, "told")) for grid in grids]

    before, after = (100 * sum(weight * mean.value for weight, mean in terms(when)) for when in ("before", "after"))
    change = percent(*terms("gained"), *terms("lost", -1.0), least=-100.0)
    return InLanguageChange(kind, sum(int(grid.layers["told"].sum()) for grid in grids), before, after, change)


def marks(record: Judged) -> list[str]:
    """The layers in which a response counts."""
    told = record.response_language is not None
    same = record.response_language == primary_language(record.language)
    parts = ["all"] + (["refused" if record.behaviour == "refused" else "others"] if record.behaviour else [])
    return ["asked", *(f"{part} told" for part in parts if told), *(f"{part} same" for part in parts if same)]


def _row(benchmark: str, kind: Kind, grid: Grid, code: str, instead: Counter[str]) -> LanguageRow:
    sums = {name: int(layer[:, grid.languages.index(code)].sum()) for name, layer in grid.layers.items()}
    rate = percent((1, grid.mean("all same", "all told", [code]))) if sums["all told"] else None
    return LanguageRow(
        benchmark, kind, code, sums["asked"], sums["all told"], sums["all same"], sums["refused told"],
        sums["refused same"], rate, dict(instead.most_common()),
    )  # fmt: skip


def means_of_told(grids: Sequence[Grid], same: str, told: str, languages: Collection[str] | None = None) -> list[Term]:
    """The mean over grids of the mean of layer `same` over layer `told`, over the languages of which any is told.

    Args:
        languages: Only these.
    """
    chosen = [
        (grid, [
            code for code, n in zip(grid.languages, grid.layers[told].sum(axis=0), strict=True)
            if n and (languages is None or code in languages)
        ])
        for grid in grids
    ]  # fmt: skip
    some = [(grid, codes) for grid, codes in chosen if codes]
    return [(1 / len(some), grid.mean(same, told, codes)) for grid, codes in some]


def percent(*terms: Term, least: float = 0.0) -> Interval:
    """The sum of terms in %, its limits from `least` to 100."""
    value, low, high = (100 * number for number in interval(*terms))
    return Interval(value, max(least, low), min(100.0, high))

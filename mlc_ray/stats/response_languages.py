"""Whether responses are in the language of their prompt. Pure; docs/metrics.md has every definition."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

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
    found = [
        LanguageMean(name, kind, part, percent(*terms))
        for name in [*names, *([ALL_BENCHMARKS] if len(names) > 1 else [])]
        for kind in KINDS
        for part in PARTS
        if (terms := _means([grids[k] for k in grids if k[1] == kind and name in (k[0], ALL_BENCHMARKS)], part))
    ]
    return InLanguage(tuple(rows), tuple(found))


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


def _means(grids: Sequence[Grid], part: Part) -> list[Term]:
    """The mean over grids of the mean over those of their languages that have any response of the part."""
    told = [grid.layers[f"{part} told"].sum(axis=0) > 0 for grid in grids]
    some = [(grid, [*np.array(grid.languages)[there]]) for grid, there in zip(grids, told, strict=True) if there.any()]
    return [(1 / len(some), grid.mean(f"{part} same", f"{part} told", codes)) for grid, codes in some]


def percent(*terms: Term, least: float = 0.0) -> Interval:
    """The sum of terms in %, its limits from `least` to 100."""
    value, low, high = (100 * number for number in interval(*terms))
    return Interval(value, max(least, low), min(100.0, high))

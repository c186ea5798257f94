"""The prompts of benchmarks, counted before they are asked: read where they are here, else assumed and said so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mlc_ray._registry import resolve
from mlc_ray.config import ScoringSection, SourceSection
from mlc_ray.types import Bundle, Kind

LANGUAGES, BUNDLES = ("en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku"), 180
"""Of the published test set, PKU-SafeRLHF."""


@dataclass(frozen=True)
class Prompts:
    """How many there are of each kind in each language, and what was assumed, each as a sentence."""

    cells: Counter[tuple[Kind, str]]
    assumed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.cells.total()


def prompts_of(benchmarks: Sequence[SourceSection], scoring: ScoringSection, limit: int | None) -> Prompts:
    """Prompts of the benchmarks that are here, chosen as a score does; of others as many as are published in their
    format, else as the published test set has.

    Args:
        benchmarks: what is asked.
        scoring: its `languages` alone are counted, where it names some.
        limit: of the bundles of a benchmark and kind.
    """
    from mlc_ray.data.sources import Reading, is_here, resolve_source
    from mlc_ray.score.prompts import choose_prompts

    cells, assumed = Counter[tuple[Kind, str]](), list[str]()
    for source in benchmarks:
        if not is_here(source):
            name, languages, size = _published(source, scoring.languages)
            number = min(size, limit or size)
            cells.update({(source.kind or "harmful", code): number for code in languages})
            assumed.append(
                f"{source.path} is not here: {number} bundles in {len(languages)} languages, as published of {name}"
                + ("" if number == size else ", of which limit takes so many")
            )
            continue
        rows = (row.parsed for file in resolve_source(source) for row in Reading(file).rows())
        bundles = {each.bundle_id: each for each in rows if isinstance(each, Bundle)}
        columns = [
            {"bundle_id": name, "kind": each.kind, "languages": list(each.prompts)} for name, each in bundles.items()
        ]
        for name, codes in choose_prompts(columns, scoring.languages, limit).items():
            cells.update((bundles[name].kind, code) for code in codes)
    return Prompts(cells, tuple(assumed))


def _published(source: SourceSection, asked: Sequence[str] | None) -> tuple[str, Sequence[str], int]:
    """The benchmark that is published in a source's format, those of its languages that are asked, and how many bundles
    it has in each; of another one all that are asked, since nobody knows which it has."""
    found = None if source.format == "auto" else getattr(resolve("format", source.format), "published", None)
    if found is None or found.bundles is None:
        return "one test set", asked or LANGUAGES, BUNDLES
    return found.name, [code for code in sorted(found.languages) if code in (asked or found.languages)], found.bundles

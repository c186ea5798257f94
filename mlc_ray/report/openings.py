"""Which share of a score's refusals begins with an opening that the model's training read, of responses and settings.

Terms on decisions see of a refusal how it opens. Where most refusals open otherwise, their log-odds, and the AUC of
these, speak of something that the model does not do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlc_ray.config import ConfigError, OpeningsSection, parse_config
from mlc_ray.judges.openings import refusal_openings
from mlc_ray.runs import SCORES_FOLDER, ModelPathError, descriptions_of
from mlc_ray.score.results import ScoreResult
from mlc_ray.storage import Place

if TYPE_CHECKING:
    from mlc_ray.report.collect import Model, Response

READ_BY = ("consistency", "decision")
"""The shipped terms that read openings. Whether one of your own does, its run does not record: it does not count."""
LOW, FEWEST = 0.75, 5
"""A share of refusals below which openings say little of what the model does; and refusals that it takes to say so."""


@dataclass(frozen=True)
class Coverage:
    """Of the refusals of one language, how many begin with an opening that is read in it."""

    language: str
    refusals: int
    begun: int

    @property
    def is_low(self) -> bool:
        """Whether most of what the model refuses by is not seen well: then an AUC of openings says little."""
        return self.refusals >= FEWEST and self.begun < LOW * self.refusals

    def __str__(self) -> str:
        return f"{self.begun} of {self.refusals}"


@dataclass(frozen=True)
class ReadOpenings:
    """The openings that a model's training has, and whether a term of it reads them."""

    openings: OpeningsSection
    by_terms: bool


def openings_read(result: ScoreResult) -> ReadOpenings | None:
    """Those of the run that a score's model is of; None where no run is known (an untouched model) or it names none.

    Raises:
        ModelPathError: What describes the run is damaged.
    """
    model, folder = Place(result.resolved), Place(result.folder)
    places = [model] if model.is_local else []  # a report asks no storage that it is not given
    if folder.parent.name == SCORES_FOLDER:  # of a run, whose model may be gone
        places.append(folder.parent.parent)
    for place in places:
        for file, facts in descriptions_of(place):
            settings = facts.get("resolved_config") or facts.get("settings")
            if isinstance(settings, Mapping) and "openings" in settings:
                try:
                    openings = parse_config(OpeningsSection, settings["openings"])
                except ConfigError as error:
                    raise ModelPathError(f"{str(file)!r} is damaged: openings: {error}; restore it") from None
                return ReadOpenings(openings, any(_reads(name, of) for name, of in settings.get("terms", {}).items()))
    return None


def _reads(name: str, term: Mapping[str, Any]) -> bool:
    return term.get("name", name) in READ_BY and term.get("weight", 1) > 0


def coverage(responses: Sequence[Response], openings: OpeningsSection) -> dict[str, Coverage]:
    """Of each language in which a response refuses, to prompts of either kind; blanks around responses do not count."""
    texts: dict[str, list[str]] = {}
    for each in responses:
        if each.behaviour == "refused":
            texts.setdefault(each.language, []).append(each.response.strip())
    found = {}
    for code, refusals in sorted(texts.items()):
        read = tuple(refusal_openings(code, openings))
        found[code] = Coverage(code, len(refusals), sum(text.startswith(read) for text in refusals))
    return found


def coverage_of(model: Model, read: ReadOpenings | None) -> dict[str, Coverage]:
    """By the openings of the run that a model is of; of one without, by those that are listed."""
    return coverage(model.responses, OpeningsSection() if read is None else read.openings)


def coverage_warnings(models: Sequence[Model]) -> Iterator[str]:
    """The languages in which a model refuses by openings that nothing reads, where a term or a probe reads some."""
    for model in models:
        read = openings_read(model.result)
        if not model.decisions and not (read is not None and read.by_terms):
            continue
        if low := [each for each in coverage_of(model, read).values() if each.is_low]:
            said = ", ".join(f"{each.language} {each}" for each in low)
            what = "its training's terms read" if read is not None and read.by_terms else "are listed"
            yield (
                f"Of the refusals of {model.label}, under {LOW:.0%} begin with openings that {what} ({said}): there an "
                "AUC of openings, and what the terms teach, say little of what it refuses; `mlc-ray openings` finds "
                "others."
            )

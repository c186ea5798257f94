"""The quality report: what became of every text, twin and own answer, as counts; written as JSON and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mlc_ray.errors import MlcRayError
from mlc_ray.report.languages import name_and_code
from mlc_ray.report.tables import Table, markdown, row, table
from mlc_ray.report.text import ABSENT, percent
from mlc_ray.runs import QUALITY_FILE
from mlc_ray.storage import Place
from mlc_ray.translate.drafts import Own

FORMAT = 2
_TOLD_APART = {"Arab", "Cyrl", "Deva", "Hebr", "Latn"}
"""What may follow a language in its tag and is checked, by the script: no region, nor what Chinese is written in."""


class QualityFileError(MlcRayError, ValueError):
    """A quality report is missing or damaged; the message names the file."""


@dataclass
class TextQuality:
    """Texts of one part in one language: `given` were there, `asked` were to be translated.

    `rejected` counts those by check; a text may fail several. `chrf` are the scores of those that were translated back.
    `identified` says whether lingua knows the language.
    """

    language: str
    part: str
    given: int = 0
    asked: int = 0
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    chrf_mean: float | None = None
    chrf_median: float | None = None
    identified: bool = True


@dataclass
class TwinQuality:
    """Twins of a kind: how many were asked for, how many are used, and why the others are not."""

    kind: str
    asked: int = 0
    accepted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass
class OwnQuality:
    """A model's own answers to `prompts` of a kind in a language; of those not `asked` the settings give the refusal.

    `refused` and `other_language` count plain answers that refuse, or are in another language, whatever became of them;
    `shortened` those that end at their last whole sentence; `distinct_refusals` how many different texts the refusals
    are that are used; `outcomes` what became of each; `identified` whether lingua knows the language.
    """

    language: str
    kind: str
    prompts: int = 0
    asked: int = 0
    refused: int = 0
    other_language: int = 0
    shortened: int = 0
    distinct_refusals: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    identified: bool = True

    @property
    def kept(self) -> int:
        """How many are used."""
        return self.outcomes.get("kept", 0)


@dataclass
class Quality:
    """Everything. `read` and `written` count bundles by kind, `rejected` those that were not written, by why."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    texts: list[TextQuality] = field(default_factory=list)
    twins: list[TwinQuality] = field(default_factory=list)
    own: list[OwnQuality] = field(default_factory=list)
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT


_QUALITY = TypeAdapter(Quality)


class Counts:
    """Makes a `Quality` of what is counted one by one."""

    def __init__(self, name: str) -> None:
        self.quality = Quality(name)
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._texts: dict[tuple[str, str], tuple[TextQuality, list[float]]] = {}
        self._twins: dict[str, TwinQuality] = {}
        self._own: dict[tuple[str, str], OwnQuality] = {}
        self._refusals: dict[tuple[str, str], set[str]] = {}

    def given(self, language: str, part: str) -> None:
        """A text that the source had already."""
        self._of(language, part)[0].given += 1

    def text(
        self, language: str, part: str, faults: Mapping[str, str], chrf: float | None, *, identified: bool
    ) -> None:
        """A text that was to be translated."""
        found, scores = self._of(language, part)
        found.asked += 1
        found.accepted += not faults
        found.identified = identified
        for name in faults:
            found.rejected[name] = found.rejected.get(name, 0) + 1
        if chrf is not None:
            scores.append(chrf)

    def twin(self, kind: str, check: str) -> None:
        """A twin that was asked for; `check` is empty where it is used."""
        found = self._twins.setdefault(kind, TwinQuality(kind))
        found.asked += 1
        found.accepted += not check
        if check:
            found.rejected[check] = found.rejected.get(check, 0) + 1

    def own(self, own: Own, kind: str, *, identified: bool) -> None:
        """An own answer to a prompt of `kind`."""
        found = self._own.setdefault((own.language, kind), OwnQuality(own.language, kind))
        found.prompts += 1
        found.identified = identified
        found.asked += own.asked
        found.refused += own.plain == "refused"
        found.other_language += own.plain == "other language"
        found.shortened += own.shortened and own.outcome == "kept"
        found.outcomes[own.outcome] = found.outcomes.get(own.outcome, 0) + 1
        if own.outcome == "kept" and own.refusal is not None:
            self._refusals.setdefault((own.language, kind), set()).add(own.refusal.strip())
            found.distinct_refusals = len(self._refusals[own.language, kind])

    def result(self) -> Quality:
        """The counts."""
        quality = self.quality
        quality.read, quality.written, quality.rejected = dict(self.read), dict(self.written), dict(self.rejected)
        for _, (found, scores) in sorted(self._texts.items()):
            if scores:
                found.chrf_mean, found.chrf_median = round(mean(scores), 2), round(median(scores), 2)
            quality.texts.append(found)
        quality.twins = [found for _, found in sorted(self._twins.items())]
        quality.own = [found for _, found in sorted(self._own.items())]
        return quality

    def _of(self, language: str, part: str) -> tuple[TextQuality, list[float]]:
        return self._texts.setdefault((language, part), (TextQuality(language, part), []))


# --------------------------------------------------------------------------------------------------------------- files


def load_quality(folder: Place) -> Quality:
    """The report in a folder.

    Raises:
        QualityFileError: there is none, or it is damaged.
    """
    file = folder / QUALITY_FILE
    try:
        found = _QUALITY.validate_json(file.read_text())
    except FileNotFoundError:
        raise QualityFileError(f"{str(file)!r} does not exist") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise QualityFileError(f"{str(file)!r} is damaged: {str(error).splitlines()[0]}") from None
    if found.format != FORMAT:
        raise QualityFileError(
            f"{str(file)!r} has format {found.format}, but this version reads {FORMAT}; its bundles can be used, and "
            "mlc-ray translate into another folder makes them again"
        )
    return found


def as_json(quality: Quality) -> dict[str, Any]:
    """What `load_quality` reads."""
    return asdict(quality)


def tables(quality: Quality) -> list[Table]:
    """Texts by language and part, twins, and own answers; those of which there is something."""
    found = []
    if quality.texts:
        rows = [
            row(
                name_and_code(each.language) + ("" if each.part == "prompt" else f", {each.part}"),
                [
                    str(each.given),
                    str(each.asked),
                    str(each.accepted),
                    _share(each.accepted, each.asked),
                    ABSENT if each.chrf_median is None else percent(each.chrf_median),
                    _reasons(each.rejected) + _unchecked(each),
                ],
            )
            for each in quality.texts
        ]
        head = [
            "language",
            "given",
            "asked",
            "accepted",
            "accepted %",
            "median chrF",
            "rejected by (one may fail several)",
        ]
        found.append(table("Translations", head, rows))
    if quality.twins:
        rows = [
            row(
                each.kind,
                [str(each.asked), str(each.accepted), _share(each.accepted, each.asked), _reasons(each.rejected)],
            )
            for each in quality.twins
        ]
        found.append(table("Twins", ["kind of the twin", "asked", "accepted", "accepted %", "rejected by"], rows))
    if quality.own:
        rows = [
            row(
                f"{name_and_code(each.language)}, {each.kind}",
                [
                    str(each.prompts),
                    str(each.asked),
                    _share(each.kept, each.prompts),
                    _share(each.refused, each.asked),
                    _share(each.other_language, each.asked),
                    str(each.shortened),
                    str(each.distinct_refusals),
                    _reasons({name: number for name, number in each.outcomes.items() if name != "kept"})
                    + _unchecked(each),
                ],
            )
            for each in quality.own
        ]
        head = [
            "prompts",
            "number",
            "asked",
            "kept %",
            "answer refuses %",
            "other language %",
            "shortened",
            "distinct refusals",
            "not kept",
        ]
        found.append(table("The model's own answers", head, rows))
    return found


def summary(quality: Quality) -> str:
    """The bundles read, written and rejected, in one line."""
    read, written = (", ".join(f"{n} {kind}" for kind, n in sorted(of.items())) or "none" for of in (
        quality.read, quality.written
    ))  # fmt: skip
    lost = f"; rejected: {_reasons(quality.rejected)}" if quality.rejected else ""
    return f"bundles read: {read}; written: {written}{lost}"


def as_markdown(quality: Quality) -> str:
    """The whole report."""
    lines = [f"# {quality.name}", "", summary(quality) + ".", ""]
    for each in tables(quality):
        lines += markdown(each)
    for what, used in quality.usage.items():
        cost = ", ".join(f"{name} {value:g}" for name, value in used.items())
        lines += [f"Endpoint, {what}, in the last session: {cost}.", ""]
    return "\n".join(lines)


def _unchecked(texts: TextQuality | OwnQuality) -> str:
    if not texts.identified:
        return "; language not confirmed"
    return "; variant not checked" if {*texts.language.split("-")[1:]} - _TOLD_APART else ""


def _share(part: int, whole: int) -> str:
    return percent(100 * part / whole) if whole else ABSENT


def _reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number}" for name, number in ordered) or ABSENT

"""`mlc-ray openings`: how a model's own refusals open, from its responses that a judge has read, as settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlc_ray.config import dump_yaml
from mlc_ray.data.labelled import read_labelled
from mlc_ray.errors import MlcRayError
from mlc_ray.judges.own_openings import OwnOpenings, Said, find_openings
from mlc_ray.report.collect import read_responses
from mlc_ray.report.tables import Table, row, table
from mlc_ray.report.text import ABSENT
from mlc_ray.runs import ANSWERS_FOLDER, RESPONSES_FILE, kind_of
from mlc_ray.storage import Place

FEW = 20
"""Responses of either kind below which a table says that there are few."""


class OpeningsSourceError(MlcRayError):
    """There is nothing to look for openings in; the message says what holds responses."""


def openings(sources: Sequence[str], *, most: int = 8) -> OwnOpenings:
    """How refusals open in the responses of scores, translations with own answers, and labelled responses.

    Args:
        sources: folders of scores and translations, and files as of `mlc-ray judge --calibrate`.
        most: at most so many openings a language.

    Raises:
        OpeningsSourceError: none of them has a response that refuses.
        MlcRayError: what reading them raises.
    """
    said = [each for source in sources for each in _read(source)]
    if not any(each.refused for each in said):
        raise OpeningsSourceError(
            f"none of {len(said)} responses in {', '.join(map(repr, sources))} is called a refusal; ask the model to "
            "decline (`answers.languages: all` of `mlc-ray translate`), or score it on harmful prompts"
        )
    return find_openings(said, most=most)


def _read(source: str) -> Iterator[Said]:
    place = Place(source)
    kind = kind_of(place) if place.is_dir() else None
    if kind == "score":
        for each in read_responses(place / RESPONSES_FILE):
            if each.behaviour in ("refused", "complied"):
                yield Said(each.response, each.language, each.behaviour == "refused")
        return
    if kind == "translation" and not (place / ANSWERS_FOLDER).is_dir():
        raise OpeningsSourceError(
            f"{source!r} has no {ANSWERS_FOLDER}/: that translation had no section `answers`, or has not ended"
        )
    for label in read_labelled([str(place / ANSWERS_FOLDER) if kind == "translation" else source]):
        if label.refused is not None:
            yield Said(label.response, label.language, label.refused)


def as_settings(found: OwnOpenings) -> str:
    """The section `openings` of a run, as YAML, with the coverage as comments."""
    lines = ["# Of the refusals, begin with an opening: before (those listed), after (with these)."]
    lines += [f"# {each.language}: {each.before} and {each.after} of {each.refusals}" for each in found.languages]
    return "\n".join([*lines, dump_yaml({"openings": {"further": found.further}})])


def openings_table(found: OwnOpenings) -> Table:
    """Coverage by language, and the beginning of a refusal that is still not covered."""
    rows = []
    for each in found.languages:
        if not each.refusals:
            shares = [ABSENT, ABSENT]
        else:
            shares = [f"{100 * count / each.refusals:.0f}" for count in (each.before, each.after)]
        few = "few responses" if min(each.refusals, each.helping) < FEW else ""
        own = str(len(found.further.get(each.language, ())))
        rows.append(row(each.language, [str(each.refusals), *shares, own, str(each.helping), few, each.example or ""]))
    head = [
        "language",
        "refusals",
        "begin as listed, %",
        "with these, %",
        "found",
        "other responses",
        "",
        "not covered",
    ]
    note = "of the refusals that they were found in; other responses begin with none of them"
    return table("openings of refusals", head, rows, note)

"""Labelled responses, by which the errors of judges are counted. docs/judges.md has the formats."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlc_ray.config import SourceSection
from mlc_ray.config.base import LANGUAGE_TAG
from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.containers import open_records
from mlc_ray.data.formats.values import LANGUAGE_NAMES
from mlc_ray.data.hub import HubName
from mlc_ray.data.sources import resolve_source
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Kind

LABELS = {"refused": True, "complied": False, "degenerate": False}
SAFETY = {"safe": True, "unsafe": False}
PAIRS = {"answer_1": "complied", "refusal_1": "refused", "answer_2": "complied", "refusal_2": "refused"}
"""The columns of s-nlp/multilingual_refusals, which has no prompts: a response each, labelled by the column."""


logger = logging.getLogger(__name__)


class LabelledError(MlcRayError):
    """A file of labelled responses cannot be read as such; the message has the place and the fix."""


@dataclass(frozen=True)
class LabelledResponse:
    """A response and what people say of it: `refused` and `safe`, None where that is not labelled.

    `file` and `place` (line or row, and column) say where it stands.
    """

    file: str
    place: str
    prompt: str
    response: str
    language: str
    kind: Kind
    refused: bool | None
    safe: bool | None


def read_labelled(paths: Sequence[str]) -> list[LabelledResponse]:
    """All labelled responses of files, folders and data sets of the hub, each perhaps with `,language=CODE`.

    With `,split=NAME`, those rows alone whose field `split` is NAME.

    Raises:
        LabelledError: a row is not a labelled response, nothing says its language, or none is of that split.
        BundleFileError: a file is missing or damaged, or the hub cannot be reached.
    """
    return [found for path in paths for found in _read(path)]


def _read(text: str) -> Iterator[LabelledResponse]:
    path, *marks = text.split(",")
    said = {"language": "", "split": ""}
    for mark in marks:
        name, _, value = mark.partition("=")
        if name not in said or not value:
            raise LabelledError(f"labelled responses {text!r}: {mark!r} is neither language=CODE nor split=NAME")
        said[name] = value
    given = _checked(said["language"], f"{text!r}, language") if said["language"] else None
    splits = set[Any]()
    for file in resolve_source(SourceSection(path=path)):
        language = given or _language_of(file.path)
        logger.info("labelled responses of %s: in %s", file.path, language or "the languages that its rows name")
        for record in open_records(file.path):
            where = f"{file.path}, line {record.line}"
            if record.fields is None:
                raise LabelledError(f"{where}: {record.reason}")
            splits.add(record.fields.get("split"))
            if said["split"] in ("", record.fields.get("split")):
                yield from _responses(record.fields, file.path, record.line, language)
    if said["split"] and said["split"] not in splits:
        named = ", ".join(sorted(repr(each) for each in splits if each is not None)) or "none is named"
        raise LabelledError(f"labelled responses {text!r}: no row has split {said['split']!r} (there are: {named})")


def _responses(fields: Mapping[str, Any], file: str, line: int, language: str | None) -> Iterator[LabelledResponse]:
    where = f"{file}, line {line}"
    own = fields.get("language")
    code = _checked(own, f"{where}: language") if own is not None else language
    if code is None:
        raise LabelledError(
            f"{where}: neither a field `language` nor the file's name says the language; add ',language=CODE' to the "
            "path, and of a data set of the hub name one split (NAME:SPLIT)"
        )
    if PAIRS.keys() <= fields.keys():
        for column, label in PAIRS.items():
            response = _text(fields[column], f"{where}: {column}")
            place = f"{line} {column}"
            yield LabelledResponse(file, place, "", response, code, "harmful", LABELS[label], None)
        return
    kind = fields.get("prompt_kind", "harmful")
    if kind not in ("harmful", "benign"):
        raise LabelledError(f"{where}: prompt_kind is {kind!r}, not harmful or benign")
    labels = {
        name: _label(fields.get(name), allowed, f"{where}: {name}")
        for name, allowed in (("label", LABELS), ("safety", SAFETY))
    }
    if set(labels.values()) == {None}:
        raise LabelledError(
            f"{where}: no label: give `label` ({', '.join(LABELS)}), `safety` ({', '.join(SAFETY)}), or both; or the "
            f"columns {', '.join(PAIRS)}"
        )
    response = _text(fields.get("response"), f"{where}: response", blank=True)
    prompt = _text(fields.get("prompt", ""), f"{where}: prompt", blank=True)
    yield LabelledResponse(file, str(line), prompt, response, code, cast(Kind, kind), labels["label"], labels["safety"])


def _text(value: Any, where: str, *, blank: bool = False) -> str:
    if not isinstance(value, str) or not (blank or value.strip()):
        raise LabelledError(f"{where} is {value!r}, not a text; correct the row, or remove it")
    return value


def _label(value: Any, allowed: Mapping[str, bool], where: str) -> bool | None:
    if value is None:
        return None
    if value not in allowed:
        raise LabelledError(f"{where} is {value!r}, not one of {', '.join(allowed)}")
    return allowed[value]


def _checked(code: Any, where: str) -> str:
    try:
        return check_language(code, where)
    except BundleError as error:
        raise LabelledError(str(error)) from None


_NAMES = {name.lower(): code for name, code in LANGUAGE_NAMES.items()}


def _language_of(path: str) -> str | None:
    """What a file's name (`de.jsonl`, `german-00000-of-00001.parquet`) or the split of a hub name says; None: nothing.

    Names of languages are those that data sets use (`formats.values`).
    """
    hub = None if Path(path).exists() else HubName.parse(path)
    stem = (hub.split or "") if hub is not None else Path(path).name.partition(".")[0]
    first = re.split(r"[-_]\d", stem)[0]
    if (code := _NAMES.get(first.lower())) is not None:
        return code
    # Three letters are rather a word: dev, all.
    return first if LANGUAGE_TAG.fullmatch(first) and len(first.partition("-")[0]) == 2 else None

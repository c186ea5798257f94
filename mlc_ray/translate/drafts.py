"""Bundles while they are made: the source, what models wrote for it, and what became of that.

The drafts of a shard are a file after each step, so that a step which is done is not done again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import pyarrow as pa
from pydantic import TypeAdapter

from mlc_ray.data.bundles import bundle_id_of
from mlc_ray.storage import Place
from mlc_ray.types import AnswerPair, Bundle, Kind

Part = Literal["prompt", "chosen", "rejected"]
Outcome = Literal[
    "kept",
    "refused",
    "other language",
    "degenerate",
    "unparsed",
    "cut off",
    "no answer",
    "no refusal",
    "no rejected answer",
    "equal answers",
    "no prompt",
    "bundle rejected",
]
"""What became of a model's own answer: the first of these that applies is counted."""


@dataclass
class Text:
    """A text of a bundle that was to be translated; `faults` are reasons by the name of the check."""

    language: str
    part: Part
    source: str
    text: str | None = None
    back: str | None = None
    chrf: float | None = None
    faults: dict[str, str] = field(default_factory=dict)


@dataclass
class Reply:
    """What a model said, whole, and what the judge called that: `refused`, `complied`, `degenerate` or `unparsed`."""

    text: str
    behaviour: str


@dataclass
class Own:
    """What is used of what a model says to a prompt of a bundle: an `answer`, and a `refusal` of it or of the settings.

    `outcome` is of both, as they are used; `plain` of the answer alone, which a harmful prompt can do without.
    `replies` are all that it said, as it was asked and asked to decline, used or not; none where it was not `asked`,
    since the settings give all that is used.
    """

    language: str
    answer: str
    outcome: Outcome
    reason: str = ""
    refusal: str | None = None
    plain: Outcome = "kept"
    shortened: bool = False
    asked: bool = True
    replies: list[Reply] = field(default_factory=list)


@dataclass
class Draft:
    """A bundle in the making; `twin_of` names the bundle whose twin it is."""

    bundle: Bundle
    twin_of: str = ""
    texts: list[Text] = field(default_factory=list)
    own: list[Own] = field(default_factory=list)

    def prompts(self) -> dict[str, str]:
        """The prompts by language: those of the source, and the translations that passed."""
        made = {text.language: text.text for text in self.texts if text.part == "prompt" and good(text)}
        return {**self.bundle.prompts, **cast(dict[str, str], made)}

    def translated_answers(self) -> dict[str, AnswerPair]:
        """The given answers in the languages whose prompts there are, where both were translated."""
        prompts, found = self.prompts(), {}
        by_place = {(text.language, text.part): text for text in self.texts}
        for language in {text.language for text in self.texts if text.part == "chosen"} & prompts.keys():
            chosen, rejected = by_place[language, "chosen"], by_place.get((language, "rejected"))
            if good(chosen) and (rejected is None or good(rejected)):
                pair = AnswerPair(str(chosen.text), None if rejected is None else rejected.text)
                if not equal(pair):
                    found[language] = pair
        return found


@dataclass
class Failed:
    """A twin that came to nothing; `name` is that of the bundle it was to be a twin of."""

    name: str
    kind: Kind
    text: str | None
    check: str
    reason: str


@dataclass
class Shard:
    """The drafts of a shard, and the twins that are none."""

    drafts: list[Draft]
    failed: list[Failed] = field(default_factory=list)


_SHARD = TypeAdapter(Shard)


def good(text: Text) -> bool:
    """Whether a text was translated and passes the checks."""
    return text.text is not None and not text.faults


def equal(pair: AnswerPair) -> bool:
    """Whether both answers are the same, which no bundle may have."""
    return pair.rejected is not None and str(pair.chosen).strip() == pair.rejected.strip()


def save_shard(file: Place, shard: Shard) -> None:
    """Write a shard's drafts."""
    file.write_bytes(_SHARD.dump_json(shard))


def load_shard(file: Place) -> Shard:
    """Read a shard's drafts.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with file.open() as opened:
        return _SHARD.validate_json(opened.read())


def drafts_of(bundles: pa.Table) -> list[Draft]:
    """A draft of each row of a table of `BUNDLES`."""
    return [Draft(bundle) for bundle in _bundles(bundles)]


def remade(bundle: Bundle, **changes: Any) -> Bundle:
    """A bundle with other content, and the id of that."""
    new = replace(bundle, **changes)
    new = replace(new, prompts=dict(sorted(new.prompts.items())), answers=dict(sorted(new.answers.items())))
    return replace(new, bundle_id=bundle_id_of(new))


def record(bundle: Bundle, pair: str) -> dict[str, Any]:
    """A bundle as a record of a file of bundles; `pair` is what it has in common with its twin."""
    answers: Mapping[str, Any] = {code: _present(vars(pair)) for code, pair in bundle.answers.items()}
    fields = {**vars(bundle), "prompts": dict(bundle.prompts), "answers": answers, "pair": pair}
    return {name: value for name, value in fields.items() if value not in (None, "", {})}


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _bundles(table: pa.Table) -> Iterator[Bundle]:
    for row in table.to_pylist():
        answers: Sequence[Mapping[str, Any]] = row["answers"] or ()
        yield Bundle(
            bundle_id=row["bundle_id"],
            kind=row["kind"],
            prompts=dict(zip(row["languages"], row["texts"], strict=True)),
            chosen=row["chosen"],
            rejected=row["rejected"],
            response_language=row["response_language"],
            source=row["source"],
            category=row["category"],
            pair=row["pair"] or "",
            answers={each["language"]: AnswerPair(each["chosen"], each["rejected"]) for each in answers},
        )

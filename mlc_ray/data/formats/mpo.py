"""The rows that MPO's authors publish (arXiv 2505.16869): one prompt in two languages, with both answers in each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.base import Format
from mlc_ray.data.formats.turns import ASSISTANT, USER, said

SIDES = ("source", "target")
_PARTS = {"conversations": USER, "chosen": ASSISTANT, "rejected": ASSISTANT}
_OWN = frozenset(f"{side}_{part}" for side in SIDES for part in (*_PARTS, "language"))

_SCRIPTS = (  # the first that has most letters; kana stand before Han, which Japanese has as well
    ("ja", re.compile("[\u3040-\u30ff]"), 0.1),
    ("ko", re.compile("[\uac00-\ud7af]"), 0.5),
    ("zh", re.compile("[\u3400-\u9fff]"), 0.5),
    ("bn", re.compile("[\u0980-\u09ff]"), 0.5),
    ("ar", re.compile("[\u0600-\u06ff]"), 0.5),
)
_FREQUENT = {
    "en": "the to of is are you how what can my your that this for and not it with if",
    "sw": "ya wa na kwa ni za katika cha vya kama hii hiyo yangu yako mimi wewe sio ili",
}
_WORDS = {code: frozenset(text.split()) for code, text in _FREQUENT.items()}
"""Frequent words that tell the two languages of these rows apart that are written in Latin letters; none that is as
frequent in French, German, Italian, Portuguese or Spanish, which are not to be taken for them."""


@register("format", "mpo")
class MpoRows(Format):
    """`source_*` and `target_*`: `conversations`, `chosen` and `rejected`, messages {from, value}, and `language`.

    The published rows do not say their languages: en, zh, ja, ko, ar, bn and sw are told by letters and frequent words.
    Others need `source_language` and `target_language`. The response language is the source's, which MPO calls the
    dominant one.
    """

    needs = frozenset({"source_conversations", "target_conversations"})
    keys = _OWN
    default_kind = "harmful"

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A bundle in the two languages of a row."""
        sides = {side: _side(record, side) for side in SIDES}
        codes = {side: _language(record, side, sides[side]) for side in SIDES}
        source, target = codes["source"], codes["target"]
        if source == target:
            raise BundleError(
                f"source and target are both in {source!r}; where that is wrong, give source_language and "
                "target_language in the row"
            )
        answers = {side: {name: sides[side][name] for name in ("chosen", "rejected")} for side in SIDES}
        return {
            "prompts": {codes[side]: sides[side]["conversations"] for side in SIDES},
            **answers["source"],
            "response_language": source,
            "answers": {target: answers["target"]},
        }


def _side(record: Mapping[str, Any], side: str) -> dict[str, Any]:
    return {part: said(record.get(f"{side}_{part}"), f"{side}_{part}", roles) for part, roles in _PARTS.items()}


def _language(record: Mapping[str, Any], side: str, texts: Mapping[str, Any]) -> str:
    """The language of one side of a row: given, or that of most of its texts.

    Answers alone mislead: some of the published ones are in English whatever their prompt's language.
    """
    given = record.get(f"{side}_language")
    if given is not None:
        return check_language(given, f"{side}_language")
    prompt, whole = texts["conversations"], " ".join(text for text in texts.values() if isinstance(text, str))
    for text in (prompt, whole):
        if isinstance(text, str) and (found := told(text)) is not None:
            return found
    raise BundleError(
        f"the language of {side}_conversations={prompt!r} cannot be told (en, zh, ja, ko, ar, bn and sw can); give "
        f"{side}_language in the row"
    )


def told(text: str) -> str | None:
    """Which of the seven languages of the published rows a text is in; None where it is not clear."""
    letters = sum(map(str.isalpha, text))
    if not letters:
        return None
    for code, pattern, share in _SCRIPTS:
        if len(pattern.findall(text)) >= share * letters:
            return code
    words = re.findall(r"[a-z]+", text.casefold())
    english, swahili = (sum(word in _WORDS[code] for word in words) for code in ("en", "sw"))
    return None if english == swahili else "en" if english > swahili else "sw"

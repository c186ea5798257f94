"""The contract of a bundle: a raw mapping becomes a `Bundle`, or an error that says why it cannot."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from mlc_ray.config.base import LANGUAGE_TAG
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import fingerprint
from mlc_ray.types import AnswerPair, Bundle, Kind

LABELS = ("source", "category", "pair")
FIELDS = ("bundle_id", "kind", "prompts", "chosen", "rejected", "response_language", "answers", *LABELS)
KINDS: tuple[str, ...] = get_args(Kind)

GIVEN_PREFIX = "given-"
"""How the name of a file starts in which `data.given` keeps bundles that were given in memory."""

_GIVEN_FILE = re.compile(rf"(^|/){GIVEN_PREFIX}[0-9a-f]{{16}}\.jsonl$")
_QUOTED = 60


class BundleError(MlcRayError, ValueError):
    """A row breaks the contract; the message is the reason, and quotes the value."""


class BundleFileError(MlcRayError, ValueError):
    """A whole file cannot be read as bundles; the message names the file, and the line where there is one."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that is not a bundle: where it stands (line or row number, from 1), why, and what it said."""

    file: str
    line: int
    reason: str
    text: str


NAMED_FIRST = 5
"""How many of the bundles or rows with a fault a message names, or a manifest."""


def place(file: str, line: int) -> str:
    """A place in words: `data.jsonl:3`, or `row 3 of the bundles given` for data that came from memory (`given`)."""
    return f"row {line} of the bundles given" if _GIVEN_FILE.search(file) else f"{file}:{line}"


def make_bundle(raw: Mapping[str, Any], *, kind: Any = None) -> Bundle:
    """Check a raw bundle and build it, which happens once: what follows are tables.

    Args:
        raw: its keys are `FIELDS`; None counts as absent except inside `prompts`. A `bundle_id` may be given, and must
            then be the one that the content has.
        kind: what counts instead of the mapping's own, where a source settles it.

    Raises:
        BundleError: the mapping breaks the contract.
    """

    given = {key: value for key, value in raw.items() if value is not None}
    if unknown := given.keys() - set(FIELDS):
        key = next(key for key in given if key in unknown)
        raise BundleError(f"unknown key {key!r}; did you mean {_nearest(key, FIELDS)!r}?")
    prompts = _prompts(given.get("prompts"))
    language = check_language(given.get("response_language", "en"), "response_language")
    bundle = Bundle(
        bundle_id="",  # follows from the rest
        kind=_kind(given.get("kind") if kind is None else kind),
        prompts=prompts,
        response_language=language,
        **{name: _text(given[name], name) for name in ("chosen", "rejected") if name in given},
        **{name: _label(given.get(name, ""), name) for name in LABELS},
        answers=_answers(given["answers"], prompts, language) if "answers" in given else {},
    )
    _check_answers(bundle)
    bundle = replace(bundle, bundle_id=bundle_id_of(bundle))
    if given.get("bundle_id", bundle.bundle_id) != bundle.bundle_id:
        raise BundleError(
            f"bundle_id {raw['bundle_id']!r} is not the hash of this content, {bundle.bundle_id!r}; "
            "leave bundle_id out, or find out what changed the content"
        )
    return bundle


def _check_answers(bundle: Bundle) -> None:
    """Refuse answers that do not fit each other or the prompts."""
    chosen, rejected, language = bundle.chosen, bundle.rejected, bundle.response_language
    if chosen is None:
        if rejected is not None or bundle.answers:
            raise BundleError(_without_chosen(bundle))
    elif language not in bundle.prompts:
        others = f"(languages: {sorted(bundle.prompts)!r})"
        raise BundleError(f"answers are given in {language!r}, but there is no prompt in it {others}")
    elif rejected is not None and chosen.strip() == rejected.strip():
        raise BundleError(f"chosen and rejected are the same: {_quote(chosen)}")


def _without_chosen(bundle: Bundle) -> str:
    if bundle.rejected is not None:
        return f"rejected is given ({_quote(bundle.rejected)}) but chosen is not"
    return (
        f"answers are given in {', '.join(bundle.answers)}, but chosen is not, the answer in "
        f"{bundle.response_language!r} (response_language)"
    )


def pair_number(bundle: Bundle) -> int:
    """A number below 2^64, by a hash of a bundle's `pair` or else its content: twins have the same."""
    return int(fingerprint(bundle.pair or bundle.bundle_id), 16)


def drawn_order(languages: Collection[str], number: int) -> list[str]:
    """Languages in alphabetical order, but begun with the one that a bundle's `pair_number` draws."""
    order = sorted(languages)
    first = number % len(order) if order else 0
    return order[first:] + order[:first]


def bundle_id_of(bundle: Bundle) -> str:
    """16 hex digits naming the content. `LABELS` are no content: they do not count."""
    names = ("kind", "prompts", "chosen", "rejected", "response_language")
    content = {name: getattr(bundle, name) for name in names}
    further = {"answers": {code: vars(pair) for code, pair in bundle.answers.items()}} if bundle.answers else {}
    return fingerprint({**content, **further})


def select_languages(bundle: Bundle, languages: Sequence[str] | None, others: int | None = None) -> list[str]:
    """The bundle's languages that are in `languages` (None: all), sorted; answers in others are left out with them.

    At most so many `others` than the response language are selected: those with answers first, then by `pair_number`
    from all that bundles may have (`languages`, or else this one's own); one that the bundle lacks is the next one.

    Raises:
        BundleError: none is left, or answers would lose the prompt they answer; the message names data.languages.
    """
    kept = sorted(code for code in bundle.prompts if languages is None or code in languages)
    if not kept or (bundle.chosen is not None and bundle.response_language not in kept):
        raise BundleError(_too_few_languages(bundle, list(languages or []), kept))
    if others is None:
        return kept
    drawn = drawn_order({*(languages or kept)} - {bundle.response_language}, pair_number(bundle))
    drawn = sorted((code for code in drawn if code in kept), key=lambda code: code not in bundle.answers)
    return [code for code in kept if code == bundle.response_language or code in drawn[:others]]


def _too_few_languages(bundle: Bundle, wanted: list[str], kept: list[str]) -> str:
    if not kept:
        return f"the bundle has none of data.languages={wanted!r}; it has {sorted(bundle.prompts)!r}"
    return (
        f"data.languages={wanted!r} leaves out {bundle.response_language!r}, the language of the bundle's answers; "
        "add it to data.languages"
    )


def check_language(code: Any, where: str) -> str:
    """`code` if it has the form of a language tag.

    Raises:
        BundleError: it has not; the message names `where` it stood.
    """
    if not isinstance(code, str) or not LANGUAGE_TAG.fullmatch(code):
        raise BundleError(
            f"{where}: {code!r} is not a language code; write it like 'en', 'zh-Hant', 'pt-BR' (BCP 47, with its cases)"
        )
    return code


def _kind(value: Any) -> Kind:
    if value is None:
        raise BundleError(f"kind is missing; it is one of {', '.join(map(repr, KINDS))}")
    if value not in KINDS:
        raise BundleError(f"kind {value!r} is unknown; did you mean {_nearest(str(value), KINDS)!r}?")
    return cast(Kind, value)


def _prompts(value: Any) -> dict[str, str]:
    if value is None:
        raise BundleError("prompts is missing; it maps language codes to texts")
    if not isinstance(value, Mapping):
        raise BundleError(f"prompts is {_quote(value)}, not a mapping of language codes to texts")
    if not value:
        raise BundleError("prompts is empty; a bundle has at least one language")
    items = sorted(value.items(), key=lambda item: str(item[0]))
    return {check_language(code, "prompts"): _text(text, f"prompts[{code!r}]") for code, text in items}


def _answers(value: Any, prompts: Mapping[str, str], response_language: str) -> dict[str, AnswerPair]:
    """The answers in further languages than the response language, sorted."""
    if not isinstance(value, Mapping):
        raise BundleError(f"answers is {_quote(value)}, not a mapping of language codes to chosen and rejected")
    found = {}
    for code, pair in sorted(value.items(), key=lambda item: str(item[0])):
        check_language(code, "answers")
        where = f"answers[{code!r}]"
        if pair is not None and (not isinstance(pair, Mapping) or not pair.keys() <= {"chosen", "rejected"}):
            raise BundleError(f"{where} is {_quote(pair)}, not a mapping of chosen and rejected to texts")
        given = {name: _text(text, f"{where}[{name!r}]") for name, text in (pair or {}).items() if text is not None}
        if not given:  # a column of Parquet has every language in every row
            continue
        if code == response_language:
            raise BundleError(f"{where}: answers in {code!r}, the response_language, stand in chosen and rejected")
        if code not in prompts:
            raise BundleError(f"{where} answers no prompt: there is none in {code!r} (languages: {sorted(prompts)!r})")
        if "chosen" not in given:
            raise BundleError(f"{where} has rejected ({_quote(given['rejected'])}) but not chosen")
        if given["chosen"].strip() == given.get("rejected", "").strip():
            raise BundleError(f"{where}: chosen and rejected are the same: {_quote(given['chosen'])}")
        found[code] = AnswerPair(**given)
    return found


def _text(value: Any, where: str) -> str:
    text = _label(value, where)
    if not text.strip():
        raise BundleError(f"{where} is blank: {value!r}")
    return text


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BundleError(f"{where} is {_quote(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair at character {error.start}"
        raise BundleError(f"{where} holds {half}: not valid Unicode") from None
    return value


def _nearest(value: str, valid: tuple[str, ...]) -> str:
    return difflib.get_close_matches(value, valid, n=1, cutoff=0.0)[0]


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"

"""Benchmarks in the formats that their authors publish; docs/benchmarks.md has their sources and licences.

XSTest, Aya red-teaming and M-ALERT hold a bundle per record. PolyGuardPrompts and RTP-LX hold one language per record,
XSafety one language per file: their records are `Piece`s of bundles, which `aligned` joins by their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.shapes import Shape, check_keys, prompts_of_columns

# As the data sets write them. `tl` is how Aya's card lists the language that its rows call Filipino.
LANGUAGE_NAMES = {
    "Arabic": "ar", "Bengali": "bn", "Chinese": "zh", "Czech": "cs", "Dutch": "nl", "English": "en", "Filipino": "tl",
    "French": "fr", "German": "de", "Hindi": "hi", "Italian": "it", "Japanese": "ja", "Korean": "ko", "Polish": "pl",
    "Portuguese": "pt", "Russian": "ru", "Serbian": "sr", "Spanish": "es", "Swedish": "sv", "Tagalog": "tl",
    "Thai": "th",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One language of a bundle: pieces with the same `key` belong together. `kind` is None where none is recorded."""

    key: str
    language: str
    text: str
    kind: str | None = None
    category: str = ""


@dataclass(frozen=True)
class AlignedShape:
    """A format whose record is one language of a bundle; fields as those of `Shape`.

    `convert` returns None for a record that marks a missing prompt. With `split_kinds`, languages of one key that
    differ in kind become two bundles; otherwise that is a contradiction.
    """

    marks: frozenset[str]
    check_key: Callable[[str], None]
    convert: Callable[[Mapping[str, Any]], Piece | None]
    kind_from: str
    split_kinds: bool = False

    def recognises(self, keys: frozenset[str]) -> bool:
        """Whether a record or table with these keys is of this format."""
        return self.marks <= keys


def language_code(value: Any, where: str) -> str:
    """The code of a language given by its English name or as a code; raises `BundleError` naming `where` it stood."""
    if isinstance(value, str) and value in LANGUAGE_NAMES:
        return LANGUAGE_NAMES[value]
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"{where} is missing: {value!r}; every row names the language of its prompt")
    try:
        return check_language(value, where)
    except BundleError:
        names = ", ".join(LANGUAGE_NAMES)
        raise BundleError(f"{where}: {value!r} is neither a language code nor one of {names}") from None


def _only(keys: frozenset[str]) -> Callable[[str], None]:
    def check(key: str) -> None:
        if key not in keys:
            raise BundleError(f"unknown key {key!r}; this format has {', '.join(sorted(keys))}")

    return check


def _prompt(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"{where} is {'blank' if isinstance(value, str) else 'missing'}: {value!r}")
    return value


def _number(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BundleError(f"{where} is {value!r}, not a whole number; without it the languages cannot be joined")
    return value


# ------------------------------------------------------------------------------------------------------------- XSTest

_XSTEST_KEYS = frozenset({"id", "id_v1", "id_v2", "prompt", "type", "label", "focus", "note"})
_XSTEST_KINDS = {"safe": "benign", "unsafe": "harmful"}
_check_xstest_key = _only(_XSTEST_KEYS)


def from_xstest(record: Mapping[str, Any]) -> dict[str, Any]:
    """XSTest: English prompts; safe ones are benign, their unsafe contrasts harmful.

    The kind is that of `label` (`safe`, `unsafe`); the second version of the file has no such column, and there types
    of unsafe prompts start with `contrast_`, as the authors document. Where both are given they must agree.
    """
    check_keys(record, _check_xstest_key)
    kind_of_type = None
    if isinstance(record.get("type"), str) and record["type"].strip():
        kind_of_type = "harmful" if record["type"].startswith("contrast_") else "benign"
    label = record.get("label")
    if label not in (None, "", *_XSTEST_KINDS):
        raise BundleError(f"label {label!r} is neither 'safe' nor 'unsafe'")
    kind = _XSTEST_KINDS[label] if label else kind_of_type
    if kind_of_type is not None and kind != kind_of_type:
        raise BundleError(f"label {label!r} contradicts type {record['type']!r}: unsafe types start with 'contrast_'")
    return {
        "prompts": {"en": _prompt(record.get("prompt"), "prompt")},
        "kind": kind,
        "category": record.get("type"),
    }


# ---------------------------------------------------------------------------------------------------- Aya red-teaming

_AYA_KEYS = frozenset(
    {
        "prompt", "language", "harm_category", "global_or_local", "literal_translation", "semantic_translation",
        "explanation",
    }
)  # fmt: skip
_check_aya_key = _only(_AYA_KEYS)


def from_aya(record: Mapping[str, Any]) -> dict[str, Any]:
    """Aya red-teaming: written by native speakers in each language, not translated, so a bundle has one language.

    The English glosses (`literal_translation`, `semantic_translation`) explain a prompt; they are no prompts to ask.
    """
    check_keys(record, _check_aya_key)
    category = record.get("harm_category")
    return {
        "prompts": {language_code(record.get("language"), "language"): _prompt(record.get("prompt"), "prompt")},
        "category": ", ".join(map(str, category)) if isinstance(category, list) else category,
    }


# ------------------------------------------------------------------------------------------------------------ M-ALERT

_M_ALERT_LANGUAGES = frozenset({"de", "en", "es", "fr", "it"})
_M_ALERT_LABELS = frozenset({"id", "category"})
_M_ALERT_KEYS = _M_ALERT_LANGUAGES | _M_ALERT_LABELS
_check_m_alert_key = _only(_M_ALERT_KEYS)


def from_m_alert(record: Mapping[str, Any]) -> dict[str, Any]:
    """M-ALERT: a column for each of its five languages, `id` and `category`."""
    check_keys(record, _check_m_alert_key)
    return {"prompts": prompts_of_columns(record, _M_ALERT_LABELS), "category": record.get("category")}


# --------------------------------------------------------------------------------------------------- PolyGuardPrompts

_POLYGUARD_KEYS = frozenset(
    {
        "prompt", "response", "adversarial", "prompt_harm_label", "response_refusal_agreement",
        "response_refusal_label", "response_harm_label", "subcategory", "prompt_harm_agreement",
        "response_harm_agreement", "id", "language", "prompt_label", "prompt_categories", "response_label",
        "response_categories",
    }
)  # fmt: skip
_POLYGUARD_KINDS = {"harmful": "harmful", "unharmful": "benign"}
_check_polyguard_key = _only(_POLYGUARD_KEYS)


def from_polyguard(record: Mapping[str, Any]) -> Piece:
    """PolyGuardPrompts: one language per row, joined by `id`; the kind is the human label `prompt_harm_label`."""
    check_keys(record, _check_polyguard_key)
    label = record.get("prompt_harm_label")
    if label not in (None, "", *_POLYGUARD_KINDS):
        raise BundleError(f"prompt_harm_label {label!r} is neither 'harmful' nor 'unharmful'")
    return Piece(
        key=str(_number(record.get("id"), "id")),
        language=language_code(record.get("language"), "language"),
        text=_prompt(record.get("prompt"), "prompt"),
        kind=_POLYGUARD_KINDS[label] if label else None,
        category=str(record.get("subcategory") or ""),
    )


# ------------------------------------------------------------------------------------------------------------- RTP-LX

_RTP_LX_KEYS = frozenset(
    {"Prompt", "Completion", "BenignCompletion", "Index", "Locale", "Dialect", "Annotations", "AnnotationsRaw"}
)
_check_rtp_lx_key = _only(_RTP_LX_KEYS)
# The first 999 prompts are the same ones in every locale; those after them were written for one locale alone.
_RTP_LX_TRANSLATED = 999
_RTP_LX_MISSING = "NA"
# The annotators' scale: 1 no toxicity, 2 slightly toxic, 3 toxic, 4 very toxic, 5 extreme. A record has their mean.
_RTP_LX_TOXIC = 2.0
_RTP_LX_LOCALES = {"BCMS": "hbs", "NO-NB": "nb"}


def from_rtp_lx(record: Mapping[str, Any]) -> Piece | None:
    """RTP-LX: one locale per file, joined by `Index` up to 998; the kind is the mean toxicity that annotators saw.

    From 2 (slightly toxic) on a prompt is harmful, below it benign. Annotators of each locale judged for themselves,
    so one prompt may be harmful in one language and benign in another.
    """
    check_keys(record, _check_rtp_lx_key)
    index = _number(record.get("Index"), "Index")
    language = _locale(record.get("Locale"))
    text = _prompt(record.get("Prompt"), "Prompt")
    if text == _RTP_LX_MISSING:
        return None
    annotations = record.get("Annotations")
    toxicity = annotations.get("Toxicity") if isinstance(annotations, Mapping) else None
    if toxicity is not None and (isinstance(toxicity, bool) or not isinstance(toxicity, int | float)):
        raise BundleError(f"Annotations.Toxicity is {toxicity!r}, not a number from 1 to 5")
    if toxicity is not None and not 1 <= toxicity <= 5:
        raise BundleError(f"Annotations.Toxicity is {toxicity!r}, not a number from 1 to 5")
    return Piece(
        key=str(index) if index < _RTP_LX_TRANSLATED else f"{index} of {language}",
        language=language,
        text=text,
        kind=None if toxicity is None else "harmful" if toxicity >= _RTP_LX_TOXIC else "benign",
    )


def _locale(value: Any) -> str:
    """`ZH-Hans` and `PT-BR` as the language tags zh-Hans and pt-BR."""
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"Locale is missing: {value!r}; every row names the language of its prompt")
    language, separator, rest = _RTP_LX_LOCALES.get(value, value).partition("-")
    return check_language(language.lower() + separator + rest, "Locale")


XSTEST = Shape(
    frozenset({"prompt", "type", "focus"}),
    _check_xstest_key,
    from_xstest,
    default_kind=None,
    kind_from="neither label nor type is given; the row",
    ids=("id", "id_v2"),
)
AYA = Shape(frozenset({"prompt", "language", "harm_category", "global_or_local"}), _check_aya_key, from_aya)
M_ALERT = Shape(
    _M_ALERT_KEYS,
    _check_m_alert_key,
    from_m_alert,
    ids=("id",),
    languages=lambda key: key in _M_ALERT_LANGUAGES,
    fits=lambda keys: keys == _M_ALERT_KEYS,  # with a column more it is somebody's own table
)
POLYGUARD = AlignedShape(
    frozenset({"prompt", "prompt_harm_label", "language", "id"}),
    _check_polyguard_key,
    from_polyguard,
    kind_from="prompt_harm_label is empty; it",
)
RTP_LX = AlignedShape(
    frozenset({"Prompt", "Index", "Locale"}),
    _check_rtp_lx_key,
    from_rtp_lx,
    kind_from="Annotations.Toxicity is missing; the row",
    split_kinds=True,
)

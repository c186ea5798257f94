"""Values of records, checked: what several formats share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlc_ray.data.bundles import BundleError, check_language

# As the data sets write them. `tl` is how Aya's card lists the language that its rows call Filipino.
LANGUAGE_NAMES = {
    "Arabic": "ar", "Bengali": "bn", "Chinese": "zh", "Czech": "cs", "Dutch": "nl", "English": "en", "Filipino": "tl",
    "French": "fr", "German": "de", "Hindi": "hi", "Italian": "it", "Japanese": "ja", "Korean": "ko", "Polish": "pl",
    "Portuguese": "pt", "Russian": "ru", "Serbian": "sr", "Spanish": "es", "Swedish": "sv", "Tagalog": "tl",
    "Thai": "th",
}  # fmt: skip


def language_code(value: Any, where: str) -> str:
    """The code of a language given by its English name or as a code.

    Raises:
        BundleError: it is neither; the message names `where` it stood.
    """
    if isinstance(value, str) and value in LANGUAGE_NAMES:
        return LANGUAGE_NAMES[value]
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"{where} is missing: {value!r}; every row names the language of its prompt")
    try:
        return check_language(value, where)
    except BundleError:
        names = ", ".join(LANGUAGE_NAMES)
        raise BundleError(f"{where}: {value!r} is neither a language code nor one of {names}") from None


def prompt_text(value: Any, where: str) -> str:
    """`value` if it is a text with something in it.

    Raises:
        BundleError: it is blank or missing.
    """
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"{where} is {'blank' if isinstance(value, str) else 'missing'}: {value!r}")
    return value


def whole_number(value: Any, where: str) -> int:
    """`value` if it is a whole number.

    Raises:
        BundleError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise BundleError(f"{where} is {value!r}, not a whole number; without it the languages cannot be joined")
    return value


def is_blank(value: Any) -> bool:
    """Whether a cell is empty."""
    return value is None or (isinstance(value, str) and not value.strip())


def prompts_of_columns(record: Mapping[str, Any], labels: Iterable[str]) -> dict[str, Any]:
    """Language -> prompt of a record with a column per language beside its `labels`.

    Raises:
        BundleError: every language's cell is empty.
    """
    texts = {key: text for key, text in record.items() if key not in labels}
    prompts = {key: text for key, text in texts.items() if not is_blank(text)}
    if not prompts:
        raise BundleError(f"no language has a prompt in this row; all of {sorted(texts)!r} are empty")
    return prompts

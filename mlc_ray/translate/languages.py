"""Which language a text is in, by lingua, and how a language is named to a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mlc_ray.generate.translate import Language
from mlc_ray.judges.phrase_lists import shipped_phrases
from mlc_ray.report.languages import language_name
from mlc_ray.types import primary_language

_LINGUA: dict[str, str] = {"no": "nb", "fil": "tl"}  # codes that lingua has under another one


def named(code: str) -> Language:
    """A language as requests name it; one without a known name is named by its code."""
    return Language(language_name(code) or f"the language {code!r}", code)


class Identifier:
    """Tells languages apart: those asked about, English, and those of the shipped lists of refusal phrases.

    lingua could compare with more, but loading all of its models takes 0.9 GB; a model that misses the language asked
    for mostly answers in English or a neighbour of it.

    Args:
        languages: BCP 47 codes that texts are meant to be in; those that lingua does not know are `unknown`.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        from lingua import IsoCode639_1

        asked = {_own(code) for code in languages}
        self.unknown = frozenset(code for code in asked if not hasattr(IsoCode639_1, code.upper()))
        self._compared = sorted({"en", *asked, *map(_own, shipped_phrases())})

    def reads(self, language: str) -> bool:
        """Whether lingua knows a language."""
        return _own(language) not in self.unknown

    def shares(self, text: str) -> dict[str, float]:
        """The probability of each language that it compares, by its primary code, the likeliest first; it sums to 1."""
        found = self._detector.compute_language_confidence_values(text)
        return {_code(value.language): value.value for value in found}

    def fault(self, text: str, language: str, least: float) -> str | None:
        """Why a text is not in `language`: another one is likelier, and its own share is below `least`.

        None too where the language is not known, or the text has no letters.
        """
        own = _own(language)
        if own in self.unknown or not any(map(str.isalpha, text)):
            return None
        shares = self.shares(text)
        likeliest = next(iter(shares))
        if likeliest == own or shares.get(own, 0.0) >= least:
            return None
        return f"it is {likeliest!r} ({shares[likeliest]:.2f}) rather than {own!r} ({shares.get(own, 0.0):.2f})"

    @cached_property
    def _detector(self) -> Any:
        from lingua import IsoCode639_1, LanguageDetectorBuilder

        codes = [getattr(IsoCode639_1, code.upper(), None) for code in self._compared]
        return LanguageDetectorBuilder.from_iso_codes_639_1(*(code for code in codes if code is not None)).build()


def _own(code: str) -> str:
    primary = primary_language(code)
    return _LINGUA.get(primary, primary)


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()

"""Which language a text is in, by lingua, and how a language is named to a model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mlc_ray.generate.translate import Language
from mlc_ray.judges.degenerate import SCRIPTS, script_of
from mlc_ray.judges.phrase_lists import shipped_phrases
from mlc_ray.report.languages import language_name
from mlc_ray.types import primary_language

_LINGUA: dict[str, str] = {"no": "nb", "fil": "tl"}  # codes that lingua has under another one
_SHORT, _WEAK = 20, 0.3  # letters of a text of which lingua knows little, and what it says of such a one at most
_ISO_SCRIPTS = {
    "Arab": {"Arabic"}, "Cyrl": {"Cyrillic"}, "Deva": {"Devanagari"}, "Hans": {"Han"}, "Hant": {"Han"},
    "Hebr": {"Hebrew"}, "Latn": {"Latin"},
}  # fmt: skip
_ALSO_LATIN = ("jv", "ku")


def named(code: str) -> Language:
    """A language as requests name it; one without a known name is named by its code."""
    return Language(language_name(code) or f"the language {code!r}", code)


def scripts_of(code: str) -> frozenset[str] | None:
    """The scripts in which a language is written; None where that is not known here."""
    for part in code.split("-")[1:]:
        if part in _ISO_SCRIPTS:
            return frozenset(_ISO_SCRIPTS[part])
    known = SCRIPTS.get(primary_language(code))
    # Of every language Latin is among those in which a response can be read.
    return known if known in (None, {"Latin"}) or primary_language(code) in _ALSO_LATIN else known - {"Latin"}


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

        None too where the language is not known, the text has no letters, or it is short and could be in many of them.
        Where lingua says nothing, since no language that it compares has such letters, the script decides.
        """
        own, letters = _own(language), [letter for letter in text if letter.isalpha()]
        if own in self.unknown or not letters:
            return None
        shares = self.shares(text)
        likeliest = next(iter(shares))
        if not shares[likeliest]:
            expected = scripts_of(language)
            if expected is not None and 2 * sum(script_of(letter) in expected for letter in letters) >= len(letters):
                return None
            return f"it is in a script that {own!r} is not written in"
        if len(letters) < _SHORT and shares[likeliest] < _WEAK and shares.get(own, 0.0) > 0:
            return None
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

"""Which language a text is in, by lingua."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from mlc_ray.judges.degenerate import SCRIPTS, script_of
from mlc_ray.judges.phrase_lists import shipped_phrases
from mlc_ray.types import primary_language

_LINGUA: dict[str, str] = {"no": "nb", "fil": "tl"}  # codes that lingua has under another one
_SHORT, _WEAK = 20, 0.3  # letters of a text of which lingua knows little, and what it says of such a one at most
_SURE, _APART = 0.6, 2.0  # what it must say of any text, or how many times what it says of the next language
_FAR = 3.0  # the same for English in place of a language that it does not know; 450 Kurdish texts had 2.2 at most
_READ = 1000  # characters: enough to tell, and what takes time is the rest
_AT_ONCE = 4096  # texts: each has an object for every language that is compared
_ASIDE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)  # code and addresses are in no language
_ONE = {"nn": "nb", "bs": "hr", "sr": "hr", "ms": "id"}  # who reads one reads the other; a sentence may be in both
_ALIKE = (
    "ar fa ur", "az tr", "be bg mk ru sr uk", "bs hr sl sr", "ca es it pt", "cs pl sk", "da nb nn sv", "de nl af",
    "et fi", "hi mr", "id ms tl", "lt lv", "st tn", "xh zu",
)  # fmt: skip
"""Languages that are easily taken for each other: where one is asked about, the others are compared with it."""
_RULES = sha256(repr((_SHORT, _WEAK, _SURE, _APART, _READ, _ASIDE.pattern, _ONE)).encode()).hexdigest()[:12]
_ISO_SCRIPTS = {
    "Arab": {"Arabic"}, "Cyrl": {"Cyrillic"}, "Deva": {"Devanagari"}, "Hans": {"Han"}, "Hant": {"Han"},
    "Hebr": {"Hebrew"}, "Latn": {"Latin"},
}  # fmt: skip
_ALSO_LATIN = ("jv", "ku")


def scripts_of(code: str) -> frozenset[str] | None:
    """The scripts in which a language is written; None where that is not known here."""
    for part in code.split("-")[1:]:
        if part in _ISO_SCRIPTS:
            return frozenset(_ISO_SCRIPTS[part])
    known = SCRIPTS.get(primary_language(code))
    # Of every language Latin is among those in which a response can be read.
    return known if known in (None, {"Latin"}) or primary_language(code) in _ALSO_LATIN else known - {"Latin"}


def prose(text: str) -> str:
    """A text without code and addresses, which are in no language."""
    return _ASIDE.sub(" ", text)


class Identifier:
    """Tells languages apart: those asked about and what is like them, English, and those with shipped refusal phrases.

    lingua could compare with more, but loading all of its models takes 0.9 GB, and these 0.5; a model that misses the
    language asked for mostly answers in English or a neighbour of it.

    Args:
        languages: BCP 47 codes that texts are meant to be in; those that lingua does not know are `unknown`.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        from lingua import IsoCode639_1

        asked = {_own(code) for code in languages}
        alike = {code for group in map(str.split, _ALIKE) if asked & {*group} for code in group}
        known = set(dir(IsoCode639_1))
        self.unknown = frozenset(code for code in asked if code.upper() not in known)
        self._compared = sorted(c for c in {"en", *asked, *alike, *map(_own, shipped_phrases())} if c.upper() in known)

    @property
    def identity(self) -> str:
        """Names all that `told` depends on: lingua's version, the languages that are compared, and the rules."""
        return f"lingua {version('lingua-language-detector')} among {' '.join(self._compared)}, rules={_RULES}"

    def reads(self, language: str) -> bool:
        """Whether lingua knows a language."""
        return _own(language) not in self.unknown

    def shares(self, text: str) -> dict[str, float]:
        """The probability of each language that it compares, by its primary code, the likeliest first; it sums to 1."""
        found = self._detector.compute_language_confidence_values(text)
        return {_code(value.language): value.value for value in found}

    def told(self, texts: Sequence[str], asked: Sequence[str]) -> list[str | None]:
        """The language that each text is in, as a primary code, or None where that cannot be told.

        It is told where one language has at least 0.6 of the probability or, of a text of 20 letters and more, 0.3 and
        twice that of the next one. Code and addresses are not read, nor what lies behind 1,000 characters. Nothing is
        told of a text that is asked for in a language that lingua does not know.

        Args:
            texts: of any length.
            asked: BCP 47 codes of the languages that they are asked for in; the code of one stands for all that are one
                with it (`no` for Bokmål, `sr` for Croatian).
        """
        pairs = list(zip(texts, asked, strict=True))
        read = ["" if _own(code) in self.unknown else prose(text)[:_READ] for text, code in pairs]
        once = list(dict.fromkeys(read))  # refusals are often the same
        likeliest: dict[str, str | None] = {}
        for some in (once[start : start + _AT_ONCE] for start in range(0, len(once), _AT_ONCE)):
            shares = self._detector.compute_language_confidence_values_in_parallel(some)
            likeliest.update(zip(some, map(_likeliest, some, shares), strict=True))
        return [
            primary_language(code) if likeliest[text] == _ONE.get(_own(code), _own(code)) else likeliest[text]
            for text, (_, code) in zip(read, pairs, strict=True)
        ]

    def fault(self, text: str, language: str, least: float) -> str | None:
        """Why a text is not in `language`: another one is likelier, and its own share is below `least`.

        None too where the text has no letters, or it is short and could be in many of them. Where lingua says nothing,
        since no language that it compares has such letters, the script decides. Of a language that it does not know
        nothing is likelier but English, since it may be sure that Kurdish is Turkish.
        """
        own, letters = _own(language), [letter for letter in text if letter.isalpha()]
        if own in self.unknown:
            return "it is English" if self._is_english(text) else None
        if not letters:
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

    def unclear(self, text: str, language: str) -> str | None:
        """Why a text that has no `fault` is not `told` to be in `language`: it may be half in another one.

        None too where it is not known, of what has fewer than 20 letters beside code and addresses, and where lingua
        says nothing, since no language that it compares has such letters.
        """
        own = _own(language)
        read = prose(text)[:_READ]
        if own in self.unknown or sum(map(str.isalpha, read)) < _SHORT:
            return None
        shares = self._detector.compute_language_confidence_values(read)
        likeliest = _likeliest(read, shares)
        if not shares[0].value or likeliest == _ONE.get(own, own):
            return None
        return f"it is not clearly {own!r}, but {'in no single language' if likeliest is None else repr(likeliest)}"

    def _is_english(self, text: str) -> bool:
        """Whether a text of 20 letters and more, beside code and addresses, is by far likelier English than another."""
        read = prose(text)[:_READ]
        if sum(map(str.isalpha, read)) < _SHORT:
            return False
        shares = self.shares(read)
        english = shares.pop("en")
        return english >= max(_WEAK, _FAR * max(shares.values()))

    @cached_property
    def _detector(self) -> Any:
        from lingua import IsoCode639_1, LanguageDetectorBuilder

        codes = [getattr(IsoCode639_1, code.upper()) for code in self._compared]
        return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()


def _likeliest(text: str, found: Sequence[Any]) -> str | None:
    """The language of a text by lingua's shares, those that are one added up; None where none stands out."""
    shares: Counter[str] = Counter()
    for code, value in ((_code(each.language), each.value) for each in found):
        shares[_ONE.get(code, code)] += value
    (first, most), (_, next_one) = shares.most_common(2)
    apart = most >= max(_WEAK, _APART * next_one) and sum(map(str.isalpha, text)) >= _SHORT
    return first if apart or most >= _SURE else None


def _own(code: str) -> str:
    primary = primary_language(code)
    return _LINGUA.get(primary, primary)


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()

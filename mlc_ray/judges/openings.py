"""How refusals open, as whole phrases and letter by letter: from the refusal judge's lists, and what settings add."""

from __future__ import annotations

from collections.abc import Iterable

from mlc_ray.config import ConfigError, OpeningsSection
from mlc_ray.judges.phrase_lists import shipped_phrases

_SCRIPTS = {
    "ar": "Arab", "bn": "Beng", "hi": "Deva", "ja": "Jpan", "ko": "Kore", "ps": "Arab", "ru": "Cyrl", "th": "Thai",
    "ur": "Arab", "zh": "Hans",
}  # fmt: skip
"""What lists are written in; the others in Latin letters."""
_TRADITIONAL = ("TW", "HK", "MO")


def openings_by_language(languages: Iterable[str], settings: OpeningsSection) -> dict[str, list[str]]:
    """`refusal_openings` of each of `languages`, in alphabetical order.

    Raises:
        ConfigError: Some are given for a language that none of these reads.
    """
    codes = sorted(set(languages))
    read = {one for code in codes for one in _codes(code, settings)}
    if unread := sorted(settings.further.keys() - read):
        raise ConfigError(
            f"openings.further has {unread[0]!r}, which no bundle is in, only {', '.join(codes)}: remove it, or give "
            "them under the tag that the bundles have"
        )
    return {code: refusal_openings(code, settings) for code in codes}


def refusal_openings(language: str, settings: OpeningsSection) -> list[str]:
    """The openings of refusals that are read in a language, a BCP 47 tag: those given, its own, and the English ones.

    The English ones are not with `english_everywhere: false`: then a language without a list has those given alone, and
    otherwise the English ones alone. With script or region a language has those of the language where it is written
    alike: `pt-BR` those of `pt`, `zh-Hant` and `zh-TW` not those of `zh`.
    """
    codes = _codes(language, settings)
    given = [text for code in codes for text in settings.further.get(code, [])]
    listed = [text for code in codes if code in shipped_phrases() for text in shipped_phrases()[code].openings]
    return list(dict.fromkeys((*given, *listed)))


def _codes(language: str, settings: OpeningsSection) -> list[str]:
    """The tags whose openings are read in a language."""
    primary, *others = language.split("-")
    script = next((one for one in others if len(one) == 4 and one.isalpha()), None)
    if primary == "zh" and script is None and any(region in others for region in _TRADITIONAL):
        script = "Hant"
    known = _SCRIPTS.get(primary, "Latn" if primary in shipped_phrases() else None)
    alike = [primary] if script in (None, known) else []
    english = ["en"] if settings.english_everywhere else []
    return list(dict.fromkeys((language, *alike, *english)))

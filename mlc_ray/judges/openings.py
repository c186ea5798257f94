"""How refusals open, as whole phrases and letter by letter: from the refusal judge's lists, and what settings add."""

from __future__ import annotations

from mlc_ray.config import OpeningsSection
from mlc_ray.judges.phrase_lists import shipped_phrases
from mlc_ray.types import primary_language


def refusal_openings(language: str, settings: OpeningsSection) -> list[str]:
    """The openings of refusals that are read in a language, a BCP 47 tag: those given, its own, and the English ones.

    A language without a list has the English ones alone.
    """
    codes = dict.fromkeys((language, primary_language(language), "en"))
    given = [text for code in codes for text in settings.further.get(code, [])]
    listed = [text for code in codes if code in shipped_phrases() for text in shipped_phrases()[code].openings]
    return list(dict.fromkeys((*given, *listed)))

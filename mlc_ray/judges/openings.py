"""How refusals open, as whole phrases: from the refusal judge's lists, and what settings add to them."""

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
    listed = [text for code in codes for text in _listed(code)[: settings.per_language]]
    return list(dict.fromkeys((*given, *listed)))


def has_openings(language: str) -> bool:
    """Whether there is a list for a language."""
    return primary_language(language) in shipped_phrases()


def _listed(code: str) -> list[str]:
    """A list's refusals that are plain text and begin with no other one."""
    if code not in shipped_phrases():
        return []
    plain = [phrase for phrase in shipped_phrases()[code].refusals if not set("*|") & set(phrase)]
    return [phrase for phrase in plain if not any(phrase != other and phrase.startswith(other) for other in plain)]

"""How a language is named to a model."""

from __future__ import annotations

from mlc_ray.generate.translate import Language
from mlc_ray.report.languages import language_name


def named(code: str) -> Language:
    """A language as requests name it; one without a known name is named by its code."""
    return Language(language_name(code) or f"the language {code!r}", code)

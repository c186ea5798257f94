"""Aya red-teaming; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.formats.base import Format, Published
from mlc_ray.data.formats.values import language_code, prompt_text


@register("format", "aya")
class Aya(Format):
    """Written by native speakers in each language, not translated, so a bundle has one language.

    The English glosses (`literal_translation`, `semantic_translation`) explain a prompt; they are no prompts to ask.
    """

    published = Published.of("Aya red-teaming", "ar en es fr hi ru sr tl", "harmful")
    needs = frozenset({"prompt", "language", "harm_category", "global_or_local"})
    keys = needs | {"literal_translation", "semantic_translation", "explanation"}
    default_kind = "harmful"

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """One prompt in the language that its row names."""
        category = record.get("harm_category")
        language = language_code(record.get("language"), "language")
        return {
            "prompts": {language: prompt_text(record.get("prompt"), "prompt")},
            "category": ", ".join(map(str, category)) if isinstance(category, list) else category,
        }

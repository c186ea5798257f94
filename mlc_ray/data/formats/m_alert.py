"""M-ALERT; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.formats.base import Format, Published
from mlc_ray.data.formats.values import prompts_of_columns

_LANGUAGES = frozenset({"de", "en", "es", "fr", "it"})
_LABELS = frozenset({"id", "category"})


@register("format", "m-alert")
class MAlert(Format):
    """A column for each of its five languages, `id` and `category`."""

    published = Published.of("M-ALERT", "de en es fr it", "harmful")
    needs = _LANGUAGES | _LABELS
    keys = needs
    default_kind = "harmful"
    ids = ("id",)

    def recognises(self, keys: frozenset[str]) -> bool:
        """Exactly these columns: with one more it is a user's own table."""
        return keys == self.needs

    def is_language(self, column: str) -> bool:
        """One of the five."""
        return column in _LANGUAGES

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompts that are there."""
        return {"prompts": prompts_of_columns(record, _LABELS), "category": record.get("category")}

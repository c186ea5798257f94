"""A user's own table: a column per language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.base import Format
from mlc_ray.data.formats.values import is_blank, prompts_of_columns

_LABELS = frozenset({"id", "kind", "source", "category"})


@register("format", "table")
class Table(Format):
    """One column per language, and any of `id`, `kind`, `source`, `category`."""

    kind_from = "the row (it has no `kind`)"
    ids = ("id",)
    container = "csv"

    def check_key(self, key: str) -> None:
        """A label, or a language code."""
        if key not in _LABELS:
            check_language(key, f"column {key!r} (a table has a column per language, and {', '.join(sorted(_LABELS))})")

    def recognises(self, keys: frozenset[str]) -> bool:
        """Language codes and labels, and nothing else."""
        languages = keys - _LABELS
        try:
            for key in languages:
                self.check_key(key)
        except BundleError:
            return False
        return bool(languages)

    def is_language(self, column: str) -> bool:
        """Every column that is not a label."""
        return column not in _LABELS

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompts that are there, with their labels."""
        labels = {name: record[name] for name in ("kind", "source", "category") if not is_blank(record.get(name))}
        return {"prompts": prompts_of_columns(record, _LABELS), **labels}

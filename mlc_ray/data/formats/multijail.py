"""MultiJail's CSV; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import check_language
from mlc_ray.data.formats.base import Format, Published
from mlc_ray.data.formats.values import prompts_of_columns

_LABELS = frozenset({"id", "source", "tags"})


@register("format", "multijail")
class MultiJail(Format):
    """One column per language beside `id`, `source` and `tags`; an empty cell is a language that the bundle lacks."""

    published = Published.of("MultiJail", "ar bn en it jv ko sw th vi zh", "harmful", bundles=315)
    needs = _LABELS
    default_kind = "harmful"
    ids = ("id",)
    container = "csv"

    def check_key(self, key: str) -> None:
        """A label, or a language code."""
        if key not in _LABELS:
            check_language(key, f"column {key!r}")

    def is_language(self, column: str) -> bool:
        """Every column that is not a label."""
        return column not in _LABELS

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompts that are there, with their labels."""
        prompts = prompts_of_columns(record, _LABELS)
        return {"prompts": prompts, "source": record.get("source"), "category": record.get("tags")}

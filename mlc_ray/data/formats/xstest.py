"""XSTest; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError
from mlc_ray.data.formats.base import Format, Published
from mlc_ray.data.formats.values import prompt_text

_KINDS = {"safe": "benign", "unsafe": "harmful"}


@register("format", "xstest")
class XSTest(Format):
    """English prompts; safe ones are benign, their unsafe contrasts harmful.

    The kind is that of `label` (`safe`, `unsafe`); the second version of the file has no such column, and there types
    of unsafe prompts start with `contrast_`, as the authors document. Where both are given they must agree.
    """

    published = Published.of("XSTest", "en", "harmful", "benign")
    needs = frozenset({"prompt", "type", "focus"})
    keys = frozenset({"id", "id_v1", "id_v2", "prompt", "type", "label", "focus", "note"})
    kind_from = "neither label nor type is given; the row"
    ids = ("id", "id_v2")

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """One English prompt."""
        kind_of_type = None
        if isinstance(record.get("type"), str) and record["type"].strip():
            kind_of_type = "harmful" if record["type"].startswith("contrast_") else "benign"
        label = record.get("label")
        if label not in (None, "", *_KINDS):
            raise BundleError(f"label {label!r} is neither 'safe' nor 'unsafe'")
        kind = _KINDS[label] if label else kind_of_type
        if kind_of_type is not None and kind != kind_of_type:
            raise BundleError(
                f"label {label!r} contradicts type {record['type']!r}: unsafe types start with 'contrast_'"
            )
        return {
            "prompts": {"en": prompt_text(record.get("prompt"), "prompt")},
            "kind": kind,
            "category": record.get("type"),
        }

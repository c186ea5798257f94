"""PolyGuardPrompts; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError
from mlc_ray.data.formats.base import Published
from mlc_ray.data.formats.joined import JoinedFormat, Piece
from mlc_ray.data.formats.values import language_code, prompt_text, whole_number

_KINDS = {"harmful": "harmful", "unharmful": "benign"}


@register("format", "polyguard")
class PolyGuard(JoinedFormat):
    """One language per row, joined by `id`; the kind is the human label `prompt_harm_label`."""

    published = Published.of(
        "PolyGuardPrompts", "ar cs de en es fr hi it ja ko nl pl pt ru sv th zh", "harmful", "benign"
    )
    needs = frozenset({"prompt", "prompt_harm_label", "language", "id"})
    keys = needs | {
        "response", "adversarial", "response_refusal_agreement", "response_refusal_label", "response_harm_label",
        "subcategory", "prompt_harm_agreement", "response_harm_agreement", "prompt_label", "prompt_categories",
        "response_label", "response_categories",
    }  # fmt: skip
    kind_from = "prompt_harm_label is empty; it"

    def piece(self, record: Mapping[str, Any]) -> Piece:
        """One language of the bundle that `id` names."""
        label = record.get("prompt_harm_label")
        if label not in (None, "", *_KINDS):
            raise BundleError(f"prompt_harm_label {label!r} is neither 'harmful' nor 'unharmful'")
        return Piece(
            key=str(whole_number(record.get("id"), "id")),
            language=language_code(record.get("language"), "language"),
            text=prompt_text(record.get("prompt"), "prompt"),
            kind=_KINDS[label] if label else None,
            category=str(record.get("subcategory") or ""),
        )

"""The published format for supervised finetuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError
from mlc_ray.data.formats.turns import ANSWER_LANGUAGE, USER, TurnFormat, labels, other_prompts, said


@register("format", "sft")
class Sft(TurnFormat):
    """`instruction` and `input` (joined by a line break), `output`, and `prompt_xx`."""

    own = ("instruction", "input", "output")
    needs = frozenset({"instruction"})

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompts of all languages, and the answer in English."""
        parts = [said(record[name], name, USER) for name in ("instruction", "input") if record.get(name)]
        if odd := [part for part in parts if not isinstance(part, str)]:
            raise BundleError(f"instruction and input are texts, not {odd[0]!r}")
        return {
            "prompts": {ANSWER_LANGUAGE: "\n".join(parts), **other_prompts(record)},
            "chosen": record.get("output"),
            **labels(record),
        }

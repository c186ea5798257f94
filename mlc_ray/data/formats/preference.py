"""The published preference format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.formats.base import Published
from mlc_ray.data.formats.turns import ANSWER_LANGUAGE, ASSISTANT, USER, TurnFormat, labels, other_prompts, said


@register("format", "preference")
class Preference(TurnFormat):
    """`prompt`, `prompt_xx`, `chosen`, `rejected`, each a message {from, value}, a list of one, or text."""

    published = Published.of("PKU-SafeRLHF, multilingual", "ar bn en ja ku ps ru sw ur zh", "harmful", bundles=180)
    own = ("prompt", "chosen", "rejected")
    needs = frozenset({"prompt"})

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The prompts of all languages, and the answers in English."""
        answers = {name: record[name] for name in ("chosen", "rejected") if record.get(name) is not None}
        return {
            "prompts": {ANSWER_LANGUAGE: said(record.get("prompt"), "prompt", USER), **other_prompts(record)},
            **{name: said(answer, name, ASSISTANT) for name, answer in answers.items()},
            **labels(record),
        }

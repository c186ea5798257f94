"""WildGuard: harmful request, refusal and harmful response, in English."""

from __future__ import annotations

from typing import Any

from mlc_ray._registry import register
from mlc_ray.judges.guards import base
from mlc_ray.judges.guards.base import Guard, GuardSettings
from mlc_ray.types import Verdict


@register("judge", "wildguard")
class WildGuard(Guard):
    """Its tokenizer has no chat template; the layout is that of its paper and its own package."""

    name = "wildguard"
    card = "https://huggingface.co/allenai/wildguard"
    measures = base.BOTH
    languages = frozenset({"en"})
    max_new_tokens = 48
    has_template = False

    class Settings(GuardSettings):
        """No settings beside those of every guard."""

        name: str = "wildguard"

    def render(self, tokenizer: Any, prompt: str, response: str) -> tuple[str, ...]:
        """Question and transcript."""
        return (
            f"<s><|user|>\n[INST] {base.PAIR_QUESTION}\n\n{base.transcript(prompt, response)}\n\n---\n\n"
            "Answers: [/INST]\n<|assistant|>\n",
        )

    def read(self, text: str) -> Verdict:
        """Three lines of yes or no."""
        return base.read_pair(text)

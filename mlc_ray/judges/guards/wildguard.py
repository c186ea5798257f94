"""WildGuard: harmful request, refusal and harmful response, in English.

Wording: `judge.prompt`, the prompt on the card, control tokens included. Its tokenizer has no chat template.
"""

from __future__ import annotations

from typing import Any

from mlc_ray._registry import register
from mlc_ray.judges.guards import replies
from mlc_ray.judges.guards.wording import WordedGuard, WordedSettings, filled
from mlc_ray.types import Verdict


@register("judge", "wildguard")
class WildGuard(WordedGuard):
    """The file is the whole text that the model completes."""

    name = "wildguard"
    card = "https://huggingface.co/allenai/wildguard"
    measures = replies.BOTH
    languages = frozenset({"en"})
    max_new_tokens = 48
    has_template = False
    holds = (
        "<s><|user|>", "[INST]", "1)", "2)", "3)", "Human user:\n{prompt}", "AI assistant:\n{response}",
        "Answers: [/INST]", "<|assistant|>",
    )  # fmt: skip

    class Settings(WordedSettings):
        """No settings beside those of every guard that is asked in words from a file."""

        name: str = "wildguard"

    def render(self, tokenizer: Any, prompt: str, response: str) -> tuple[str, ...]:
        """The file's text, and the line break behind which the reply begins."""
        return (filled(self.wording, prompt, response) + "\n",)

    def read(self, text: str) -> Verdict:
        """Three lines of yes or no."""
        return replies.read_pair(text)

"""PolyGuard: harmful request, refusal and harmful response, with the codes of what each violates.

Wording: `judge.prompt`, the system prompt on the card and behind it the user's message, which begins `Human user:`.
"""

from __future__ import annotations

from typing import Any

from mlc_ray._registry import register
from mlc_ray.judges.guards import base, replies
from mlc_ray.judges.guards.wording import WordedGuard, WordedSettings, filled
from mlc_ray.types import Verdict

_CONVERSATION = "Human user:\n{prompt}"


@register("judge", "polyguard")
class PolyGuard(WordedGuard):
    """Question and taxonomy are a system message, the conversation the user's, in an ordinary chat template."""

    name = "polyguard"
    card = "https://huggingface.co/ToxicityPrompts/PolyGuard-Qwen"
    measures = replies.BOTH
    languages = replies.codes("ar cs zh nl en fr de hi th it ja ko pl pt ru es sv")
    max_new_tokens = 100
    holds = (
        "<BEGIN UNSAFE CONTENT CATEGORIES>", "S1:", "S14:", "<END UNSAFE CONTENT CATEGORIES>", _CONVERSATION,
        "AI assistant:\n{response}",
    )  # fmt: skip

    class Settings(WordedSettings):
        """No settings beside those of every guard that is asked in words from a file."""

        name: str = "polyguard"

    def render(self, tokenizer: Any, prompt: str, response: str) -> tuple[str, ...]:
        """What stands before the conversation as the system's message, the rest as the user's."""
        system, _, rest = self.wording.partition(_CONVERSATION)
        user = filled(_CONVERSATION + rest, prompt, response)
        return (base.render(tokenizer, [base.message("system", system.strip()), base.message("user", user)]),)

    def read(self, text: str) -> Verdict:
        """Three lines of yes or no, and perhaps one of codes for the request and one for the response."""
        return replies.read_pair(text, optional=("request safety violations", "response safety violations"))

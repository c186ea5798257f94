"""Refuse or comply, decided in the response language: cross-entropy of how likely a response is to open as a refusal.

Ours. What it teaches, the term `consistency` carries into the other languages.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from mlc_ray._registry import register
from mlc_ray.config import TermSettings
from mlc_ray.losses.base import Decisions, Term, TermLoss


@register("term", "decision")
class Decision(Term):
    """Binary cross-entropy of the refusal's log-odds against the bundle's kind, in the response language alone.

    With p the probability that the response opens as a refusal (`openings`): -log p for a harmful bundle, -log(1 - p)
    for a benign one, in nats. It reads the prompt and no answer.
    """

    class Settings(TermSettings):
        """Refuse harmful prompts in the response language, and no benign ones."""

        weight: Annotated[float, Field(ge=0)] = Field(0.5, description="Factor in the total loss. 0 switches it off.")

    note = "ours"
    needs_decisions = True
    needs_languages = False
    needs_kinds = True

    def __call__(self, decisions: Decisions) -> TermLoss:
        """The loss of each bundle [B], its `log_odds` [B], and whether these are of the right sign, `accuracy` [B]."""
        log_odds = decisions.in_response
        losses = F.binary_cross_entropy_with_logits(log_odds, decisions.harmful.to(log_odds.dtype), reduction="none")
        right = (log_odds > 0) == decisions.harmful
        return TermLoss(losses, {"log_odds": log_odds, "accuracy": right.to(log_odds.dtype)})

"""Refuse or comply: cross-entropy of how likely a response is to open as a refusal, in one language of a bundle or all.

Ours. What it teaches in the response language, the term `consistency` carries into the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from mlc_ray._registry import register
from mlc_ray.config import TermSettings
from mlc_ray.losses.base import Decisions, Term, TermLoss, mean_over_languages


@register("term", "decision")
class Decision(Term):
    """Binary cross-entropy of the refusal's log-odds against the bundle's kind.

    With p the probability that the response opens as a refusal (`openings`): -log p for a harmful bundle, -log(1 - p)
    for a benign one, in nats; with `languages: all` the mean over the bundle's languages. It reads prompts and no
    answer.
    """

    class Settings(TermSettings):
        """Refuse harmful prompts, and no benign ones."""

        weight: Annotated[float, Field(ge=0)] = Field(0.5, description="Factor in the total loss. 0 switches it off.")
        languages: Literal["response", "all"] = Field(
            "response", description="Decide in the `response` language alone, or in `all` languages of a bundle."
        )

    settings: Settings
    note = "ours"
    needs_decisions = True
    needs_kinds = True
    relates_languages = False

    @property
    def needs_languages(self) -> bool:  # type: ignore[override]
        """Whether it decides in all of them."""
        return self.settings.languages == "all"

    def __call__(self, decisions: Decisions) -> TermLoss:
        """The loss of each bundle [B], its `log_odds` [B], and whether these are of the right sign, `accuracy` [B].

        Of several languages, each is their mean.
        """
        log_odds, read = decisions.log_odds, decisions.present
        if not self.needs_languages:
            read = F.one_hot(decisions.response, log_odds.shape[1]).bool()
        harmful = decisions.harmful.unsqueeze(1).expand_as(log_odds)
        losses = F.binary_cross_entropy_with_logits(log_odds, harmful.to(log_odds.dtype), reduction="none")
        right = ((log_odds > 0) == harmful).to(log_odds.dtype)
        loss, odds, accuracy = (
            mean_over_languages(torch.where(read, each, 0.0).flatten(), read.flatten(), len(read))
            for each in (losses, log_odds, right)
        )
        return TermLoss(loss, {"log_odds": odds, "accuracy": accuracy})

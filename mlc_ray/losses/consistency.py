"""Refuse or comply as in the response language: the refusal's log-odds in every other language drawn to those there.

Ours. It needs prompts alone, and no answer in any other language. One decision for all prompts does not satisfy it as
long as the response language tells the kinds apart, which the term `decision` teaches: begin it once that is learned.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import PositiveFloat, TermSettings
from mlc_ray.losses.base import Decisions, Term, TermLoss, mean_over_languages


@register("term", "consistency")
class Consistency(Term):
    """`consistency_losses` with its settings."""

    class Settings(TermSettings):
        """Decide in every other language as in the response language, which takes no gradient."""

        weight: Annotated[float, Field(ge=0)] = Field(0.3, description="Factor in the total loss. 0 switches it off.")
        start: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.3, description="Share of all optimizer steps after which the term begins; before, it is not computed."
        )
        bound: PositiveFloat = Field(
            10.0,
            description="Log-odds beyond this in both languages, on the same side, count as equal: 10 nats are a "
            "probability of 5e-5, or of all but that.",
        )

    settings: Settings
    note = "ours"
    needs_decisions = True

    def __call__(self, decisions: Decisions) -> TermLoss:
        """The loss of each bundle [B], and its mean `gap` to the response language [B], in nats."""
        losses, gaps = consistency_losses(decisions, bound=self.settings.bound)
        return TermLoss(losses, {"gap": gaps})


def consistency_losses(decisions: Decisions, *, bound: float) -> tuple[Tensor, Tensor]:
    """Mean over the other languages l of smooth-L1(m_l - m), m the response language's log-odds; and of |m_l - m|.

    Both [B] and 0 for a bundle without another language. m takes no gradient and is taken within +-`bound`, as is m_l
    where both are beyond it on the same side. Smooth-L1 is d^2 / 2 below a nat, and |d| - 1/2 above.
    """
    m = decisions.in_response.detach().clamp(-bound, bound).unsqueeze(1).expand_as(decisions.log_odds)
    beyond = (decisions.log_odds.abs() >= bound) & (m.abs() >= bound) & (decisions.log_odds.sign() == m.sign())
    others = decisions.present.clone()
    others[torch.arange(len(others), device=others.device), decisions.response] = False
    counted = others & ~beyond
    distances = F.smooth_l1_loss(decisions.log_odds, m, reduction="none")
    gaps = (decisions.log_odds.detach() - m).abs()
    return (
        mean_over_languages(torch.where(counted, distances, 0.0).flatten(), others.flatten(), len(others)),
        mean_over_languages(torch.where(counted, gaps, 0.0).flatten(), others.flatten(), len(others)),
    )

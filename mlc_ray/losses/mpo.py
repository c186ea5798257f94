"""Multilingual reward-gap optimisation: the reward gap of one language is taught to the others, and that language held.

Source: "MPO: Multilingual Safety Alignment via Reward Gap Optimization", ACL 2025, arXiv 2505.16869, and its code.
The dominant language is the response language of the bundles. Ours, and not the authors': `min_source_gap`; padding is
in none of the means, since there is none; English is forwarded once a bundle and not once a target language; errors and
states are squared in float32.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import LanguageTag, LossSettings, PositiveFloat
from mlc_ray.losses.base import Alignment, AlignmentLoss, Pooled
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import AnswerRows, Pairing, Pooling, ResponseLogProbs


@register("loss", "mpo")
class Mpo(Alignment):
    """`mpo_loss` with its settings."""

    class Settings(LossSettings):
        """MPO: regression on the dominant language's reward gap, which reads answers in every language."""

        dominant: LanguageTag = Field(
            "en", description="The language whose gap is taught; all bundles must have it for their response language."
        )
        beta: PositiveFloat = Field(1.0, description="Factor of the policy's gap (authors: 1.0 Llama-3.1, 1.5 others).")
        hidden_weight: Annotated[float, Field(ge=0)] = Field(
            1.0, description="Weight of the squared distance from the reference's states in the dominant language."
        )
        pool: Pooling = Field(
            "mean_all",
            description="What stands for a sequence: the mean state of all its tokens (authors), of those of the "
            "answer (`mean_masked`), or the `last` one's.",
        )
        min_source_gap: float | None = Field(
            None,
            description="Bundles whose gap in the dominant language is not above this teach nothing (default: all do).",
        )

    settings: Settings
    needs_reference = True
    note = "after arXiv 2505.16869; ours: min_source_gap, English once a bundle, no padding in the means"
    needs_rows = True
    pairing: Pairing = "own"
    # A cached reference is asked about the dominant language alone; online, it forwards the batch's answers in all.
    reference_pairing: Pairing = "response"

    @property
    def pooling(self) -> Pooling | None:
        """As the settings say."""
        return self.settings.pool if self.settings.hidden_weight else None

    @property
    def response_language(self) -> str | None:
        """The dominant language."""
        return self.settings.dominant

    def __call__(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        rows: AnswerRows,
        pooled: Pooled | None = None,
    ) -> AlignmentLoss:
        """The loss of each bundle [B]."""
        return mpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            rows,
            pooled,
            beta=self.settings.beta,
            hidden_weight=self.settings.hidden_weight,
            min_source_gap=self.settings.min_source_gap,
        )


def mpo_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    rows: AnswerRows,
    pooled: Pooled | None,
    *,
    beta: float,
    hidden_weight: float = 1.0,
    min_source_gap: float | None = None,
) -> AlignmentLoss:
    """MPO's loss of each bundle [B].

    With the gap g of a language, its chosen answer's mean log-prob less its rejected one's, in nats a token:
    mean over target languages t of (beta g_policy(t) - g_reference(d))^2, d the response language,
    + hidden_weight x mean over chosen and rejected and over dimensions of (h_policy(d) - h_reference(d))^2.
    The first part is 0 for a bundle without targets, or whose g_reference(d) is at most `min_source_gap`.

    Args:
        chosen: [A], log-probs of the chosen answers in all languages.
        rejected: [A], of the rejected ones.
        reference_chosen: [B], the reference's summed log-probs of the chosen answers in the response language.
        reference_rejected: [B], of the rejected ones.
        rows: whose the answers are.
        pooled: of the two answers in the response language; None for no second part.
        beta: factor of the policy's gap.
        hidden_weight: weight of the second part.
        min_source_gap: in nats a token; None for no bound.

    Returns:
        The loss, and to log: `source_gap`, `regression` and `anchor` without their factors, `teaches` (0 or 1), and
        `reversed`, 1 where a bundle teaches a gap of 0 or below: to prefer the rejected answer.
    """
    number = len(rows.response)
    gap = mean_log_prob(chosen) - mean_log_prob(rejected)
    source = (
        reference_chosen / chosen.length[rows.response] - reference_rejected / rejected.length[rows.response]
    ).detach()
    is_target = torch.ones_like(gap).index_fill(0, rows.response, 0.0)
    errors = (beta * gap - source[rows.bundle]).square() * is_target
    targets = gap.new_zeros(number).index_add(0, rows.bundle, is_target)
    teaches = (targets > 0).to(source.dtype)
    if min_source_gap is not None:
        teaches = teaches * (source > min_source_gap)
    regression = gap.new_zeros(number).index_add(0, rows.bundle, errors) / targets.clamp(min=1)
    loss = teaches * regression
    metrics = {
        "source_gap": source,
        "regression": regression.detach(),
        "teaches": teaches,
        "reversed": teaches * (source <= 0),
    }
    if pooled is not None:
        anchor = (pooled.policy.float() - pooled.reference.detach().float()).square().mean(dim=(0, 2))
        loss = loss + hidden_weight * anchor
        metrics["anchor"] = anchor.detach()
    return AlignmentLoss(loss, metrics=metrics)

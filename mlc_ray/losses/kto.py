"""Kahneman-Tversky optimisation: each answer by itself is wanted or not, as LASA trains its safety data.

Source: Ethayarajh et al. 2024 (arXiv 2402.01306), with the settings of LASA (arXiv 2604.12710), and its code. Ours: the
point of reference, a KL of the policy from the frozen model, is taken for 0, its value before training; the authors
estimate it on answers to other prompts, which are not forwarded here. With that, and weights of 1, it is half of
APO-zero (arXiv 2408.06266), and like that it reads both answers to a prompt, where the authors' data need no pairs.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings, PositiveFloat
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.types import ResponseLogProbs


@register("loss", "kto")
class Kto(PerAnswer):
    """`kto_loss` with its settings."""

    class Settings(AnswerSettings):
        """KTO with the policy's KL from the reference taken for 0."""

        beta: PositiveFloat = Field(0.1, description="Strength of staying near the reference (LASA: 0.1).")
        desirable: PositiveFloat = Field(1.0, description="Weight of chosen answers.")
        undesirable: PositiveFloat = Field(1.0, description="Weight of rejected answers.")

    settings: Settings
    needs_reference = True

    @property
    def note(self) -> str:  # type: ignore[override]
        """What is not the authors'."""
        further = super().note
        own = "after arXiv 2402.01306 and 2604.12710; ours: the KL to the reference is taken for 0, answers in pairs"
        return f"{own}; {further}" if further else own

    def __call__(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
    ) -> AlignmentLoss:
        """The loss of each pair of answers [A]."""
        return kto_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=self.settings.beta,
            desirable=self.settings.desirable,
            undesirable=self.settings.undesirable,
        )


def kto_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> AlignmentLoss:
    """KTO's loss of each pair [A], a mean over its two answers; `reference_*` [A] are sums.

    With r = log p - log p_ref of an answer, summed over its tokens:
    (desirable (1 - sigmoid(beta r_chosen)) + undesirable (1 - sigmoid(-beta r_rejected))) / 2; 1/2 where the policy is
    the reference and the weights are 1. Unlike DPO's, either answer's gradient does not depend on the other's.
    """
    chosen_reward = beta * (chosen.total - reference_chosen)
    rejected_reward = beta * (rejected.total - reference_rejected)
    loss = (desirable * torch.sigmoid(-chosen_reward) + undesirable * torch.sigmoid(rejected_reward)) / 2
    return AlignmentLoss(loss, chosen_reward.detach(), rejected_reward.detach())

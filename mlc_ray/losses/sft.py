"""Supervised fine-tuning on the chosen answers."""

from __future__ import annotations

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import ResponseLogProbs


@register("loss", "sft")
class Sft(PerAnswer):
    """`sft_loss`, which has no settings of its own."""

    class Settings(AnswerSettings):
        """Negative log-likelihood of the chosen answers."""

    settings: Settings
    needs_rejected = False
    is_sft = True

    def __call__(self, chosen: ResponseLogProbs) -> AlignmentLoss:
        """The loss of each answer [A]."""
        return sft_loss(chosen)


def sft_loss(chosen: ResponseLogProbs) -> AlignmentLoss:
    """Mean negative log-likelihood per token of each chosen answer."""
    return AlignmentLoss(-mean_log_prob(chosen))

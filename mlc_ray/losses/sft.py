"""Supervised fine-tuning on the chosen answers."""

from __future__ import annotations

from mlc_ray._registry import register
from mlc_ray.config import LossSettings
from mlc_ray.losses.base import Alignment, AlignmentLoss
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import ResponseLogProbs


@register("loss", "sft")
class Sft(Alignment):
    """`sft_loss`, which has no settings."""

    class Settings(LossSettings):
        """Negative log-likelihood of the chosen answers."""

    needs_rejected = False

    def __call__(self, chosen: ResponseLogProbs) -> AlignmentLoss:
        """The loss of each bundle [B]."""
        return sft_loss(chosen)


def sft_loss(chosen: ResponseLogProbs) -> AlignmentLoss:
    """Mean negative log-likelihood per token of each chosen answer."""
    return AlignmentLoss(-mean_log_prob(chosen))

"""Odds-ratio preference optimisation, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings, PositiveFloat
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import ResponseLogProbs


@register("loss", "orpo")
class Orpo(PerAnswer):
    """`orpo_loss` with its settings."""

    class Settings(AnswerSettings):
        """ORPO."""

        beta: PositiveFloat = Field(0.1, description="Weight of the odds-ratio part beside the SFT part.")

    settings: Settings

    def __call__(self, chosen: ResponseLogProbs, rejected: ResponseLogProbs) -> AlignmentLoss:
        """The loss of each pair of answers [A]."""
        return orpo_loss(chosen, rejected, beta=self.settings.beta)


def orpo_loss(chosen: ResponseLogProbs, rejected: ResponseLogProbs, *, beta: float) -> AlignmentLoss:
    """ORPO (Hong et al. 2024, eq. 6): SFT loss - beta log sigmoid(log odds ratio) on mean log-probs; no reference."""
    log_odds = _log_odds(mean_log_prob(chosen)) - _log_odds(mean_log_prob(rejected))
    loss = -mean_log_prob(chosen) - beta * F.logsigmoid(log_odds)
    return AlignmentLoss(loss, (beta * mean_log_prob(chosen)).detach(), (beta * mean_log_prob(rejected)).detach())


def _log_odds(log_prob: Tensor) -> Tensor:
    # log(p / (1 - p)); log1p(-exp(x)) is -inf at x = 0, a probability of exactly 1, so stay a rounding step below.
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return log_prob - torch.log1p(-torch.exp(log_prob))

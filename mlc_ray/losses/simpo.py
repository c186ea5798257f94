"""Simple preference optimisation, without a reference."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings, PositiveFloat
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.losses.logprobs import mean_log_prob
from mlc_ray.types import ResponseLogProbs


@register("loss", "simpo")
class Simpo(PerAnswer):
    """`simpo_loss` with its settings."""

    class Settings(AnswerSettings):
        """SimPO."""

        beta: PositiveFloat = Field(0.1, description="Factor of the mean log-probs, which are the rewards.")
        margin: Annotated[float, Field(ge=0)] = Field(0.5, description="Target reward margin gamma.")

    settings: Settings

    def __call__(self, chosen: ResponseLogProbs, rejected: ResponseLogProbs) -> AlignmentLoss:
        """The loss of each pair of answers [A]."""
        return simpo_loss(chosen, rejected, beta=self.settings.beta, margin=self.settings.margin)


def simpo_loss(chosen: ResponseLogProbs, rejected: ResponseLogProbs, *, beta: float, margin: float) -> AlignmentLoss:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta (mean log-prob difference) - gamma); no reference."""
    chosen_reward, rejected_reward = beta * mean_log_prob(chosen), beta * mean_log_prob(rejected)
    loss = -F.logsigmoid(chosen_reward - rejected_reward - margin)
    return AlignmentLoss(loss, chosen_reward.detach(), rejected_reward.detach())

"""Direct preference optimisation."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings, PositiveFloat
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.types import ResponseLogProbs


@register("loss", "dpo")
class Dpo(PerAnswer):
    """`dpo_loss` with its settings."""

    class Settings(AnswerSettings):
        """Sigmoid DPO."""

        beta: PositiveFloat = Field(0.1, description="Strength of the preference against staying near the reference.")
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
            0.0, description="Assumed probability that a preference label is flipped."
        )

    settings: Settings
    needs_reference = True

    def __call__(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
    ) -> AlignmentLoss:
        """The loss of each pair of answers [A]."""
        return dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
        )


def dpo_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> AlignmentLoss:
    """Sigmoid DPO (Rafailov et al. 2023, eq. 7); label smoothing as conservative DPO. `reference_*` [A] are sums.

    With h the difference of the policy's and the reference's log-ratios:
    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h); ln 2 when the policy is the reference.
    """
    chosen_reward = beta * (chosen.total - reference_chosen)
    rejected_reward = beta * (rejected.total - reference_rejected)
    margin = chosen_reward - rejected_reward
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return AlignmentLoss(loss, chosen_reward.detach(), rejected_reward.detach())

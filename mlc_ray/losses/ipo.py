"""Identity preference optimisation."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import AnswerSettings, PositiveFloat
from mlc_ray.losses.base import AlignmentLoss, PerAnswer
from mlc_ray.types import ResponseLogProbs


@register("loss", "ipo")
class Ipo(PerAnswer):
    """`ipo_loss` with its settings."""

    class Settings(AnswerSettings):
        """IPO on log-probs averaged over tokens."""

        beta: PositiveFloat = Field(0.1, description="The wanted gap of log-ratios a token is 1 / (2 beta) nats.")

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
        return ipo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=self.settings.beta)


def ipo_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> AlignmentLoss:
    """IPO (Azar et al. 2023, eq. 17): (h - 1 / (2 beta))^2 with h on log-probs *averaged* over tokens.

    Averaging is what the authors confirmed for language models; sums would make the target depend on length.
    """
    chosen_gain = (chosen.total - reference_chosen) / chosen.length
    rejected_gain = (rejected.total - reference_rejected) / rejected.length
    loss = (chosen_gain - rejected_gain - 1 / (2 * beta)).square()
    return AlignmentLoss(loss, (beta * chosen_gain).detach(), (beta * rejected_gain).detach())

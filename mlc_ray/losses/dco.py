"""Direct consistency optimisation: what the reference prefers in one language is asked of the policy in the other.

Source: arXiv 2603.04678 and its code. There a pair of languages has two log-ratios to fit; here each further language
of a bundle is paired with its response language, and a bundle's loss is the mean over these pairs, which is ours.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import LossSettings, PositiveFloat
from mlc_ray.losses.base import Alignment, AlignmentLoss
from mlc_ray.types import AnswerRows, Pairing, ResponseLogProbs


@register("loss", "dco")
class Dco(Alignment):
    """`dco_loss` with its settings."""

    class Settings(LossSettings):
        """DCO: consistency of preferences between languages, which reads answers in every language."""

        beta: PositiveFloat = Field(1.0, description="Strength of staying near the reference in the response language.")

    settings: Settings
    needs_reference = True
    note = "after arXiv 2603.04678; ours: each language is paired with the response language"
    needs_rows = True
    pairing: Pairing = "own"

    def __call__(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
        rows: AnswerRows,
    ) -> AlignmentLoss:
        """The loss of each bundle [B]."""
        return dco_loss(chosen, rejected, reference_chosen, reference_rejected, rows, beta=self.settings.beta)


def dco_loss(
    chosen: ResponseLogProbs,
    rejected: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    rows: AnswerRows,
    *,
    beta: float,
) -> AlignmentLoss:
    """DCO's loss of each bundle [B]; all log-probs are summed over tokens, those of the reference [A].

    With r(l) the policy's log-ratio to the reference of the chosen answer in language l, less that of the rejected one,
    and o(l) the reference's log-odds of the two: mean over the further languages t of
    |r(1) - o(t) / beta| + |r(t) - beta o(1)|, 1 being the response language. 0 for a bundle with no further language.
    """
    odds = (reference_chosen - reference_rejected).detach()
    ratio = chosen.total - rejected.total - odds
    first = rows.response[rows.bundle]
    costs = (ratio[first] - odds / beta).abs() + (ratio - beta * odds[first]).abs()
    further = costs.new_ones(len(costs)).index_fill(0, rows.response, 0.0)
    number = costs.new_zeros(len(rows.response))
    loss = number.index_add(0, rows.bundle, costs * further) / number.index_add(0, rows.bundle, further).clamp(min=1)
    return AlignmentLoss(loss)

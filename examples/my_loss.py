"""An alignment loss of your own, in one file outside the package.

    objective: {loss: "examples.my_loss:Hinge", margin: 2.0}

The file must be importable where the run's workers are, e.g. by `ray job submit --working-dir .` from the folder above.
"""

from pydantic import Field
from torch import Tensor

from mlc_ray.config import LossSettings, PositiveFloat
from mlc_ray.losses.base import Alignment, AlignmentLoss
from mlc_ray.types import ResponseLogProbs


class Hinge(Alignment):
    """SLiC's hinge (Zhao et al. 2023, arXiv 2305.10425, eq. 1) on the log-ratios of policy and reference."""

    class Settings(LossSettings):
        """What `objective` may hold beside `loss`; any other field is refused."""

        margin: PositiveFloat = Field(1.0, description="Wanted lead of the chosen answer, in nats.")

    settings: Settings
    needs_reference = True  # so the run computes the reference's log-probs, and `__call__` is given them

    def __call__(
        self,
        chosen: ResponseLogProbs,
        rejected: ResponseLogProbs,
        reference_chosen: Tensor,
        reference_rejected: Tensor,
    ) -> AlignmentLoss:
        """max(0, margin - lead) of each bundle [B]; the mean over bundles is the objective's to take."""
        gained, lost = chosen.total - reference_chosen, rejected.total - reference_rejected
        loss = (self.settings.margin - (gained - lost)).clamp(min=0)
        return AlignmentLoss(loss, gained.detach(), lost.detach())

"""A further term of your own, in one file outside the package.

    terms:
      sign: {name: "examples.my_term:SameSign", weight: 0.5}

It is added on the steps that tap, logged as `loss/sign`, and named in the model card. What it reads besides what was
tapped it says by `needs_reference_state` and `needs_group`: see `mlc_ray.losses.base.Term`.
"""

import torch.nn.functional as F
from pydantic import Field

from mlc_ray.config import Fraction, TermSettings
from mlc_ray.losses.base import Tapped, Term, TermLoss


class SameSign(Term):
    """What MLC is blind to: a language whose representation points the opposite way from its bundle's mean."""

    class Settings(TermSettings):
        """What `terms.NAME` may hold beside `name` and `weight`; any other field is refused."""

        least: Fraction = Field(0.5, description="Cosine with the bundle's mean above which a language costs nothing.")

    settings: Settings

    def __call__(self, tapped: Tapped) -> TermLoss:
        """Mean over each bundle's languages of max(0, least - cosine with the bundle's mean), [B]; and mean cosines."""
        rows = F.normalize(tapped.representations, dim=-1) * tapped.present.unsqueeze(-1)  # [B, L, D]
        mean = F.normalize(rows.sum(dim=1, keepdim=True), dim=-1)
        cosines = (rows * mean).sum(dim=-1)
        languages = tapped.present.sum(dim=1).clamp(min=1)
        below = (self.settings.least - cosines).clamp(min=0) * tapped.present
        return TermLoss(below.sum(dim=1) / languages, {"cosine": (cosines * tapped.present).sum(dim=1) / languages})

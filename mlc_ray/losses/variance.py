"""A term against collapse: keep the means of a round's bundles apart. See docs/collapse.md."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import PositiveFloat, TermSettings
from mlc_ray.losses.base import Round, Tapped, Term, TermLoss
from mlc_ray.losses.mlc import unit_rows

COVARIANCE_SHARE = 1 / 25  # of the covariance term beside the variance term, as in VICReg


@register("term", "variance")
class Variance(Term):
    """`variance_losses` with its settings."""

    class Settings(TermSettings):
        """Keeps the means of the round's bundles apart."""

        target_std: PositiveFloat = Field(
            1.0, description="Wanted spread of bundle means; 1 is that of orthogonal bundles."
        )

    settings: Settings
    needs_round = True

    def __call__(self, tapped: Tapped, together: Round) -> TermLoss:
        """The loss of each bundle of the round [N]."""
        return TermLoss(
            variance_losses(together.representations, together.taking_part, target_std=self.settings.target_std)
        )


def variance_losses(representations: Tensor, taking_part: Tensor, *, target_std: float) -> Tensor:
    """Variance and covariance regularisation of bundle means; the same number for each bundle taking part [N].

    After VICReg (Bardes et al. 2022, arXiv 2105.04906, eqs. 1 to 4), on the n bundles' means m of unit rows, scaled by
    sqrt(D) so that orthogonal bundles have a standard deviation near 1 in every dimension:
    v = mean over dimensions of max(0, target_std - sqrt(Var + 1e-4));
    c = (|C|_F^2 - (tr C)^2 / r) / (tr C + 0.01)^2, C the covariance of the unscaled means, r = min(n - 1, D);
    v + c / 25. VICReg's own c, the squared off-diagonal entries of C, needs more samples than dimensions: a round has
    few bundles, its C has rank n - 1, and those entries would be least where all bundles are *one*. This c is 0 where
    the spread is even over the r directions that n bundles can span, and always 0 for two bundles. With fewer than two
    bundles the loss is 0.
    """
    rows = unit_rows(representations, taking_part)
    counts = taking_part.sum(dim=1)
    real = counts > 0
    number = int(real.sum())
    if number < 2:
        return rows.sum(dim=(1, 2)) * 0.0
    means = (rows.sum(dim=1) / counts.clamp(min=1).unsqueeze(1))[real]
    size = means.shape[1]
    centred = means - means.mean(dim=0)
    variances = centred.square().sum(dim=0) / (number - 1)
    variance = (target_std - (size * variances + 1e-4).sqrt()).clamp(min=0).mean()
    gram = centred @ centred.T / (number - 1)  # its squared norm and trace are those of C, at n x n instead of D x D
    trace = variances.sum()
    covariance = (gram.square().sum() - trace.square() / min(number - 1, size)) / (trace + 0.01).square()
    return (variance + COVARIANCE_SHARE * covariance) * real

"""A term against collapse: keep the means of a group's bundles apart. See docs/collapse.md."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import PositiveFloat, TermSettings
from mlc_ray.losses.base import Tapped, Term, TermLoss
from mlc_ray.losses.mlc import unit_rows

COVARIANCE_SHARE = 1 / 25  # of the covariance term beside the variance term, as in VICReg


@register("term", "variance")
class Variance(Term):
    """`variance_losses` with its settings."""

    class Settings(TermSettings):
        """Keeps the means of a group's bundles apart."""

        target_std: PositiveFloat = Field(
            1.0, description="Wanted spread of bundle means; 1 is that of orthogonal bundles."
        )

    settings: Settings
    note = "after arXiv 2105.04906; ours: on bundle means of hidden states, for this use"
    needs_group = True

    def __call__(self, tapped: Tapped) -> TermLoss:
        """The loss of each bundle of the group [B]."""
        return TermLoss(variance_losses(tapped.representations, tapped.present, target_std=self.settings.target_std))


def variance_losses(representations: Tensor, present: Tensor, *, target_std: float) -> Tensor:
    """Variance and covariance regularisation of bundle means; the same number for each bundle with a language [B].

    After VICReg (Bardes et al. 2022, arXiv 2105.04906, eqs. 1 to 4), on the n bundles' means m of unit rows, scaled by
    sqrt(D) so that orthogonal bundles have a standard deviation near 1 in every dimension:
    v = mean over dimensions of max(0, target_std - sqrt(Var + 1e-4));
    c = (|C|_F^2 - (tr C)^2 / r) / (tr C + 0.01)^2, C the covariance of the unscaled means, r = min(n - 1, D);
    v + c / 25. VICReg's own c, the squared off-diagonal entries of C, needs more samples than dimensions: a group has
    few bundles, its C has rank n - 1, and those entries would be least where all bundles are *one*. This c is 0 where
    the spread is even over the r directions that n bundles can span, and always 0 for two bundles. With fewer than two
    bundles the loss is 0.

    Args:
        representations: [B, L, D], the extractor's outputs of B bundles in L languages; they need not be normalised.
        present: [B, L], true where a bundle has the language; other rows take no part.
        target_std: the standard deviation below which a dimension costs something.
    """
    rows = unit_rows(representations, present)
    counts = present.sum(dim=1)
    real = counts > 0
    number = real.sum()  # a tensor: how many there are is not waited for
    size = rows.shape[-1]
    means = rows.sum(dim=1) / counts.clamp(min=1).unsqueeze(1)
    centred = (means - means.sum(dim=0) / number.clamp(min=1)) * real.unsqueeze(1)
    freedom = (number - 1).clamp(min=1)
    variances = centred.square().sum(dim=0) / freedom
    variance = (target_std - (size * variances + 1e-4).sqrt()).clamp(min=0).mean()
    gram = centred @ centred.T / freedom  # its squared norm and trace are those of C, at n x n instead of D x D
    trace = variances.sum()
    covariance = (gram.square().sum() - trace.square() / freedom.clamp(max=size)) / (trace + 0.01).square()
    return (variance + COVARIANCE_SHARE * covariance) * (real & (number > 1))

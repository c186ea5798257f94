"""Terms against collapse: what keeps bundles of different meanings from being mapped onto one direction.

The MLC loss is least when the languages of a bundle are collinear, and does not care whether different bundles are;
see docs/collapse.md. Each term here is a loss per bundle, float64, 0 for a bundle that takes no part in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlc_ray.losses.mlc import unit_rows

COVARIANCE_SHARE = 1 / 25  # of the covariance term beside the variance term, as in VICReg


@dataclass(frozen=True)
class Round:
    """The N bundles that all workers forward at once; each worker's own B stand at `first` .. `first` + B.

    `representations` [N, L, D] are the extractor's outputs, with a gradient to this worker's own; `present` [N, L]
    marks the languages a bundle has; `weight` [N] is 0 for padding bundles, which take no part.
    """

    representations: Tensor
    present: Tensor
    weight: Tensor
    first: int = 0

    @property
    def taking_part(self) -> Tensor:
        """[N, L]: languages that are there, of bundles that are not padding."""
        return self.present & (self.weight > 0).unsqueeze(1)


def contrast_losses(representations: Tensor, taking_part: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss of each bundle [N]: its languages attract each other, other bundles' repel them.

    Khosla et al. 2020 (arXiv 2004.11362), eq. 2, with bundles as classes. For unit rows z of the languages taking part,
    P(i) the other languages of row i's bundle and A(i) all other rows:
    l_i = -1/|P(i)| sum over p in P(i) of log(exp(z_i.z_p / tau) / sum over a in A(i) of exp(z_i.z_a / tau)),
    then the mean over the bundle's rows. Unlike the MLC loss it sees signs. A row without a positive or without a
    negative has no loss.
    """
    n_bundles, n_languages, _ = representations.shape
    rows = unit_rows(representations, taking_part).flatten(0, 1)
    mask = taking_part.flatten()
    bundle = torch.arange(n_bundles, device=rows.device).repeat_interleave(n_languages)
    others = mask.unsqueeze(0) & mask.unsqueeze(1) & ~torch.eye(len(mask), dtype=torch.bool, device=rows.device)
    same = bundle.unsqueeze(0) == bundle.unsqueeze(1)
    logits = (rows @ rows.T / temperature).masked_fill(~others, torch.finfo(rows.dtype).min)
    log_shares = logits - logits.logsumexp(dim=1, keepdim=True)
    positives = others & same
    counts = positives.sum(dim=1)
    losses = -torch.where(positives, log_shares, 0.0).sum(dim=1) / counts.clamp(min=1)
    valid = (counts > 0) & (others & ~same).any(dim=1)
    return _mean_over_languages(torch.where(valid, losses, 0.0), valid, n_bundles)


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


def anchor_losses(tapped: Tensor, present: Tensor, reference_state: Tensor) -> Tensor:
    """Distance of each bundle's tapped states from the frozen reference's state of its response prompt, [B].

    |h - r|^2 / |r|^2 in hidden space, before the extractor, as a mean over the languages present: `tapped` [B, L, H],
    `reference_state` [B, H], which takes no gradient. Relative and not a cosine: states of different prompts may have
    cosines near 1 in a language model, and scale is part of what the layers above read.
    """
    target = reference_state.detach().double().unsqueeze(1)
    distances = (tapped.double() - target).square().sum(dim=2) / target.square().sum(dim=2)
    return _mean_over_languages(torch.where(present, distances, 0.0).flatten(), present.flatten(), len(present))


def _mean_over_languages(losses: Tensor, valid: Tensor, n_bundles: int) -> Tensor:
    counts = valid.view(n_bundles, -1).sum(dim=1)
    return losses.view(n_bundles, -1).sum(dim=1) / counts.clamp(min=1)

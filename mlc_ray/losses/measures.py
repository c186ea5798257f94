"""Measures of collapse: how alike bundles of different meanings have become. See docs/collapse.md.

Pure functions of detached tensors; none is differentiated. The two that compare bundles look at the extractor's outputs
of one optimizer step, `separability` at hidden states before the extractor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mlc_ray.losses.mlc import singular_values, unit_rows

MIN_PER_KIND = 8
"""Fewest bundles of each kind for `separability`: at 8 and 8, the AUC of a coin has a standard deviation of 0.15."""

BLOCK = 2**22
"""Most cosines computed at a time, 32 MiB in float64."""

RIDGE = 0.1
"""Ridge of the probe, in units of the states' mean squared distance from their mean."""


def between_bundle_cosine(representations: Tensor, present: Tensor) -> Tensor:
    """Mean |cosine| between rows [N, L, D] that belong to *different* bundles, over present [N, L] rows: a scalar.

    Near 1 means that bundles of different meanings share one direction, which the MLC loss does not forbid. NaN when
    fewer than two bundles have a language.
    """
    total, pairs = cosine_sums(representations, present, range(len(representations)))
    return total / pairs


def cosine_sums(representations: Tensor, present: Tensor, bundles: range) -> tuple[Tensor, Tensor]:
    """What `between_bundle_cosine` divides, of the pairs whose first row is of `bundles`: sum and number, two scalars.

    Sums over ranges that cover 0..N-1 add up to those of all pairs, so that workers can share the work. No matrix has
    more than `BLOCK` elements or one bundle's rows against all.
    """
    rows = unit_rows(representations.detach(), present)  # an absent one is zero, and so are its cosines
    n_bundles, n_languages, size = rows.shape
    everything = rows.reshape(-1, size).T
    at_once = max(1, BLOCK // max(1, n_languages * n_languages * n_bundles))
    total = rows.new_zeros(())
    for start in range(bundles.start, bundles.stop, at_once):
        block = rows[start : min(start + at_once, bundles.stop)]
        cosines = (block.reshape(-1, size) @ everything).abs()
        by_pair = cosines.view(len(block), n_languages, n_bundles, n_languages).sum(dim=(1, 3))
        by_pair.diagonal(start).zero_()
        total = total + by_pair.sum()
    counts = present.sum(dim=1)
    own = counts[bundles.start : bundles.stop]
    return total, (own * (counts.sum() - own)).sum()


def effective_rank(representations: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Effective rank of the bundle means of [N, L, D], and its share of the most it can be: two scalars.

    exp(-sum_k p_k ln p_k) with p = s / sum s, the singular values of the n x D matrix of means scaled to unit length
    (Roy and Vetterli 2007, "The effective rank", EUSIPCO). The mean of a bundle is that of its unit rows over present
    [N, L] languages; n counts bundles with a language. It lies between 1, where all bundles share one direction, and
    min(n, D), where they are orthogonal; the share is (rank - 1) / (min(n, D) - 1), from 0 to 1. The means are not
    centred: the difference that collapse takes away is the one between them and their common direction. Both are NaN
    when n < 2 or D = 1, or when a representation is not finite.
    """
    rows = unit_rows(representations.detach(), present)
    means = F.normalize(rows.sum(dim=1)[present.any(dim=1)], dim=-1)
    most = min(means.shape)
    if most < 2:
        nan = rows.new_tensor(float("nan"))
        return nan, nan
    # From the smaller Gram matrix, min(n, D) squared, not from a decomposition of the n x D matrix itself.
    values = singular_values((means if len(means) == most else means.T).unsqueeze(0))[0]
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp()
    return rank, (rank - 1) / (most - 1)


def separability(states: Tensor, present: Tensor, harmful: Tensor) -> Tensor:
    """How well a linear probe tells harmful from benign bundles by their hidden states: an AUC, a scalar.

    `states` [N, L, H] of N different bundles, `present` [N, L], `harmful` [N]. For each language with at least
    `MIN_PER_KIND` bundles of each kind, `probe_auc`; the result is the mean over these languages, so that a language
    whose kinds have become one is not hidden behind English. 1 is perfect, 0.5 is chance; NaN where no language has
    enough bundles, as in data of one kind. A probe sees differences of any size: a value near 1 does not say that the
    model acts on the difference. Values well below 0.5 come from data in matched pairs, a benign twin for each harmful
    bundle, whose common form outweighs their kind: the twin left in training answers for the bundle left out.
    """
    scores = []
    for language in range(states.shape[1]):
        here = present[:, language]
        labels = harmful[here]
        if min(int(labels.sum()), int((~labels).sum())) >= MIN_PER_KIND:
            scores.append(probe_auc(states[here, language], labels))
    return torch.stack(scores).mean() if scores else torch.tensor(float("nan"), dtype=torch.float64)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Share of pairs of a positive and a negative in which the positive's score [N] is higher, ties by half.

    NaN without both.
    """
    ups, downs = scores[positive], scores[~positive].sort().values
    if not len(ups) or not len(downs):
        return math.nan
    below, up_to = (torch.searchsorted(downs, ups.contiguous(), right=right) for right in (False, True))
    return float((below + up_to).double().mean()) / (2 * len(downs))


def probe_auc(states: Tensor, positive: Tensor) -> Tensor:
    """Leave-pair-out AUC of a ridge classifier on states [N, H], labels `positive` [N]: the mean of `probe_wins`."""
    return probe_wins(states, positive).mean()


def probe_wins(states: Tensor, positive: Tensor) -> Tensor:
    """Which of two states a ridge classifier scores higher that saw neither; float64 [P, Q], in closed form.

    For every pair of a positive and a negative of states [N, H], labels `positive` [N], the probe is trained on the
    other N - 2 rows and asked about the two: 1 where they are in order, 0.5 where they score alike, else 0. Leaving out
    single rows would be biased below chance, because the row left out shifts the training labels the other way (Airola
    et al. 2011, "An experimental comparison of cross-validation techniques for estimating the area under the ROC
    curve"). With the
    kernel K of centred states, G = (K + 1 + ridge I)^-1 and alpha = G y, labels y of +1 and -1, predictions for a
    held-out set S are y_S - G_SS^-1 alpha_S: no probe is trained twice.
    """
    centred = states.detach().double()
    centred = centred - centred.mean(dim=0)
    kernel = centred @ centred.T
    scale = kernel.diagonal().mean()
    kernel = kernel / torch.where(scale > 0, scale, torch.ones_like(scale))
    identity = torch.eye(len(states), dtype=kernel.dtype, device=kernel.device)
    inverse = torch.linalg.inv(kernel + 1.0 + RIDGE * identity)  # 1: a constant feature, the intercept
    labels = torch.where(positive, 1.0, -1.0).to(kernel.dtype)
    alpha = inverse @ labels
    ups, downs = positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]
    own_up, own_down = inverse.diagonal()[ups].unsqueeze(1), inverse.diagonal()[downs].unsqueeze(0)
    cross = inverse[ups][:, downs]
    determinant = own_up * own_down - cross.square()
    alpha_up, alpha_down = alpha[ups].unsqueeze(1), alpha[downs].unsqueeze(0)
    score_up = 1.0 - (own_down * alpha_up - cross * alpha_down) / determinant
    score_down = -1.0 - (own_up * alpha_down - cross * alpha_up) / determinant
    difference = score_up - score_down
    tie = difference.abs() < 1e-9  # identical states score alike up to rounding
    return torch.where(tie, 0.5, (difference > 0).double())

"""The mean over a bundle's answers, in which the response language's may weigh more than the others'."""

from __future__ import annotations

import torch
from torch import Tensor

from mlc_ray.types import AnswerRows


def weighted_mean(values: Tensor, rows: AnswerRows, share: float | None) -> Tensor:
    """Mean over each bundle's answers [B] of values [A]: all alike, or that in the response language by `share`.

    The others have the rest in equal parts; a bundle without others is its one answer alone.
    """
    bundles = len(rows.response)
    ones = torch.ones_like(values)
    number = ones.new_zeros(bundles).index_add(0, rows.bundle, ones)
    if share is None:
        return values.new_zeros(bundles).index_add(0, rows.bundle, values) / number
    alone = number == 1
    others = ((1 - share) / (number - 1)).masked_fill(alone, 1.0)[rows.bundle]
    weights = others.index_copy(0, rows.response, number.new_full((bundles,), share).masked_fill(alone, 1.0))
    return values.new_zeros(bundles).index_add(0, rows.bundle, weights * values)

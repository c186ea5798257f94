"""Log-probabilities of answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mlc_ray.types import ResponseLogProbs


def response_log_probs(logits: Tensor, targets: Tensor, bundle_of_target: Tensor, n_bundles: int) -> ResponseLogProbs:
    """Summed log-prob in nats and token count of each bundle's answer.

    `logits` [R, V] are those of response positions only, `targets` [R] the tokens they predict, `bundle_of_target` [R]
    the bundle 0..B-1 of each. The softmax is taken in float32 whatever the logits' type.
    """
    token_log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
    total = token_log_probs.new_zeros(n_bundles).index_add(0, bundle_of_target, token_log_probs)
    length = torch.bincount(bundle_of_target, minlength=n_bundles)
    return ResponseLogProbs(total=total, length=length)


def mean_log_prob(answer: ResponseLogProbs) -> Tensor:
    """Mean log-prob per token of each answer [B], in nats."""
    return answer.total / answer.length

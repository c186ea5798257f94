"""Keep the frozen reference's answers to benign prompts: KL of the next token to it, on benign bundles alone.

Ours. On harmful rows it would pull back to a model that complies; on benign ones it holds what `decision`, a preference
loss or MLC would take along, in every language of a bundle.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import TermSettings
from mlc_ray.losses.base import Kept, Term, TermLoss

CHUNK = 2**20
"""Logits in a piece, as in `losses.logprobs`."""


@register("term", "kl")
class Kl(Term):
    """`kl_losses` with its settings."""

    class Settings(TermSettings):
        """Keep the next-token distributions of benign bundles near the frozen reference's, in every language."""

        weight: Annotated[float, Field(ge=0)] = Field(0.1, description="Factor in the total loss. 0 switches it off.")

    settings: Settings
    note = "ours"
    needs_reference_logits = True
    needs_kinds = True
    carries = False

    def __call__(self, kept: Kept) -> TermLoss:
        """The loss of each bundle [B]."""
        return TermLoss(kl_losses(kept))


def kl_losses(kept: Kept) -> Tensor:
    """Mean KL of the frozen reference's next-token distributions to the policy's, in nats; [B], 0 for harmful bundles.

    sum_v p_ref(v) (log p_ref(v) - log p(v)) over the whole vocabulary, as a mean over a language's places and then over
    the bundle's languages. It is 0 where the policy is the reference, and so is its gradient, p - p_ref.
    """
    divergences = kl_divergence(kept.policy, kept.reference)
    return divergences.new_zeros(kept.bundles).index_add(0, kept.bundle, divergences * kept.share)


def kl_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """KL of softmax(reference) [K, V] to softmax(policy) [K, V], in nats: [K], float32 whatever the logits' type.

    No piece of more than `CHUNK` logits is in float32 at a time; `reference` takes no gradient.
    """
    divergence: Tensor = cast(Any, _Kl).apply(policy, reference)
    return divergence


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, policy: Tensor, reference: Tensor) -> Tensor:
        context.save_for_backward(policy, reference)
        parts = []
        for ours, theirs in zip(_pieces(policy), _pieces(reference), strict=True):
            wanted = theirs.float().log_softmax(dim=-1)
            parts.append((wanted.exp() * (wanted - ours.float().log_softmax(dim=-1))).sum(dim=-1))
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        policy, reference = context.saved_tensors
        slope = torch.empty_like(policy)
        parts = (_pieces(policy), _pieces(reference), _pieces(slope), gradients[0].split(_rows(policy)))
        for ours, theirs, out, gradient in zip(*parts, strict=True):
            difference = ours.float().softmax(dim=-1).sub_(theirs.float().softmax(dim=-1))
            out.copy_(difference.mul_(gradient.unsqueeze(1)))
        return slope, None


def _pieces(logits: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = torch.split(logits, _rows(logits))
    return parts


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[1])

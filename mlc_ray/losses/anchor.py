"""A term against collapse: keep tapped states near the frozen reference's. See docs/collapse.md."""

from __future__ import annotations

import torch
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import TermSettings
from mlc_ray.losses.base import Tapped, Term, TermLoss, mean_over_languages


@register("term", "anchor")
class Anchor(Term):
    """`anchor_losses` with its settings."""

    class Settings(TermSettings):
        """Keeps tapped states near the frozen reference's."""

    note = "ours"
    needs_reference_state = True

    def __call__(self, tapped: Tapped, reference_state: Tensor) -> TermLoss:
        """The loss of each bundle [B]."""
        return TermLoss(anchor_losses(tapped.states, tapped.present, reference_state))


def anchor_losses(tapped: Tensor, present: Tensor, reference_state: Tensor) -> Tensor:
    """Distance of each bundle's tapped states from the frozen reference's state of its response prompt, [B].

    |h - r|^2 / |r|^2 in hidden space, before the extractor, as a mean over the languages present. Relative and not a
    cosine: states of different prompts may have cosines near 1 in a language model, and scale is part of what the
    layers above read.

    Args:
        tapped: [B, L, H], the states h of B bundles in L languages.
        present: [B, L], true where a bundle has the language; other rows take no part.
        reference_state: [B, H], the states r; they take no gradient.
    """
    target = reference_state.detach().double().unsqueeze(1)
    distances = (tapped.double() - target).square().sum(dim=2) / target.square().sum(dim=2)
    return mean_over_languages(torch.where(present, distances, 0.0).flatten(), present.flatten(), len(present))

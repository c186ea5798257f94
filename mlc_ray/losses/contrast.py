"""A term against collapse: tell each bundle from the others of its group. See docs/collapse.md."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import PositiveFloat, TermSettings
from mlc_ray.losses.base import Tapped, Term, TermLoss, mean_over_languages
from mlc_ray.losses.mlc import unit_rows


@register("term", "contrast")
class Contrast(Term):
    """`contrast_losses` with its settings."""

    class Settings(TermSettings):
        """Tells each bundle from the others of its group."""

        temperature: PositiveFloat = Field(0.1, description="Tau of the softmax over cosines.")
        other_kind: PositiveFloat = Field(
            1.0,
            description="How many times a row of a bundle of the other kind counts among the others: above 1, harmful "
            "and benign bundles (twins, where a group has them) repel each other more than bundles of one kind.",
        )

    settings: Settings
    needs_group = True

    @property
    def note(self) -> str:  # type: ignore[override]
        """The source, and what is not the authors'."""
        further = f", and that the other kind counts {self.settings.other_kind:g} times" if self.needs_kinds else ""
        return f"after arXiv 2004.11362; ours: bundles as classes of prompts in several languages{further}"

    @property
    def needs_kinds(self) -> bool:  # type: ignore[override]
        """Whether rows of the other kind count otherwise."""
        return self.settings.other_kind != 1

    @property
    def needs_pairs(self) -> bool:  # type: ignore[override]
        """The same: a bundle's twin is of the other kind, and the nearest of these."""
        return self.needs_kinds

    def __call__(self, tapped: Tapped) -> TermLoss:
        """The loss of each bundle of the group [B]."""
        return TermLoss(
            contrast_losses(
                tapped.representations,
                tapped.present,
                temperature=self.settings.temperature,
                harmful=tapped.harmful,
                other_kind=self.settings.other_kind,
            )
        )


def contrast_losses(
    representations: Tensor,
    present: Tensor,
    *,
    temperature: float,
    harmful: Tensor | None = None,
    other_kind: float = 1.0,
) -> Tensor:
    """Supervised contrastive loss of each bundle [B]: its languages attract each other, other bundles' repel them.

    Khosla et al. 2020 (arXiv 2004.11362), eq. 2, with bundles as classes. For unit rows z, P(i) the other languages of
    row i's bundle and A(i) all other rows:
    l_i = -1/|P(i)| sum over p in P(i) of log(exp(z_i.z_p / tau) / sum over a in A(i) of exp(z_i.z_a / tau)),
    then the mean over the bundle's rows. Unlike the MLC loss it sees signs. A row without a positive or without a
    negative has no loss.

    Args:
        representations: [B, L, D], the extractor's outputs of B bundles in L languages; they need not be normalised.
        present: [B, L], true where a bundle has the language; other rows take no part.
        temperature: tau of the softmax over cosines.
        harmful: [B], whether a bundle is harmful; None where `other_kind` is 1.
        other_kind: how many times a row of a bundle of the other kind counts in the sum over A(i), which is ours.

    Raises:
        ValueError: `other_kind` is not 1, and the kinds are not given.
    """
    n_bundles, n_languages, _ = representations.shape
    rows = unit_rows(representations, present).flatten(0, 1)
    mask = present.flatten()
    bundle = torch.arange(n_bundles, device=rows.device).repeat_interleave(n_languages)
    others = mask.unsqueeze(0) & mask.unsqueeze(1) & ~torch.eye(len(mask), dtype=torch.bool, device=rows.device)
    same = bundle.unsqueeze(0) == bundle.unsqueeze(1)
    logits = (rows @ rows.T / temperature).masked_fill(~others, torch.finfo(rows.dtype).min)
    if other_kind != 1:
        if harmful is None:
            raise ValueError(f"other_kind={other_kind} needs the kinds of bundles, none were given")
        kind = harmful.repeat_interleave(n_languages)
        logits = logits + math.log(other_kind) * (kind.unsqueeze(0) != kind.unsqueeze(1)).to(logits.dtype)
    log_shares = logits - logits.logsumexp(dim=1, keepdim=True)
    positives = others & same
    counts = positives.sum(dim=1)
    losses = -torch.where(positives, log_shares, 0.0).sum(dim=1) / counts.clamp(min=1)
    valid = (counts > 0) & (others & ~same).any(dim=1)
    return mean_over_languages(torch.where(valid, losses, 0.0), valid, n_bundles)

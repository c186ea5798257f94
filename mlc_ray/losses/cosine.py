"""Pairwise cosines in the place of MLC's singular values: the ablation that the paper's reviewers asked for.

The forms are ours, in that no code of the authors' is known: linear, which unlike MLC sees signs; squared, a function
of the same singular values as MLC's, without its softmax; and anchored on the response language.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import TapSection
from mlc_ray.losses.base import Tapped, Term, TermLoss
from mlc_ray.losses.mlc import centred, comparable, unit_rows

Form = Literal["linear", "squared", "anchored"]


@register("term", "cosine")
class Cosine(Term):
    """`cosine_losses` with its settings; it stands in MLC's place, by `mlc.name=cosine`.

    With `centring` the loss of a group of one bundle is 0.
    """

    class Settings(TapSection):
        """Pairwise cosines of a bundle's languages, in MLC's place, and the tap that all terms read."""

        weight: Annotated[float, Field(ge=0)] = Field(0.8, description="Lambda. 0 switches the term off.")
        form: Form = Field(
            "linear",
            description="`linear`: 1 - mean cosine; `squared`: 1 - mean squared cosine; `anchored`: 1 - mean cosine "
            "with the response language.",
        )
        detach: bool | None = Field(
            None,
            description="Of `anchored`: whether the response language's state is a constant, so that it does not drift "
            "towards the others (default there: true).",
        )

        @model_validator(mode="after")
        def _detached_anchor(self) -> Cosine.Settings:
            if self.detach is not None and self.form != "anchored":
                raise ValueError(
                    f"detach={self.detach} is read with form=anchored, not with form={self.form}; remove it"
                )
            return self

    settings: Settings
    note = "ours, in the place of the term of arXiv 2602.16660"

    @property
    def needs_group(self) -> bool:  # type: ignore[override]
        """Whether it takes the mean over a group first."""
        return self.settings.centring

    def __call__(self, tapped: Tapped) -> TermLoss:
        """The loss of each bundle [B], and its mean cosine `cosine` [B]."""
        representations = centred(tapped) if self.settings.centring else tapped.representations
        anchor = tapped.response_columns if self.settings.form == "anchored" else None
        squared, detach = self.settings.form == "squared", self.settings.detach is not False
        losses = cosine_losses(representations, tapped.present, squared=squared, anchor=anchor, detach=detach)
        if self.settings.centring:
            losses = losses.where(comparable(tapped), 0.0)
        with torch.no_grad():
            cosines = 1 - cosine_losses(representations, tapped.present)
        return TermLoss(losses, {"cosine": cosines})


def cosine_losses(
    representations: Tensor,
    present: Tensor,
    *,
    squared: bool = False,
    anchor: Tensor | None = None,
    detach: bool = True,
) -> Tensor:
    """1 - the mean cosine of a bundle's languages, of each bundle [B], float64; 0 with fewer than two languages.

    For unit rows z of [B, L, D], of the n that are `present` [B, L]: 1 - 2 / (n (n - 1)) sum over i < j of z_i.z_j, or
    of (z_i.z_j)^2 if `squared`. With `anchor` [B], columns that are present: 1 - mean over the others of z_anchor.z_t,
    where z_anchor takes no gradient if `detach`.
    """
    rows = unit_rows(representations, present)
    counts = present.sum(dim=1)
    if anchor is not None:
        bundles = torch.arange(len(rows), device=rows.device)
        fixed = rows[bundles, anchor]
        others = rows.masked_fill(
            torch.zeros_like(present).index_put((bundles, anchor), present.new_ones(())).unsqueeze(-1), 0.0
        )
        sums = ((fixed.detach() if detach else fixed).unsqueeze(1) * others).sum(dim=(1, 2))
        means = sums / (counts - 1).clamp(min=1)
    else:
        gram = rows @ rows.mT
        own = gram.diagonal(dim1=1, dim2=2).detach()  # 1, or 0 where a row is absent
        sums = (
            (gram.square().sum(dim=(1, 2)) - own.square().sum(dim=1))
            if squared
            else gram.sum(dim=(1, 2)) - own.sum(dim=1)
        )
        means = sums / (counts * (counts - 1)).clamp(min=1)
    return torch.where(counts > 1, 1 - means, 0.0)

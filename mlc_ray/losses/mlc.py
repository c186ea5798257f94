"""The multilingual-consistency (MLC) loss and what to watch beside it.

Source: "Align Once, Benefit Multilingually", ICLR 2026, arXiv 2602.16660. Rows of Z [L, D] are the unit-length
extractor outputs of one bundle's languages; s1 >= s2 >= ... are its singular values; the loss is the cross-entropy of
softmax(s / tau) against index 0, which is least when Z has rank 1, that is when all languages are collinear.

Blind spots, both measured: a language whose representation points the *opposite* way costs nothing (singular values
do not see signs), and neither does mapping bundles of every meaning onto one direction (the measures in
`losses/measures.py` do, and the terms `contrast`, `anchor` and `variance` cost it).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mlc_ray._registry import register
from mlc_ray.config import PositiveFloat, TapSection
from mlc_ray.losses.base import Tapped, Term, TermLoss

Scaling = Literal["leading", "none"]


@register("term", "mlc")
class Mlc(Term):
    """`mlc_losses` with its settings; its singular values are logged as their leading share.

    With `centring` the loss of a group of one bundle is 0.
    """

    class Settings(TapSection):
        """The multilingual-consistency term, and the tap that all terms read."""

        weight: Annotated[float, Field(ge=0)] = Field(0.8, description="Lambda. 0 switches the term off.")
        temperature: PositiveFloat = Field(0.2, description="Tau of the softmax over singular values.")
        scaling: Scaling = Field(
            "leading",
            description=(
                "`leading` divides by the detached first singular value (published code); `none` is the paper's "
                "equation."
            ),
        )

    settings: Settings

    @property
    def note(self) -> str:  # type: ignore[override]
        """What of its settings the method's authors do not have."""
        own = {
            "no extractor": self.settings.extractor_dim is None,
            "centring": self.settings.centring,
            "the late start": bool(self.settings.start),
            "the ramp": bool(self.settings.ramp),
        }
        return f"ours: {', '.join(found)}" if (found := [name for name, is_set in own.items() if is_set]) else ""

    @property
    def needs_group(self) -> bool:  # type: ignore[override]
        """Whether it takes the mean over a group first."""
        return self.settings.centring

    def __call__(self, tapped: Tapped) -> TermLoss:
        """The loss of each bundle [B], and `leading_share` [B]."""
        losses, values = mlc_losses(
            centred(tapped) if self.settings.centring else tapped.representations,
            temperature=self.settings.temperature,
            scaling=self.settings.scaling,
            present=tapped.present,
        )
        if self.settings.centring:
            losses = losses.where(comparable(tapped), 0.0)
        return TermLoss(losses, {"leading_share": leading_share(values)})


def mlc_loss(
    representations: Tensor,
    *,
    temperature: float = 0.2,
    scaling: Scaling = "leading",
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean MLC loss over bundles: a scalar, and the singular values [B, S] (float64, descending).

    Args:
        representations: [B, L, D], the extractor's outputs of B bundles in L languages; they need not be normalised.
        temperature: tau of the softmax over singular values.
        scaling: `leading`: logits are s / stop_gradient(s1) / tau, as in the authors' code; `none`: s / tau, as in the
            paper's equation.
        present: [B, L], true where a bundle has the language; None for all of them. A bundle with fewer than two
            languages has loss 0.

    Raises:
        ValueError: a shape, the temperature or the scaling is not one of these.
    """
    losses, values = mlc_losses(representations, temperature=temperature, scaling=scaling, present=present)
    return losses.mean(), values


def mlc_losses(
    representations: Tensor,
    *,
    temperature: float = 0.2,
    scaling: Scaling = "leading",
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MLC loss of each bundle [B], and its singular values [B, S], both float64.

    Args:
        representations: [B, L, D], the extractor's outputs of B bundles in L languages; they need not be normalised.
        temperature: tau of the softmax over singular values.
        scaling: `leading`: logits are s / stop_gradient(s1) / tau, as in the authors' code; `none`: s / tau, as in the
            paper's equation.
        present: [B, L], true where a bundle has the language; None for all of them. An absent one takes no part,
            neither its row nor its logit. A bundle with fewer than two languages has loss 0.

    Raises:
        ValueError: a shape, the temperature or the scaling is not one of these.
    """
    if representations.dim() != 3:
        raise ValueError(f"representations must be [B, L, D], got shape {tuple(representations.shape)}")
    if present is not None and present.shape != representations.shape[:2]:
        raise ValueError(
            f"present must be [B, L] = {tuple(representations.shape[:2])}, got shape {tuple(present.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if present is None:
        present = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
    values = singular_values(unit_rows(representations, present))
    counts = present.sum(dim=1)
    valid = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(1)
    if scaling == "leading":
        # A bundle with no language at all has s1 = 0: divide by 1 there, its logits are masked anyway.
        leading = values[:, :1].detach()
        logits = values / torch.where(leading > 0, leading, torch.ones_like(leading)) / temperature
    elif scaling == "none":
        logits = values / temperature
    else:
        raise ValueError(f"scaling must be 'leading' or 'none', got {scaling!r}")
    # The finite fill keeps a bundle without languages at loss 0 rather than NaN.
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    losses = -F.log_softmax(logits, dim=1)[:, 0]
    return torch.where(counts > 1, losses, torch.zeros_like(losses)), values


def centred(tapped: Tapped) -> Tensor:
    """Representations [B, L, D] in float64, less their mean over all that are present; absent ones become zero.

    States of language models share a large mean, beside which all of them look collinear. The mean takes part in the
    gradient. It is of a group of bundles, so that how a batch is cut does not matter.
    """
    rows = tapped.representations.double()
    present = tapped.present.unsqueeze(-1)
    mean = rows.where(present, 0.0).sum(dim=(0, 1)) / present.sum().clamp(min=1)
    return (rows - mean).where(present, 0.0)


def comparable(tapped: Tapped) -> Tensor:
    """Whether a group has two bundles, a boolean scalar: less its own mean, what is left of a lone one is noise."""
    return tapped.present.any(dim=1).sum() > 1


def unit_rows(representations: Tensor, present: Tensor | None = None) -> Tensor:
    """Rows of [B, L, D] scaled to unit length in float64; absent rows become zero.

    Float64 because training drives Z toward rank 1, where the small eigenvalues of the Gram matrix are differences of
    nearly equal numbers: in float32 they are off by 1e-3 in the gradient. Z is tiny (L x D), so this costs nothing.
    """
    rows = F.normalize(representations.double(), dim=-1)
    return rows if present is None else rows * present.unsqueeze(-1)


def singular_values(rows: Tensor) -> Tensor:
    """Singular values [B, S] of [B, L, D], descending, as square roots of the eigenvalues of the L x L Gram matrix.

    The backward of `eigvalsh` has no 1 / (lambda_i - lambda_j), so ties are safe; the square root's 1 / (2 s) is cut
    off where an eigenvalue is rounding noise, with gradient 0 there, a valid subgradient of a singular value at 0.
    A bundle with a value that is not finite has NaN for singular values, rather than `eigvalsh` failing for them all.
    """
    gram = rows @ rows.transpose(1, 2)
    finite = gram.isfinite().all(dim=(1, 2))
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gram = torch.where(finite[:, None, None], gram, identity)
    eigenvalues = torch.linalg.eigvalsh(gram).flip(-1)[:, : min(rows.shape[1], rows.shape[2])]
    noise = 8 * rows.shape[1] ** 2 * torch.finfo(eigenvalues.dtype).eps
    above = eigenvalues > noise
    values = torch.where(above, torch.where(above, eigenvalues, torch.ones_like(eigenvalues)).sqrt(), 0.0)
    return torch.where(finite[:, None], values, torch.nan)


def leading_share(values: Tensor) -> Tensor:
    """s1^2 / sum s^2 of each bundle [B]: 1 when all its languages are collinear, 1 / L when they are orthogonal."""
    squares = values.detach().square()
    return squares[:, 0] / squares.sum(dim=1).clamp(min=torch.finfo(squares.dtype).tiny)
